"""Open a registry by its address."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from adapters.errors import InvalidReference
from adapters.registry.memory import Memory
from adapters.registry.registry import Registry
from adapters.registry.sqlite import SqliteStore
from adapters.registry.store import Store

REDIS_SCHEMES = ("redis", "rediss", "unix")


def open_registry(address: str | os.PathLike[str], *, memory: str | os.PathLike[str] | None = None) -> Registry:
    """The registry in a SQLite file (a path), or in Redis (redis://, rediss://, unix://).

    `memory` is a local folder that remembers its last state, so that a lost registry can be restored.
    Raises: InvalidReference for an address of neither kind, RegistryUnavailable.
    """
    return Registry(_open_store(address), memory=Memory(memory) if memory is not None else None)


def _open_store(address: str | os.PathLike[str]) -> Store:
    scheme = urlsplit(str(address)).scheme if "://" in str(address) else ""
    if not scheme:
        return SqliteStore(Path(address))
    if scheme not in REDIS_SCHEMES:
        raise InvalidReference(
            f"a registry is a file or a {', '.join(REDIS_SCHEMES)} URL, not {scheme}://", param="registry_url"
        )
    from adapters.registry.redis import RedisStore

    return RedisStore(str(address))
