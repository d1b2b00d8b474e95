"""What tests of the service share: one small world, and one service that runs over a copy of it."""

from collections.abc import Iterator

import pytest

from tests.service.worlds import Service, World, make_world, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read it, or copy it before you change it."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def service(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service over a copy of the world. Tests may add galleries of their own to it, and nothing else."""
    with running(world.copy(tmp_path_factory.mktemp("service")).settings) as service:
        yield service
