"""One real server for all tests of this folder."""

from collections.abc import Iterator

import httpx
import pytest

from tests.service.http.serving import Serving, serving_tiny


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The whole service."""
    with serving_tiny(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def http(serving: Serving) -> Iterator[httpx.Client]:
    """A client of it. There is no TLS here, and reading certificates takes longer than most requests."""
    with httpx.Client(base_url=serving.url, timeout=30, verify=False) as client:
        yield client
