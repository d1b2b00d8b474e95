"""The registry as one principal may see it: a snapshot without the records of adapters it may not use.

What is resolved, listed or suggested from a view can only be what the principal may see, in error messages too.
"""

from dataclasses import replace

from adapters.config import BASE_ADAPTER
from adapters.registry import GalleryHead, GalleryRecord, Snapshot
from service.auth import Principal

MAX_VIEWS = 256


def may_see_gallery(principal: Principal, record: GalleryRecord) -> bool:
    """Whether a gallery version was embedded with an adapter that may be used; by name, for others may share its weights.

    One whose adapter's name nobody wrote down is for those who may use every adapter.
    """
    if principal.sees_all:
        return True
    name = BASE_ADAPTER if record.adapter == BASE_ADAPTER else record.adapter_name
    return name is not None and principal.allows(name)


def visible(snapshot: Snapshot, principal: Principal) -> Snapshot:
    """A snapshot without what the principal may not see; leases are nobody's but the servers'."""
    if principal.sees_all:
        return snapshot
    galleries = tuple(record for record in snapshot.galleries if may_see_gallery(principal, record))
    seen = {(record.name, record.version) for record in galleries}
    return replace(
        snapshot,
        versions=tuple(record for record in snapshot.versions if principal.allows(record.name)),
        aliases=tuple(record for record in snapshot.aliases if principal.allows(record.name)),
        galleries=galleries,
        heads=tuple(head for head in snapshot.heads if (head.name, head.live) in seen and _may_follow(principal, head)),
        rollouts=tuple(record for record in snapshot.rollouts if principal.allows(record.name)),
        leases=(),
        jobs=tuple(record for record in snapshot.jobs if principal.allows(record.adapter)),
    )


def _may_follow(principal: Principal, head: GalleryHead) -> bool:
    return head.follows is None or principal.allows(head.follows.partition("@")[0])


class Views:
    """Views of the latest snapshot, each made once for all principals with the same patterns."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._views: dict[tuple[str, ...], Snapshot] = {}

    def of(self, snapshot: Snapshot, principal: Principal) -> Snapshot:
        """As `visible`."""
        if principal.sees_all:
            return snapshot
        if snapshot is not self._snapshot or len(self._views) >= MAX_VIEWS:
            self._snapshot, self._views = snapshot, {}
        view = self._views.get(principal.adapters)
        if view is None:
            view = self._views[principal.adapters] = visible(snapshot, principal)
        return view
