"""What the command line does to a home folder without a server: register packages, build galleries."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from adapters.config import check_name
from adapters.errors import Conflict, RankTooLarge
from adapters.families import family_of
from adapters.package import check_backbone, read_package
from adapters.registry import DEFAULT_ALIAS, GalleryRecord, PackageInfo, VersionRecord
from service.backbone.folder import load_manifest
from service.bank import DEFAULT_BUCKETS
from service.config import Settings
from service.folders import open_registry
from service.gallery.sources import Source
from service.loader import check_fit
from service.pipelines.galleries import BuildOptions, BuildProgress
from service.runtime import Runtime, open_artifacts
from service.types import RequestContext

BUILD_TIMEOUT_S = 7 * 24 * 3600.0


def push_package(settings: Settings, folder: Path, name: str) -> VersionRecord:
    """Check a package (against the home's backbone where there is one), store it, register it, alias it if first.

    Raises: InvalidPackage and its kinds, BackboneMismatch, RankTooLarge, InvalidReference, ArtifactUnavailable.
    """
    check_name(name)
    package = read_package(folder)
    rank = family_of(package.config.family).slot_rank(package.config)
    kind = package.config.backbone.architecture
    widest = max(rank for rank, _ in settings.slot_buckets(kind) or DEFAULT_BUCKETS[kind])
    if rank > widest:
        raise RankTooLarge(f"rank {rank} is above the largest slot bucket, {widest}", param="rank")
    manifests = [
        load_manifest(folder) for folder in settings.backbone_folders.values() if (folder / "backbone.json").is_file()
    ]
    alike = [manifest for manifest in manifests if manifest.config.architecture == kind]
    if manifests:
        backbone = next((m for m in alike if package.config.backbone.parts.items() <= m.parts.items()), None)
        backbone = backbone or (alike or manifests)[0]
        check_backbone(package.config, backbone.parts)
        check_fit(package.config, backbone.config)
    registry = open_registry(settings)
    try:
        open_artifacts(settings).put(folder)
        record = registry.add_version(name, PackageInfo.of(package), actor="cli")
        if DEFAULT_ALIAS not in registry.snapshot().aliases_of(name):
            with suppress(Conflict):  # somebody else was first, which is as good
                registry.set_alias(name, DEFAULT_ALIAS, record.version, expect=None, actor="cli")
        return record
    finally:
        registry.close()


async def build_gallery(
    settings: Settings,
    name: str,
    adapter: str,
    sources: list[Source],
    options: BuildOptions,
    report: Callable[[BuildProgress], None] | None = None,
) -> GalleryRecord:
    """Build a gallery with an engine of this process's own."""
    runtime = Runtime(settings)
    try:
        await runtime.start()
        context = RequestContext(deadline=time.monotonic() + BUILD_TIMEOUT_S, client="cli", background=True)
        return await runtime.galleries.build(name, adapter, sources, options, context, report)
    finally:
        await runtime.close()
