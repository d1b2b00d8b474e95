"""Every kind of place packages can be kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.artifacts.stores import Place, a_place


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with a_place(request.param, tmp_path) as place:
        yield place


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with a_place(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def place_in_memory(tmp_path: Path) -> Iterator[Place]:
    with a_place("memory", tmp_path) as place:
        yield place
