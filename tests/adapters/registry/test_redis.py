import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from adapters.errors import InvalidReference, RegistryLost, RegistryUnavailable
from adapters.registry import open_registry
from adapters.registry.redis import RedisStore
from tests.adapters.registry.places import Place
from tests.adapters.registry.test_conformance import package, ready_versions
from tests.redis_server import RedisServer


def test_who_knew_the_old_history_goes_on_with_the_restored_one(redis_place: Place, tmp_path: Path) -> None:
    first, second = redis_place.open(tmp_path / "1"), redis_place.open(tmp_path / "2")
    ready_versions(first)
    second.snapshot()
    redis_place.lose()
    with pytest.raises(RegistryLost, match="empty"):
        second.snapshot()
    with pytest.raises(RegistryLost):
        second.add_version("b", package(1))
    first.restore(actor="r1")
    assert second.snapshot() == first.snapshot()
    assert second.add_version("b", package(1)).version == 1


def test_a_registry_that_went_back_is_lost(redis_place: Place, tmp_path: Path) -> None:
    """A failover to a copy that lacked the last writes."""
    registry = redis_place.open(tmp_path / "memory")
    registry.add_version("a", package(1))
    client = redis.Redis.from_url(redis_place.address.partition("?")[0])
    keys = sorted(client.keys(f"{{{tmp_path.name}}}:*"))
    copy = [(key, client.dump(key)) for key in keys]
    registry.add_version("a", package(2))
    known = registry.snapshot()
    client.delete(*keys)
    for key, value in copy:
        client.restore(key, 0, value)
    with pytest.raises(RegistryLost, match="went back from generation 2 to 1"):
        registry.snapshot()
    assert registry.restore(actor="r1").versions == known.versions


def test_another_registry_is_not_overwritten(redis_place: Place, tmp_path: Path) -> None:
    registry = redis_place.open(tmp_path / "memory")
    registry.add_version("a", package(1))
    redis_place.lose()
    redis_place.open().add_version("theirs", package(1))
    with pytest.raises(RegistryLost, match="another history"):
        registry.snapshot()
    with pytest.raises(RegistryUnavailable, match="another registry is there"):
        registry.restore(actor="r1")
    assert list(registry.restore(actor="r1", force=True).adapters) == ["a"]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may stop and kill."""
    server = RedisServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()


def test_what_was_acknowledged_survives_a_kill_of_the_server(own_server: RedisServer) -> None:
    registry = open_registry(own_server.url)
    ready_versions(registry)
    known = registry.snapshot()
    own_server.kill()
    with pytest.raises(RegistryUnavailable):
        registry.snapshot()
    own_server.start()
    assert registry.snapshot() == known
    assert registry.add_version("b", package(1)).version == 1
    registry.close()


def test_a_server_that_hangs_is_unavailable_after_a_bounded_time(own_server: RedisServer) -> None:
    registry = open_registry(own_server.url)
    ready_versions(registry)
    own_server.pause()
    start = time.monotonic()
    with pytest.raises(RegistryUnavailable):
        registry.snapshot()
    with pytest.raises(RegistryUnavailable):
        registry.set_alias("a", "prod", 2)
    registry.wait(0.1)
    assert time.monotonic() - start < 30
    own_server.resume()
    assert registry.snapshot().aliases_of("a")["prod"] in (1, 2)  # the write may have arrived: nobody was told it had
    registry.close()


def test_a_server_that_was_emptied_is_restored(own_server: RedisServer, tmp_path: Path) -> None:
    registry = open_registry(own_server.url, memory=tmp_path / "memory")
    ready_versions(registry)
    own_server.kill()
    own_server.erase()
    own_server.start()
    with pytest.raises(RegistryLost, match="empty"):
        registry.snapshot()
    assert registry.restore(actor="r1").aliases_of("a") == {"prod": 1}
    registry.close()


def test_a_commit_that_arrives_twice_counts_once(redis_place: Place) -> None:
    registry = redis_place.open()
    ready_versions(registry)
    store, base = redis_place.store(), registry.revision()
    assert store.commit(base, "tip", (), ())
    assert store.commit(base, "tip", (), ())
    assert not store.commit(base, "other", (), ())
    assert registry.revision().generation == base.generation + 1
    store.close()


def test_namespaces_are_registries_of_their_own(redis_server: RedisServer, tmp_path: Path) -> None:
    first, second = (open_registry(f"{redis_server.url}?namespace={tmp_path.name}-{n}") for n in "ab")
    first.add_version("a", package(1))
    assert second.snapshot().versions == ()
    first.close()
    second.close()


@pytest.mark.parametrize("url", ["redis://host:port", "redis://host/?namespace={x}", "postgres://host"])
def test_addresses_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(InvalidReference):
        open_registry(url)


def test_an_address_nobody_answers_at_is_unavailable_and_shows_no_password() -> None:
    with pytest.raises(RegistryUnavailable) as caught:
        open_registry("redis://:secret@127.0.0.1:9/0")
    assert "secret" not in caught.value.message and "127.0.0.1:9" in caught.value.message


def test_a_server_without_persistence_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        RedisStore(server.url).close()
        assert not caplog.records
        redis.Redis.from_url(server.url).config_set("appendonly", "no")
        RedisStore(server.url).close()
        assert "a restart of it loses the registry" in caplog.text
    finally:
        server.stop()
