"""Where packages and folder trees are kept: by digest, so that a name can never come to mean other bytes.

Packages lie in a local folder, or on any file system that fsspec opens with a bounded cache of them beside it. Knows
files and digests; what is in a package, beyond which files, is checked before it is put here.
"""

from adapters.artifacts.base import ArtifactStore, Entry, Leftover
from adapters.artifacts.fetching import fetch_package
from adapters.artifacts.local import LocalArtifactStore
from adapters.artifacts.opening import open_store, open_trees
from adapters.artifacts.remote import RemoteArtifactStore
from adapters.artifacts.trees import TreeStore, sweep_fetches

__all__ = [
    "ArtifactStore",
    "Entry",
    "Leftover",
    "LocalArtifactStore",
    "RemoteArtifactStore",
    "TreeStore",
    "fetch_package",
    "open_store",
    "open_trees",
    "sweep_fetches",
]
