"""Packages on an object store, or any other file system that fsspec opens, and a bounded cache of them on a local disk.

    ROOT/sha256/<hex>/FILE      the files of an artifact
    ROOT/sha256/<hex>.json      its manifest, written last and removed first

Nothing here relies on a rename, which object stores do not have: an artifact is there once its manifest is.
"""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from adapters.artifacts.base import Entry, Leftover, Made, aged, hex_of
from adapters.artifacts.cache import PackageCache
from adapters.artifacts.manifest import Manifest
from adapters.artifacts.objects import Objects
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch
from adapters.package import files_digest, read_files

log = logging.getLogger(__name__)

MAX_ROUNDS = 3  # of writing what somebody else deletes meanwhile


class RemoteFolders:
    """Folders of files by digest, each with a manifest. What the digest is made of, the two kinds below know."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self._folder = folder

    @property
    def url(self) -> str:
        """Where this is, for people."""
        return f"{self._objects.url}/{self._folder}"

    def has(self, digest: str) -> bool:
        """Whether the artifact is here: its manifest is."""
        return self._objects.exists(self._manifest_path(digest))

    def delete(self, digest: str) -> None:
        """Forget an artifact, its manifest first; no error when it is gone already."""
        self._objects.remove(self._manifest_path(digest))
        self._objects.remove_tree(self._files_path(digest))

    def digests(self) -> tuple[str, ...]:
        """Every digest kept, sorted."""
        return tuple(entry.digest for entry in self.entries())

    def entries(self) -> tuple[Entry, ...]:
        """Every artifact kept, in the order of the digests; it appeared when its manifest did."""
        return self._listing()[0]

    def leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """Files without a manifest, and files that were never put in place. See ArtifactStore."""
        return aged(self._listing()[1], older_than_s)

    def sweep_leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """Remove these leftovers and return them. See ArtifactStore."""
        swept = []
        for leftover in self.leftovers(older_than_s):
            if not self._objects.exists(f"{leftover.name}.json"):  # completed since it was listed
                self._objects.remove_tree(leftover.name)
                swept.append(leftover)
        return tuple(swept)

    def _listing(self) -> tuple[tuple[Entry, ...], list[Leftover]]:
        found = self._objects.find(self._folder)
        manifests = {path.removesuffix(".json") for path in found if re.fullmatch(r"[0-9a-f]{64}\.json", path)}
        sizes = dict.fromkeys(manifests, 0)
        newest: dict[str, datetime] = {}
        for path, info in found.items():
            name, _, file = path.partition("/")
            if file and re.fullmatch(r"[0-9a-f]{64}", name):
                sizes[name] = sizes.get(name, 0) + info.num_bytes
                newest[name] = max(newest.get(name, info.modified_at), info.modified_at)
        entries = (
            Entry(f"sha256:{name}", sizes[name], found[f"{name}.json"].modified_at) for name in sorted(manifests)
        )
        leftovers = [
            Leftover(f"{self._folder}/{name}", sizes[name], at) for name, at in newest.items() if name not in manifests
        ]
        unfinished = (Leftover(path, *info) for path, info in self._objects.unfinished().items())
        return tuple(entries), [*leftovers, *unfinished]

    def _manifest(self, digest: str) -> Manifest:
        """Raises: ArtifactNotFound, DigestMismatch."""
        try:
            text = self._objects.read(self._manifest_path(digest))
        except FileNotFoundError as error:
            raise self._absent(digest) from error
        return Manifest.parse(text, digest)

    def _stale(self, manifest: Manifest) -> list[str]:
        """Files of an artifact that are not there, or not of their size."""
        found = self._objects.find(self._files_path(manifest.digest))
        sizes = {name: info.num_bytes for name, info in found.items()}
        return [name for name, record in manifest.files.items() if sizes.get(name) != record.size_bytes]

    def _contents(self, manifest: Manifest, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece; whoever reads to the end has the right ones.

        Raises: DigestMismatch; ArtifactNotFound when the artifact was deleted meanwhile.
        """
        record, digest, num_bytes = manifest.files[name], sha256(), 0
        try:
            for chunk in self._objects.chunks(f"{self._files_path(manifest.digest)}/{name}", record.size_bytes):
                digest.update(chunk)
                num_bytes += len(chunk)
                yield chunk
        except FileNotFoundError as error:
            raise self._damaged(manifest, name, "is missing") from error
        if num_bytes != record.size_bytes or f"sha256:{digest.hexdigest()}" != record.sha256:
            raise self._damaged(manifest, name, "is not the file that was written")

    def _check_sizes(self, manifest: Manifest) -> None:
        """Raises: DigestMismatch, ArtifactNotFound."""
        if stale := self._stale(manifest):
            raise self._damaged(manifest, stale[0], "is missing or not of its size")

    def _damaged(self, manifest: Manifest, name: str, what: str) -> DigestMismatch | ArtifactNotFound:
        if not self.has(manifest.digest):
            return self._absent(manifest.digest)
        return DigestMismatch(f"artifact {manifest.digest} in {self.url} is damaged: {name} {what}", param="digest")

    def _absent(self, digest: str) -> ArtifactNotFound:
        return ArtifactNotFound(f"no artifact {digest} in {self.url}", param="digest")

    def _complete(self, manifest: Manifest, stale: Collection[str], send: Callable[[str, str], None]) -> None:
        """Send the stale files, by name and path, and then the manifest; once more if somebody deleted files meanwhile.

        Raises: Conflict when that does not end.
        """
        digest = manifest.digest
        for _ in range(MAX_ROUNDS):
            for name in stale:
                send(name, f"{self._files_path(digest)}/{name}")
            self._objects.write(self._manifest_path(digest), manifest.dump())
            stale = self._stale(manifest)
            if not stale:
                return
        raise Conflict(f"artifact {digest} in {self.url} is deleted as fast as it is written", param="digest")

    def _manifest_path(self, digest: str) -> str:
        return f"{self._files_path(digest)}.json"

    def _files_path(self, digest: str) -> str:
        return f"{self._folder}/{hex_of(digest)}"


