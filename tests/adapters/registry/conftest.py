from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.registry.places import BACKENDS, Place
from tests.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


def place_of(backend: str, request: pytest.FixtureRequest, folder: Path) -> Place:
    if backend == "sqlite":
        return Place(backend, str(folder / "registry.db"), folder)
    server: RedisServer = request.getfixturevalue("redis_server")
    return Place(backend, f"{server.url}?namespace={folder.name}", folder)


@pytest.fixture(params=list(BACKENDS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of store in turn."""
    place = place_of(request.param, request, tmp_path)
    yield place
    place.close()


@pytest.fixture
def redis_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A Redis server."""
    place = place_of("redis", request, tmp_path)
    yield place
    place.close()
