"""Gallery versions on hosts that share no disk: put into a store of trees when they are made, fetched when they are needed.

Knows folders, digests and threads. Which versions there are is the registry's to say, when one is needed others'.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.artifacts import TreeStore
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, InvalidPackage
from adapters.registry import GalleryRecord
from service.errors import GalleryDamaged, InsufficientRoom, NotReady
from service.gallery.files import digest_of
from service.gallery.manifest import GalleryManifest
from service.gallery.store import Gallery, GalleryStore

log = logging.getLogger(__name__)

NUM_THREADS = 4  # versions that are fetched at a time
LOG_INTERVAL_S = 10.0  # how often a long transfer says how far it is
RETRY_S = 5.0
MEGABYTE = 1e6


class GalleryTrees:
    """The galleries below one folder together with those in a store of trees. Thread-safe.

    Without a store nothing is put anywhere, and what is not in the folder cannot be had.
    """

    def __init__(self, store: GalleryStore, trees: TreeStore | None) -> None:
        self._store = store
        self._trees = trees
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="gallery-fetch")
        self._fetches: dict[tuple[str, str], Future[None]] = {}
        self._manifests: dict[str, GalleryManifest] = {}  # of versions that were asked about and are not here
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    def close(self) -> None:
        """Stop fetching; what was fetched stays for the next attempt."""
        self._is_closed.set()
        self._threads.shutdown(cancel_futures=True)

    # --- what there is -----------------------------------------------------------------------------------

    def is_missing(self, record: GalleryRecord) -> bool:
        """Whether a version is not here and can be fetched. Looks at the disk."""
        return self._is_kept(record) and not self._store.has(record.name, record.version)

    def openable(self, name: str, records: Iterable[GalleryRecord]) -> list[int]:
        """The numbers of the versions of a gallery that can be opened, those that would be fetched first included."""
        here = set(self._store.numbers(name))
        return [record.version for record in records if record.version in here or self._is_kept(record)]

    def if_open(self, record: GalleryRecord) -> Gallery | None:
        """A version that was opened before; None where the disk has to be looked at. Raises: GalleryDamaged."""
        gallery = self._store.if_open(record.name, record.version)
        if gallery is None or (record.tree is not None and not gallery.has_tree_digest):
            return None
        return self._compared(gallery, record)

    def open(self, record: GalleryRecord) -> Gallery:
        """A version that is here. Raises: GalleryNotFound, GalleryDamaged."""
        with _damage(record):
            gallery = self._store.open(record.name, record.version)
        return self._compared(gallery, record)

    def _compared(self, gallery: Gallery, record: GalleryRecord) -> Gallery:
        """The gallery, which must be the registry's. Raises: GalleryDamaged."""
        with _damage(record):
            is_another = record.tree is not None and gallery.tree_digest != record.tree
        if is_another:
            self._store.release(record.name, record.version)
            raise GalleryDamaged(
                f"the folder of gallery {record.key} on this host holds another version than the registry's: "
                "it was made for another registry, or for a state that was lost; move it away",
                param="gallery",
            )
        return gallery

    def manifest(self, record: GalleryRecord) -> GalleryManifest:
        """What a version is, whether it is here or not; it is not fetched for that.

        Raises: GalleryNotFound, GalleryDamaged, ArtifactUnavailable.
        """
        with _damage(record):
            if not self.is_missing(record):
                return self._store.manifest(record.name, record.version)
            assert self._trees is not None and record.tree is not None, "what is missing is kept. This is a bug."
            if record.tree not in self._manifests:
                self._manifests[record.tree] = GalleryManifest.parse(self._trees.read(record.tree, "manifest.json"))
            return self._manifests[record.tree]

    def _is_kept(self, record: GalleryRecord) -> bool:
        return self._trees is not None and record.tree is not None

    # --- fetching ----------------------------------------------------------------------------------------

    def fetch(self, record: GalleryRecord) -> Future[None]:
        """Begin to fetch a missing version, or join whoever does. It appears whole, by one rename.

        The future raises GalleryDamaged, InsufficientRoom, NotReady after `close`, and ArtifactUnavailable, also when
        others fill the disk meanwhile. Raises: NotReady after `close`.
        """
        assert record.tree is not None, "a version that nobody kept is fetched. This is a bug."
        key = (record.key, record.tree)
        with self._lock:
            fetch = self._fetches.get(key)
            if fetch is None:
                try:
                    fetch = self._threads.submit(self._fetch, record, record.tree)
                except RuntimeError as error:
                    raise NotReady("the server is shutting down") from error
                self._fetches[key] = fetch
                fetch.add_done_callback(lambda _: self._fetches.pop(key, None))
            return fetch

    def _fetch(self, record: GalleryRecord, tree: str) -> None:
        assert self._trees is not None, "fetched from nowhere. This is a bug."
        progress = _Progress(f"fetching gallery {record.key} from {self._trees.url}", self._is_closed.is_set)

        def report(num_bytes: int, total_bytes: int) -> None:
            progress(num_bytes, total_bytes)
            self._check_room(record, total_bytes - num_bytes)

        with suppress(Conflict), _damage(record):  # another process of this host was faster
            self._trees.fetch_tree(tree, self._store.root / record.name / f"v{record.version}", report)
            self._manifests.pop(tree, None)
            progress.end()

    def _check_room(self, record: GalleryRecord, num_bytes: int) -> None:
        free = shutil.disk_usage(self._store.root).free
        if free < num_bytes:
            raise InsufficientRoom(
                f"gallery {record.key} is {num_bytes:,} bytes more than are here, and {free:,} bytes of disk are free"
            )

    # --- putting -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find out whether the store answers, before hours of work for it. Raises: ArtifactUnavailable."""
        if self._trees is not None:
            self._trees.has(digest_of(b""))

    def put(self, record: GalleryRecord, folder: Path, *, deadline: float, stop: threading.Event) -> str | None:
        """Keep the folder of a version and return its tree's digest; None where there is no store.

        A store that is away is tried again until the monotonic `deadline`: embedding took longer than it will be away.
        Raises: ArtifactUnavailable then; NotReady once `stop` is set; InvalidPackage for a folder that cannot be read.
        """
        if self._trees is None:
            return None
        progress = _Progress(f"putting gallery {record.key} into {self._trees.url}", stop.is_set)
        while True:
            try:
                tree = self._trees.put_tree(folder, progress)
                progress.end()
                return tree
            except ArtifactUnavailable as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise
                log.warning("gallery %s cannot be put into the store yet: %s", record.key, error.message)
            if stop.wait(RETRY_S):
                raise NotReady(f"gallery {record.key} is not wanted any more")


