"""Collects what nothing refers to any more: packages, gallery versions, records of old operations. One replica at a time."""

import asyncio
import logging
import time
from collections.abc import Collection

from adapters.artifacts import ArtifactStore
from adapters.errors import AdapterBankError, Conflict
from adapters.registry import Registry, Snapshot
from service.gallery.store import GalleryStore

log = logging.getLogger(__name__)

DUTY = "sweep"
INTERVAL_S = 600.0
GRACE_S = 24 * 3600.0


class Sweeper:
    """Sweeps now and then, when it has the duty."""

    def __init__(
        self,
        replica_id: str,
        registry: Registry,
        artifacts: ArtifactStore,
        galleries: GalleryStore,
        *,
        interval_s: float = INTERVAL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        """`grace_s`: how long something must have been of no use before it goes."""
        self._replica_id = replica_id
        self._registry = registry
        self._artifacts = artifacts
        self._galleries = galleries
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._due_at = time.monotonic() + interval_s

    def is_due(self) -> bool:
        """Whether it is time again."""
        return time.monotonic() >= self._due_at

    async def sweep_if_due(self, snapshot: Snapshot, alive: Collection[str]) -> None:
        """Sweep when it is time and nobody else who lives has the duty."""
        if not self.is_due():
            return
        self._due_at = time.monotonic() + self._interval_s
        others = set(alive) - {self._replica_id}
        lease = await asyncio.to_thread(self._registry.take_lease, DUTY, self._replica_id, others)
        if lease is not None:
            await asyncio.to_thread(self.sweep, snapshot)

    def sweep(self, snapshot: Snapshot) -> None:
        """Remove what has been of no use for the grace period. Any thread."""
        before = self._registry.now() - self._grace_s
        self._registry.drop_operations(before)
        for replica in self._registry.replicas():
            if replica.age_s > self._grace_s:
                self._registry.forget(replica.id)
        self._sweep_packages(snapshot, before)
        self._sweep_galleries(snapshot, before)

    def _sweep_packages(self, snapshot: Snapshot, before: float) -> None:
        """Packages of deleted versions, and those that were put and never registered."""
        self._artifacts.sweep_leftovers(self._grace_s)
        needed = _needed_packages(snapshot, before)
        for entry in self._artifacts.entries():
            if entry.digest in needed or entry.modified_at.timestamp() >= before:
                continue
            if entry.digest in _needed_packages(self._registry.snapshot(), before):
                continue  # pushed again since the sweep began
            self._artifacts.delete(entry.digest)
            log.info("swept package %s", entry.digest)

    def _sweep_galleries(self, snapshot: Snapshot, before: float) -> None:
        """Delete superseded versions nothing points to, the files of deleted ones, and what given-up builds left."""
        rolling = {
            (m.gallery, v) for r in snapshot.active_rollouts for m in r.moves for v in (m.from_version, m.to_version)
        }
        built = {job.gallery for job in snapshot.active_jobs}
        self._galleries.sweep_builds(before, keep={*built, *(gallery for gallery, _ in rolling)})
        for record in snapshot.galleries:
            if record.updated_at >= before or record.status == "building" or record.name in built:
                continue
            head = snapshot.head(record.name)
            if (head is not None and record.version in (head.live, head.canary)) or (
                record.name,
                record.version,
            ) in rolling:
                continue
            if record.status == "ready" and head is not None and head.live is not None and record.version > head.live:
                continue  # newer than the live one: somebody prepares it
            try:
                if record.status != "deleted":
                    self._registry.set_gallery_status(
                        record.name, record.version, "deleted", reason="superseded", actor=DUTY
                    )
                self._galleries.delete(record.name, record.version)
                log.info("swept gallery %s", record.key)
            except (Conflict, AdapterBankError) as error:
                log.debug("gallery %s was not swept: %s", record.key, error.message)


def _needed_packages(snapshot: Snapshot, before: float) -> set[str]:
    """Digests of packages that a version has, or had until lately."""
    return {r.package_digest for r in snapshot.versions if r.status != "deleted" or r.updated_at >= before}
