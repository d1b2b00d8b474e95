"""From a location to the store that is there: a folder of this host, or a URL."""

import os
from pathlib import Path

from adapters.artifacts.base import ArtifactStore
from adapters.artifacts.cache import PackageCache
from adapters.artifacts.local import LocalArtifactStore
from adapters.artifacts.objects import RETRIES, LocalObjects, Retries, is_url, open_objects
from adapters.artifacts.remote import RemoteArtifactStore
from adapters.artifacts.trees import TreeStore


def open_store(
    location: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str],
    max_cache_bytes: int,
    retries: Retries = RETRIES,
) -> ArtifactStore:
    """The packages at a folder, or at any URL that fsspec opens: `s3://bucket/prefix`, `gs://`, `abfs://`, `file://`.

    Packages from a URL are kept in the folder `cache` of a local disk, up to `max_cache_bytes`. Whether the network
    answers is found out at the first use.
    Raises: InvalidReference for a URL nothing opens; ArtifactUnavailable naming the package when its driver is missing,
    or when a folder cannot be made.
    """
    if isinstance(location, str) and is_url(location):
        return RemoteArtifactStore(open_objects(location, retries=retries), PackageCache(cache, max_cache_bytes))
    return LocalArtifactStore(Path(location).expanduser())


def open_trees(location: str | os.PathLike[str], *, retries: Retries = RETRIES) -> TreeStore:
    """The trees at a folder or URL. Raises: as `open_store`."""
    if isinstance(location, str) and is_url(location):
        return TreeStore(open_objects(location, retries=retries))
    return TreeStore(LocalObjects(Path(location).expanduser().absolute(), retries=retries))