class _Progress:
    """Tells the log how far a transfer is, and ends it when nobody wants it any more."""

    def __init__(self, what: str, is_over: Callable[[], bool]) -> None:
        self._what = what
        self._is_over = is_over
        self._total_bytes = 0
        self._began_at = time.monotonic()
        self._told_at = float("-inf")

    def __call__(self, num_bytes: int, total_bytes: int) -> None:
        """Raises: NotReady."""
        if self._is_over():
            raise NotReady(f"{self._what} was stopped")
        if total_bytes and time.monotonic() - self._told_at >= LOG_INTERVAL_S:
            self._told_at, self._total_bytes = time.monotonic(), total_bytes
            log.info("%s: %.1f of %.1f MB", self._what, num_bytes / MEGABYTE, total_bytes / MEGABYTE)

    def end(self) -> None:
        """It is through."""
        seconds = time.monotonic() - self._began_at
        log.info("%s: all %.1f MB after %.1f s", self._what, self._total_bytes / MEGABYTE, seconds)


@contextmanager
def _damage(record: GalleryRecord) -> Iterator[None]:
    """What is wrong with stored files is the server's fault, not that of whoever asks. Raises: GalleryDamaged."""
    try:
        yield
    except (ArtifactNotFound, InvalidPackage) as error:
        raise GalleryDamaged(
            f"the files of gallery {record.key} are damaged: {error.message}", param="gallery"
        ) from error
