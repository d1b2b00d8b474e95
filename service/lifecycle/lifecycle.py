"""What a running server does besides answering: be known to the others, and bring itself to what the registry says.

    every 2 s            a sign of life, and the registry's state on a disk of our own
    at each change,      rollouts and jobs are advanced, staged versions validated, a lost registry restored, and now and then
    every second at      what nothing refers to is swept
    the latest

Every duty is written so that it may stop at any moment and be taken up by another replica.
"""

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

from adapters.errors import AdapterBankError, RegistryUnavailable
from adapters.registry import Registry, Replica, VersionRecord
from service.errors import DeadlineExceeded
from service.lifecycle.jobs import Jobs
from service.lifecycle.rollouts import TRANSIENT, Rollouts
from service.lifecycle.sweeper import Sweeper
from service.loader import Loader
from service.logs import event
from service.metrics import Metrics

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 2.0
EXPIRY_S = 10.0  # without a sign of life for so long, a replica counts as gone
TICK_S = 1.0
RESTORE_AFTER_S = 3.0  # how long all who know a lost registry have to say how much they know of it


def new_replica_id() -> str:
    """Host, process and a part that is new at each start."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Lifecycle:
    """One replica's life. For the event loop."""

    def __init__(
        self,
        replica_id: str,
        registry: Registry,
        loader: Loader,
        rollouts: Rollouts,
        jobs: Jobs,
        sweeper: Sweeper,
        metrics: Metrics,
        *,
        validate: Callable[[VersionRecord], Awaitable[None]],
        describe: Callable[[], Mapping[str, object]],
    ) -> None:
        """`validate` raises what is wrong with a staged version; `describe` is what others are shown of this replica."""
        self.replica_id = replica_id
        self._registry = registry
        self._loader = loader
        self._rollouts = rollouts
        self._jobs = jobs
        self._sweeper = sweeper
        self._metrics = metrics
        self._validate = validate
        self._describe = describe
        self._tasks: list[asyncio.Task[None]] = []
        self._validating: asyncio.Task[None] | None = None
        self._lost_since: float | None = None
        self._is_serving = False
        self._wake = asyncio.Event()
        self._looking = asyncio.Lock()  # for others: what one look saw never replaces what a later one did
        self._others: frozenset[str] | None = None  # those that lived at the last look; None before the first

    async def start(self) -> None:
        """Become known, hold what rollouts under way need, and only then count as serving."""
        self._loader.on_change(self._wake.set)
        try:
            await self._beat()
            await self._rollouts.prepare_all(self._loader.snapshot)
            self._is_serving = True
            await self._beat()  # from now on a rollout waits for this replica
            await self.alive()
        except RegistryUnavailable as error:
            log.warning("starting without the registry: %s", error.message)
        self._is_serving = True
        log.info("replica %s serves", self.replica_id, extra=event("replica_joined", replica=self.replica_id))
        self._tasks = [asyncio.create_task(self._beat_on()), asyncio.create_task(self._reconcile_on())]

    async def close(self) -> None:
        """Stop every duty and leave."""
        was_serving, self._is_serving = self._is_serving, False
        tasks = [*self._tasks, *([self._validating] if self._validating else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        await self._jobs.close()
        await self._rollouts.close()
        try:
            await asyncio.to_thread(self._registry.forget, self.replica_id)
        except RegistryUnavailable:
            log.info("the registry was not told that this replica leaves; it will notice")
        if was_serving:
            log.info("replica %s leaves", self.replica_id, extra=event("replica_left", replica=self.replica_id))

    # --- signs of life -----------------------------------------------------------------------------------

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT_INTERVAL_S)
            try:
                await self._beat()
                await self.alive()  # nobody else may ask for a long time, and the lag is to be told all the while
            except RegistryUnavailable:
                pass  # the watcher says so
            except Exception:
                log.exception("no sign of life could be given")

    async def _beat(self) -> None:
        running = self._rollouts.progress | self._jobs.progress
        progress = {name: [p.done, p.total] for name, p in running.items()}
        details = {**self._describe(), "progress": progress}
        replica = Replica(self.replica_id, self._loader.snapshot.generation, self._is_serving, details)
        await asyncio.to_thread(self._beat_now, replica)

    def _beat_now(self, replica: Replica) -> None:
        self._registry.beat(replica)
        try:
            self._registry.remember()
        except OSError as error:
            log.warning("the registry's state cannot be remembered: %s", error)

    async def alive(self) -> set[str]:
        """Ids of the replicas heard of lately, this one included. Raises: RegistryUnavailable."""
        async with self._looking:
            replicas = await asyncio.to_thread(self._registry.replicas)
            others = [r for r in replicas if r.age_s < EXPIRY_S and r.id != self.replica_id]
            generations = [self._loader.snapshot.generation, *(r.generation for r in others)]
            self._metrics.replica_lag.set(max(generations) - min(generations))
            self._tell_of_others(frozenset(r.id for r in others), {r.id for r in replicas})
        return {self.replica_id, *(r.id for r in others)}

    def _tell_of_others(self, living: frozenset[str], known: set[str]) -> None:
        """Log who came and went since the last look. Who is still `known` did not say that it leaves."""
        before, self._others = self._others, living
        if before is None:
            return
        for replica in sorted(living - before):
            log.info("replica %s joined", replica, extra=event("replica_joined", replica=replica))
        for replica in sorted(before - living):
            if replica in known:
                keys = event("replica_left", replica=replica, reason="silent")
                log.warning("replica %s gave no sign of life for %g s", replica, EXPIRY_S, extra=keys)
            else:
                log.info("replica %s left", replica, extra=event("replica_left", replica=replica))

    # --- duties ------------------------------------------------------------------------------------------

    async def _reconcile_on(self) -> None:
        while True:
            try:
                await self._reconcile()
            except RegistryUnavailable as error:
                log.debug("the registry cannot be used: %s", error.message)
            except Exception:
                log.exception("a duty failed")  # and will be tried again: nothing ends the loop
            try:
                async with asyncio.timeout(TICK_S):  # wait_for could lose a cancellation that comes with the wake-up
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _reconcile(self) -> None:
        if self._loader.is_registry_lost:
            await self._restore()
            return
        self._lost_since = None
        snapshot = self._loader.snapshot
        waiting = [v for v in snapshot.versions if v.status in ("staged", "validating")]
        if snapshot.active_rollouts or snapshot.active_jobs or waiting or self._sweeper.is_due():
            alive = await self.alive()
            await self._rollouts.advance(snapshot, alive)
            await self._jobs.advance(snapshot, alive)
            if waiting and (self._validating is None or self._validating.done()):
                self._validating = asyncio.create_task(self._validate_all(waiting, alive))
            await self._sweeper.sweep_if_due(snapshot, alive)
        else:
            await self._rollouts.advance(snapshot, ())
            await self._jobs.advance(snapshot, ())

    async def _validate_all(self, waiting: list[VersionRecord], alive: set[str]) -> None:
        """Validate one version after the other, those that nobody else does."""
        others = alive - {self.replica_id}  # a claim of our own is from before we lost it
        for version in waiting:
            try:
                claimed = await asyncio.to_thread(
                    self._registry.claim_validation, version.name, version.version, self.replica_id, others
                )
                if claimed is not None:
                    await self._decide(claimed)
            except AdapterBankError as error:
                log.warning("%s could not be validated: %s", version.reference, error.message)
            except Exception:
                log.exception("%s could not be validated", version.reference)  # and keeps no other version waiting
        await self._loader.refresh()

    async def _decide(self, version: VersionRecord) -> None:
        error = None
        try:
            await self._validate(version)
        except (*TRANSIENT, DeadlineExceeded):
            raise  # this says nothing about the package: it comes round again
        except AdapterBankError as failure:
            error = failure.message
        finish = self._registry.finish_validation
        await asyncio.to_thread(finish, version.name, version.version, self.replica_id, error)
        if error is not None:  # and only now: until it is noted, somebody may have to look again
            self._metrics.validation_failures.inc()

    async def _restore(self) -> None:
        """Put a lost registry back, after giving those who know more of it the time to do so."""
        if not self._registry.is_shared:
            return  # a file does not vanish by itself: whoever took it away may bring it back
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            await asyncio.to_thread(
                self._registry.beat, Replica(self.replica_id, self._loader.snapshot.generation, True)
            )
        if now - self._lost_since < RESTORE_AFTER_S:
            return
        replicas = await asyncio.to_thread(self._registry.replicas)
        known = self._loader.snapshot.generation
        wiser = [r.id for r in replicas if r.age_s < EXPIRY_S and r.generation > known]
        if wiser and now - self._lost_since < 2 * EXPIRY_S:
            return
        await asyncio.to_thread(self._registry.restore, actor=self.replica_id)
        await self._loader.refresh()
