"""Stores of each kind with a way to their bare files, packages to put there, and processes that start quickly."""

import multiprocessing
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import fsspec

from adapters.artifacts import ArtifactStore, open_store
from adapters.artifacts.objects import Retries

ABSENT = f"sha256:{0:064x}"
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "probe.safetensors")
NO_WAITING = Retries(first_wait_s=0.0)
MIB = 2**20


def make_folder(path: Path, readme: str = "x", *, num_bytes: int = 20_000) -> Path:
    """A folder with the files of a package: what they say is none of the store's business."""
    path.mkdir(parents=True)
    for name in FILES[1:]:
        (path / name).write_bytes((name.encode() * num_bytes)[:num_bytes])
    (path / "README.md").write_text(readme)
    return path


@dataclass
class Place:
    """Somewhere packages can be kept. `root` is what fsspec calls it."""

    location: str
    fs: Any
    root: str
    cache: Path
    max_cache_bytes: int = 100 * MIB

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    def open(self) -> ArtifactStore:
        return open_store(self.location, cache=self.cache, max_cache_bytes=self.max_cache_bytes, retries=NO_WAITING)

    def path(self, digest: str, name: str = "") -> str:
        """The bare file of an artifact, or its folder."""
        return f"{self.root}/sha256/{digest.removeprefix('sha256:')}{name and '/'}{name}"

    def manifest(self, digest: str) -> str:
        return f"{self.path(digest)}.json"

    def everything(self) -> list[str]:
        """Every file below the root."""
        return sorted(name.removeprefix(f"{self.root}/") for name in self.fs.find(self.root))


@contextmanager
def a_place(kind: str, tmp_path: Path) -> Iterator[Place]:
    """`folder`, `file` or `memory`."""
    cache = tmp_path / "cache"
    if kind == "memory":
        root = f"/{uuid.uuid4().hex}"
        fs = fsspec.filesystem("memory")
        yield Place(f"memory:/{root}", fs, root, cache)
        if fs.exists(root):
            fs.rm(root, recursive=True)
        return
    root = str(tmp_path / "store")
    yield Place(root if kind == "folder" else f"file://{root}", fsspec.filesystem("file"), root, cache)


def forks() -> ForkServerContext:
    """Processes that are forked from one which has imported everything: a second or two for the first, none for the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapters.artifacts", "tests.adapters.artifacts.stores"])
    return context


def hidden(folder: Path) -> list[str]:
    """Names below a folder that begin with a dot, but for the lock of a cache."""
    return sorted(path.name for path in folder.rglob(".*") if path.name not in (".lock", ".uploads"))


def num_bytes_below(folder: Path) -> int:
    return sum(os.stat(path).st_size for path in folder.rglob("*") if path.is_file())