class RemoteArtifactStore(RemoteFolders):
    """Packages on a file system that fsspec opens. See ArtifactStore.

    Any number of hosts may share one. What was read stays in the cache, and can be read there when the network is gone.
    """

    def __init__(self, objects: Objects, cache: PackageCache) -> None:
        super().__init__(objects, "sha256")
        self._cache = cache

    def put(self, package_dir: str | os.PathLike[str]) -> str:
        """See ArtifactStore. A damaged or incomplete copy kept under the same digest is completed."""
        files = read_files(Path(package_dir))
        manifest = Manifest.of_package(files)
        if not self._is_intact(manifest.digest):
            self._complete(manifest, files, lambda name, path: self._objects.write(path, files[name]))
        return manifest.digest

    def read(self, digest: str) -> dict[str, bytes]:
        """See ArtifactStore. From the cache where it is there; a cache that cannot be written costs a fetch each time."""
        cached = self._cache.read(digest)
        if cached is not None:
            return cached
        files = self._fetch(digest)
        try:
            self._cache.keep(digest, files)
        except ArtifactUnavailable as error:
            log.warning("artifact %s was fetched and cannot be kept in the cache: %s", digest, error)
        return files

    def load(self, digest: str, make: Callable[[Mapping[str, bytes]], Made]) -> Made:
        """See ArtifactStore."""
        return make(self.read(digest))

    def verify(self, digest: str) -> None:
        """See ArtifactStore: reads the store, whatever is in the cache."""
        self._fetch(digest)

    def is_near(self, digest: str) -> bool:
        """See ArtifactStore: whether it is in the cache."""
        return self._cache.has(digest)

    def delete(self, digest: str) -> None:
        """See ArtifactStore. Also from this host's cache."""
        super().delete(digest)
        self._cache.delete(digest)

    def _fetch(self, digest: str) -> dict[str, bytes]:
        manifest = self._manifest(digest)
        self._check_sizes(manifest)
        files = {name: b"".join(self._contents(manifest, name)) for name in manifest.files}
        if (found := files_digest(files)) != digest:
            raise DigestMismatch(
                f"artifact {digest} in {self.url} is damaged: its files have the digest {found}", param="digest"
            )
        return files

    def _is_intact(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except (ArtifactNotFound, DigestMismatch):
            return False
        return True
