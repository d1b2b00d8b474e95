"""Where a registry may live in a test: each kind of store, openable from any process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from adapters.registry import Memory, Registry
from adapters.registry.redis import RedisStore
from adapters.registry.sqlite import SqliteStore
from adapters.registry.store import Store


def open_sqlite(address: str) -> Store:
    return SqliteStore(address, busy_timeout_s=30)


BACKENDS: dict[str, Callable[[str], Store]] = {"sqlite": open_sqlite, "redis": RedisStore}


@dataclass
class Place:
    """Somewhere a registry lives, that can be opened any number of times, also from other processes."""

    backend: str
    address: str
    folder: Path
    opened: list[Registry] = field(default_factory=list)

    def store(self) -> Store:
        return BACKENDS[self.backend](self.address)

    def open(self, memory: Path | None = None) -> Registry:
        registry = Registry(self.store(), memory=Memory(memory) if memory is not None else None)
        self.opened.append(registry)
        return registry

    def lose(self) -> None:
        """Leave nothing of what it held."""
        if self.backend == "sqlite":
            for path in self.folder.glob("registry.db*"):
                path.unlink()
        else:
            redis.Redis.from_url(self.address.partition("?")[0]).flushall()

    def close(self) -> None:
        for registry in self.opened:
            registry.close()
