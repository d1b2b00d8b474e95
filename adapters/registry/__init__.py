"""The registry: names, versions, aliases, galleries and rollouts."""

from adapters.registry.memory import Memory
from adapters.registry.opening import open_registry
from adapters.registry.records import (
    AliasRecord,
    AuditRecord,
    Canary,
    GalleryHead,
    GalleryRecord,
    JobRecord,
    PackageInfo,
    Replica,
    Revision,
    RolloutRecord,
    Snapshot,
    VersionRecord,
)
from adapters.registry.references import (
    DEFAULT_ALIAS,
    AliasReference,
    BaseReference,
    DigestReference,
    Reference,
    VersionReference,
    parse_reference,
)
from adapters.registry.registry import Registry
from adapters.registry.rules import UNSET, Expect

__all__ = [
    "DEFAULT_ALIAS",
    "UNSET",
    "AliasRecord",
    "AliasReference",
    "AuditRecord",
    "BaseReference",
    "Canary",
    "DigestReference",
    "Expect",
    "GalleryHead",
    "GalleryRecord",
    "JobRecord",
    "Memory",
    "PackageInfo",
    "Reference",
    "Registry",
    "Replica",
    "Revision",
    "RolloutRecord",
    "Snapshot",
    "VersionRecord",
    "VersionReference",
    "open_registry",
    "parse_reference",
]
