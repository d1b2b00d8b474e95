"""A replica's part in rollouts: prepare what is coming, say so, commit when all are ready, abort what is late.

No replica is special. Whatever one of them does, another may do after its death: the registry takes each step once.
"""

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import AsyncExitStack
from functools import partial

from adapters.errors import AdapterBankError, ArtifactUnavailable, Conflict, NotFound, RegistryUnavailable
from adapters.registry import Registry, RolloutRecord, Snapshot, VersionReference
from adapters.registry.records import Phase
from service.auth import LOCAL
from service.errors import GalleryBusy, NotReady, Overloaded
from service.loader import Loader
from service.metrics import Metrics
from service.pipelines.galleries import BuildProgress, Galleries
from service.types import RequestContext

log = logging.getLogger(__name__)

TRANSIENT = (
    RegistryUnavailable,
    ArtifactUnavailable,
    GalleryBusy,
    NotReady,
    Overloaded,
)  # worth another try until the deadline
ACTIVE_PHASES: tuple[Phase, ...] = ("migrating", "preparing")
MIGRATION_TIMEOUT_S = 7 * 24 * 3600.0


class Rollouts:
    """Advances every rollout under way, as this replica. For the event loop."""

    def __init__(
        self, replica_id: str, registry: Registry, loader: Loader, galleries: Galleries, metrics: Metrics
    ) -> None:
        self._replica_id = replica_id
        self._registry = registry
        self._loader = loader
        self._galleries = galleries
        for phase in ACTIVE_PHASES:
            metrics.rollouts.labels(phase).set_function(partial(self._num_in, phase))
        self._held: dict[str, AsyncExitStack] = {}  # what rollouts under way need, by id
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._migrating: dict[str, asyncio.Task[None]] = {}
        self.progress: dict[str, BuildProgress] = {}

    def _num_in(self, phase: Phase) -> int:
        return sum(rollout.phase == phase for rollout in self._loader.snapshot.active_rollouts)

    async def advance(self, snapshot: Snapshot, alive: Collection[str]) -> None:
        """Take every step that can be taken now. Raises: RegistryUnavailable."""
        active = {rollout.id: rollout for rollout in snapshot.active_rollouts}
        await self._let_go(active.keys())
        for rollout in active.values():
            await self._abort_if_late(rollout)
            if rollout.phase == "migrating":
                await self._begin_migration(rollout, alive)
            if not self._holds_all(rollout):
                if rollout.id not in self._preparing:
                    self._preparing[rollout.id] = asyncio.create_task(self._prepare(rollout))
            elif rollout.phase == "preparing":
                await self._acknowledge(rollout, alive)

    async def prepare_all(self, snapshot: Snapshot) -> None:
        """Hold what every rollout under way needs: before a replica that just started takes requests."""
        for rollout in snapshot.active_rollouts:
            await self._prepare(rollout)

    async def close(self) -> None:
        """Stop preparing and migrating, and let everything go."""
        tasks = [*self._preparing.values(), *self._migrating.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._let_go(())

    # --- prepare and commit ------------------------------------------------------------------------------

    async def _prepare(self, rollout: RolloutRecord) -> None:
        """Load the version to come and open its galleries, and hold them until the rollout is over."""
        held = AsyncExitStack()
        try:
            reference = str(VersionReference(rollout.name, rollout.to_version))
            await held.enter_async_context(self._loader.pin(reference, LOCAL))
            for move in rollout.moves:
                if move.to_version is not None:
                    await self._galleries.version(move.gallery, move.to_version, LOCAL)
            before = self._held.get(rollout.id)
            self._held[rollout.id] = held.pop_all()
            if before is not None:
                await before.aclose()
        except TRANSIENT as error:
            log.warning("operation %s cannot be prepared yet: %s", rollout.id, error.message)
        except AdapterBankError as error:
            await self._abort(rollout, f"replica {self._replica_id} cannot serve it: {error.message}")
        finally:
            await held.aclose()
            self._preparing.pop(rollout.id, None)

    def _holds_all(self, rollout: RolloutRecord) -> bool:
        """Whether everything there is of it is held, galleries that were embedded meanwhile included."""
        if rollout.id not in self._held:
            return False
        there = [(move.gallery, move.to_version) for move in rollout.moves if move.to_version is not None]
        return all(self._galleries.store.is_open(name, version) for name, version in there)

    async def _acknowledge(self, rollout: RolloutRecord, alive: Collection[str]) -> None:
        if self._replica_id not in rollout.ready:
            acknowledged = await asyncio.to_thread(self._registry.acknowledge, rollout.id, self._replica_id)
            rollout = acknowledged or rollout
        if all(replica in rollout.ready or replica not in alive for replica in rollout.required):
            committed = await asyncio.to_thread(
                self._registry.commit_rollout, rollout.id, alive, actor=self._replica_id
            )
            if committed is not None:
                await self._loader.refresh()

    async def _abort_if_late(self, rollout: RolloutRecord) -> None:
        if self._registry.now() > rollout.deadline:
            names = ", ".join(sorted(set(rollout.required) - set(rollout.ready))) or "nobody"
            await self._abort(rollout, f"its deadline passed; it waited for {names}", only_late=True)

    async def _abort(self, rollout: RolloutRecord, error: str, *, only_late: bool = False) -> None:
        try:
            await asyncio.to_thread(
                self._registry.abort_rollout, rollout.id, error, only_late=only_late, actor=self._replica_id
            )
        except (Conflict, NotFound):
            log.info("operation %s was over already", rollout.id)

    async def _let_go(self, active: Collection[str]) -> None:
        for rollout_id in [rollout_id for rollout_id in self._held if rollout_id not in active]:
            await self._held.pop(rollout_id).aclose()
        for rollout_id in [rollout_id for rollout_id in self._migrating if rollout_id not in active]:
            self._migrating.pop(rollout_id).cancel()

    # --- migrate -----------------------------------------------------------------------------------------

    async def _begin_migration(self, rollout: RolloutRecord, alive: Collection[str]) -> None:
        """Become the one that embeds its galleries, unless somebody alive is."""
        if rollout.id in self._migrating or (rollout.migrator in alive and rollout.migrator != self._replica_id):
            return
        others = set(alive) - {self._replica_id}  # a claim of our own is from before we lost it
        claimed = await asyncio.to_thread(self._registry.claim_migration, rollout.id, self._replica_id, others)
        if claimed is not None:
            self._migrating[rollout.id] = asyncio.create_task(self._migrate(claimed))

    async def _migrate(self, rollout: RolloutRecord) -> None:
        """Embed every gallery of a rollout anew. Stops when the rollout is over or somebody else took over."""

        def report(progress: BuildProgress) -> None:
            self.progress[rollout.id] = progress

        context = RequestContext(
            deadline=time.monotonic() + MIGRATION_TIMEOUT_S, client=self._replica_id, background=True
        )
        reference = str(VersionReference(rollout.name, rollout.to_version))
        try:
            for move in rollout.moves:
                if move.to_version is None:
                    assert move.from_version is not None, "a gallery without a live version is migrated. This is a bug."
                    record = await self._galleries.rebuild(move.gallery, move.from_version, reference, context, report)
                    await asyncio.to_thread(
                        self._registry.finish_migration,
                        rollout.id,
                        rollout.token,
                        move.gallery,
                        record.version,
                        actor=self._replica_id,
                    )
        except Conflict as error:  # somebody else's now, or over; a gallery that is busy comes round again
            log.info("operation %s: %s", rollout.id, error.message)
        except TRANSIENT as error:
            log.warning("operation %s: a gallery cannot be embedded yet: %s", rollout.id, error.message)
        except AdapterBankError as error:
            await self._abort(rollout, f"a gallery could not be embedded anew: {error.message}")
        finally:
            self.progress.pop(rollout.id, None)
            self._migrating.pop(rollout.id, None)
