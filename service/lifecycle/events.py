"""What operators hear of the registry: a line in the log for each change of it, and counts of what moves what is served.

Every replica tells of every change, whoever made it, a command on the same home included: once, when it learns of it.
"""

import logging
from collections.abc import Sequence

from adapters.registry import AuditRecord, RolloutRecord, Snapshot
from service.logs import event
from service.metrics import Metrics

log = logging.getLogger(__name__)

COUNTED_FROM_ZERO = ("promote", "rollback")  # what alerts ask for; of the rest a first one may go unseen
TOLD_OTHERWISE = ("start_rollout", "abort_rollout", "roll_back")  # as what became of the rollout
BAD_NEWS = ("restore", "build_failed", "rebuild_failed")


class RegistryEvents:
    """Tells of the changes of one registry. Any thread."""

    def __init__(self, snapshot: Snapshot, metrics: Metrics) -> None:
        """`snapshot` is where it begins: of what led there it does not tell."""
        self._metrics = metrics
        self._count_from_zero(snapshot)

    def tell(self, before: Snapshot, after: Snapshot, lines: Sequence[AuditRecord]) -> None:
        """A registry's listener; see `Registry.on_change`."""
        self._count_from_zero(after)
        rollouts = [rollout for rollout in after.rollouts if _phase_of(before, rollout.id) != rollout.phase]
        for rollout in rollouts:
            self._tell_rollout(rollout)
        moved = {(f"{r.name}@{r.alias}", r.updated_at) for r in rollouts if r.phase == "committed"}
        for line in lines:
            if line.action == "end_canary":
                self._tell_move("end_canary", line.subject, line.before, line.after, line.actor, line.reason)
            elif line.action == "set_alias":
                if (line.subject, line.at) not in moved:  # else it is the commit of that rollout
                    self._tell_move("set", line.subject, line.before, line.after, line.actor, line.reason)
            elif line.action not in TOLD_OTHERWISE:
                _tell_change(line)

    def _count_from_zero(self, snapshot: Snapshot) -> None:
        """So that the first move of an alias is seen as one: a series that begins at 1 never rose."""
        for alias in snapshot.aliases:
            for action in COUNTED_FROM_ZERO:
                self._metrics.alias_moves.labels(alias.name, alias.alias, action)

    def _tell_rollout(self, rollout: RolloutRecord) -> None:
        subject = f"{rollout.name}@{rollout.alias}"
        if not rollout.is_rollback:
            _log_phase(rollout)
            if not rollout.is_active:
                seconds = max(0.0, rollout.updated_at - rollout.started_at)
                self._metrics.rollout_seconds.labels(rollout.phase).observe(seconds)
        if rollout.phase == "committed":
            action = "rollback" if rollout.is_rollback else "promote" if rollout.traffic is None else "start_canary"
            before, after = rollout.from_version, rollout.to_version
            self._tell_move(action, subject, before, after, rollout.actor, rollout.reason, rollout)

    def _tell_move(
        self,
        action: str,
        subject: str,
        before: str | int | None,
        after: str | int | None,
        actor: str,
        reason: str | None,
        rollout: RolloutRecord | None = None,
    ) -> None:
        name, _, alias = subject.partition("@")
        self._metrics.alias_moves.labels(name, alias, action).inc()
        keys = event(
            "alias_moved",
            action=action,
            adapter=name,
            alias=alias,
            before=_number(before),
            after=_number(after),
            actor=actor,
            reason=reason,
            operation=rollout.id if rollout is not None else None,
            traffic=rollout.traffic if rollout is not None else None,
        )
        log.info("%s of %s: %s, by %s%s", action, subject, _step(before, after), actor, _because(reason), extra=keys)


def _phase_of(snapshot: Snapshot, rollout_id: str) -> str | None:
    rollout = snapshot.rollout(rollout_id)
    return None if rollout is None else rollout.phase


def _log_phase(rollout: RolloutRecord) -> None:
    keys = event(
        "rollout",
        operation=rollout.id,
        phase=rollout.phase,
        adapter=rollout.name,
        alias=rollout.alias,
        before=rollout.from_version,
        after=rollout.to_version,
        traffic=rollout.traffic,
        actor=rollout.actor,
        reason=rollout.error or rollout.reason,
        seconds=round(rollout.updated_at - rollout.started_at, 3),
    )
    log.log(
        logging.WARNING if rollout.phase == "aborted" else logging.INFO,
        "operation %s, %s@%s to version %d, is %s%s",
        rollout.id,
        rollout.name,
        rollout.alias,
        rollout.to_version,
        rollout.phase,
        _because(rollout.error or rollout.reason),
        extra=keys,
    )


def _tell_change(line: AuditRecord) -> None:
    is_bad = line.action in BAD_NEWS or (line.action == "validated" and line.after == "failed")
    keys = event(
        "registry_changed",
        action=line.action,
        subject=line.subject,
        before=line.before,
        after=line.after,
        actor=line.actor,
        reason=line.reason,
        generation=line.generation,
    )
    log.log(
        logging.WARNING if is_bad else logging.INFO,
        "%s %s: %s, by %s%s",
        line.action,
        line.subject,
        _step(line.before, line.after),
        line.actor,
        _because(line.reason),
        extra=keys,
    )


def _step(before: str | int | None, after: str | int | None) -> str:
    return " -> ".join("nothing" if each is None else str(each) for each in (before, after))


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _number(version: str | int | None) -> int | None:
    """The version of an audit line, which may read "2 for 5 % of the traffic"."""
    number = str(version).partition(" ")[0]
    return int(number) if number.isdecimal() else None
