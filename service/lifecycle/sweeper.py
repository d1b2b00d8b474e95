"""Collects what nothing refers to any more: packages, gallery versions, records of old operations.

One replica at a time sweeps what all share; each sweeps its own home.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from adapters.artifacts import ArtifactStore, TreeStore
from adapters.errors import Conflict, NotFound
from adapters.registry import GalleryRecord, Registry, Snapshot
from service.errors import GalleryNotFound
from service.gallery.store import GalleryStore

log = logging.getLogger(__name__)

DUTY = "sweep"
INTERVAL_S = 600.0
GRACE_S = 24 * 3600.0
SUPERSEDED = "superseded"
UNFINISHED = "its build ended before it was ready"


class Sweeper:
    """Sweeps now and then, when it has the duty."""

    def __init__(
        self,
        replica_id: str,
        registry: Registry,
        artifacts: ArtifactStore,
        galleries: GalleryStore,
        trees: TreeStore | None = None,
        *,
        interval_s: float = INTERVAL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        """`grace_s`: how long something must have been of no use before it goes."""
        self._replica_id = replica_id
        self._registry = registry
        self._artifacts = artifacts
        self._galleries = galleries
        self._trees = trees
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._due_at = time.monotonic() + interval_s

    def is_due(self) -> bool:
        """Whether it is time again."""
        return time.monotonic() >= self._due_at

    async def sweep_if_due(self, snapshot: Snapshot, alive: Collection[str]) -> None:
        """Sweep this home when it is time, and what all share when nobody else who lives has the duty."""
        if not self.is_due():
            return
        self._due_at = time.monotonic() + self._interval_s
        await asyncio.to_thread(self.sweep_home)
        others = set(alive) - {self._replica_id}
        lease = await asyncio.to_thread(self._registry.take_lease, DUTY, self._replica_id, others)
        if lease is not None:
            await asyncio.to_thread(self.sweep, snapshot)

    def sweep(self, snapshot: Snapshot) -> None:
        """Give up, and remove from the places that all replicas share, what has been of no use for the grace period. Any thread."""
        before = self._before()
        self._registry.drop_operations(before)
        for replica in self._registry.replicas():
            if replica.age_s > self._grace_s:
                self._registry.forget(replica.id)
        self._sweep_galleries(snapshot, before)
        self._sweep_store(self._artifacts, _needed_packages, "package", before)
        if self._trees is not None:
            self._sweep_store(self._trees, _needed_trees, "tree", before)

    def sweep_home(self) -> None:
        """Remove from this home what has been of no use for the grace period; every replica does. Any thread."""
        self._sweep_folders(self._registry.snapshot(), self._before())

    def _before(self) -> float:
        """Seconds since 1970: what was of no use then may go."""
        return self._registry.now() - self._grace_s

    def _sweep_store(
        self,
        store: ArtifactStore | TreeStore,
        needed: Callable[[Snapshot, float], Collection[str]],
        what: str,
        before: float,
    ) -> None:
        """What belonged to deleted versions, and what was put and never registered."""
        store.sweep_leftovers(self._grace_s)
        known = needed(self._registry.snapshot(), before)
        for entry in store.entries():
            if entry.digest in known or entry.modified_at.timestamp() >= before:
                continue
            if entry.digest in needed(self._registry.snapshot(), before):
                continue  # put again since the sweep began
            store.delete(entry.digest)
            log.info("swept %s %s", what, entry.digest)

    def _sweep_galleries(self, snapshot: Snapshot, before: float) -> None:
        """Give up superseded versions nothing points to, and those whose build ended before they were ready."""
        built, rolled = _galleries_built(snapshot), _versions_rolled(snapshot)
        for record in snapshot.galleries:
            if record.status == "deleted" or record.updated_at >= before or record.name in built:
                continue
            if record.status == "building":
                if any(record.name == gallery for gallery, _ in rolled):
                    continue
                reason = UNFINISHED
            elif (record.name, record.version) in rolled or _is_wanted(snapshot, record):
                continue
            else:
                reason = SUPERSEDED
            try:
                self._registry.set_gallery_status(record.name, record.version, "deleted", reason=reason, actor=DUTY)
            except (Conflict, NotFound) as error:
                log.debug("gallery %s was not given up: %s", record.key, error.message)

    def _sweep_folders(self, snapshot: Snapshot, before: float) -> None:
        """The files of versions that were deleted, and what builds and fetches left that nobody went on with."""
        rolled = {gallery for gallery, _ in _versions_rolled(snapshot)}
        self._galleries.sweep_work(before, keep=rolled | _galleries_built(snapshot))
        for record in snapshot.galleries:
            if _is_over(record, before) and self._galleries.has(record.name, record.version):
                with suppress(GalleryNotFound):  # another process of this home was faster
                    self._galleries.delete(record.name, record.version)
                    log.info("swept gallery %s", record.key)


def _galleries_built(snapshot: Snapshot) -> set[str]:
    """Galleries that a job works on."""
    return {job.gallery for job in snapshot.active_jobs}


def _versions_rolled(snapshot: Snapshot) -> set[tuple[str, int | None]]:
    """Gallery versions that rollouts come from or go to; None for one that is being made."""
    moves = [move for rollout in snapshot.active_rollouts for move in rollout.moves]
    return {(move.gallery, version) for move in moves for version in (move.from_version, move.to_version)}


def _is_wanted(snapshot: Snapshot, record: GalleryRecord) -> bool:
    """Whether a version is searched, or newer than what is: then somebody prepares it."""
    head = snapshot.head(record.name)
    if head is None:
        return False
    is_newer = record.status == "ready" and head.live is not None and record.version > head.live
    return is_newer or record.version in (head.live, head.canary)


def _is_over(record: GalleryRecord, before: float) -> bool:
    """Whether the files of a version may go: what was superseded had its time before it was given up."""
    return record.status == "deleted" and (record.updated_at < before or record.reason == SUPERSEDED)


def _needed_packages(snapshot: Snapshot, before: float) -> set[str]:
    """Digests of packages that a version has, or had until lately."""
    return {r.package_digest for r in snapshot.versions if r.status != "deleted" or r.updated_at >= before}


def _needed_trees(snapshot: Snapshot, before: float) -> set[str]:
    """Digests of trees that a gallery version has, or had until lately."""
    return {r.tree for r in snapshot.galleries if r.tree is not None and not _is_over(r, before)}
