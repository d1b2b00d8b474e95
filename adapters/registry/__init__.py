"""The registry: names, versions, aliases and galleries."""

from adapters.registry.base import (
    UNSET,
    AliasRecord,
    AliasReference,
    AuditRecord,
    BaseReference,
    DigestReference,
    GalleryRecord,
    PackageInfo,
    Reference,
    Registry,
    Revision,
    Snapshot,
    VersionRecord,
    VersionReference,
    parse_reference,
)
from adapters.registry.sqlite import SqliteRegistry

__all__ = [
    "UNSET",
    "AliasRecord",
    "AliasReference",
    "AuditRecord",
    "BaseReference",
    "DigestReference",
    "GalleryRecord",
    "PackageInfo",
    "Reference",
    "Registry",
    "Revision",
    "Snapshot",
    "SqliteRegistry",
    "VersionRecord",
    "VersionReference",
    "parse_reference",
]
