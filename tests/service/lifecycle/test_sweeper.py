"""What a sweep takes away, and what it leaves: on a registry and folders, without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.artifacts import LocalArtifactStore, TreeStore, open_trees
from adapters.registry import GalleryRecord, Registry, open_registry
from service.gallery.store import GalleryStore
from service.lifecycle.sweeper import SUPERSEDED, UNFINISHED, Sweeper, _needed_trees

DIGEST = f"sha256:{1:064x}"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = open_registry(tmp_path / "registry.sqlite")
    yield registry
    registry.close()


@pytest.fixture
def trees(tmp_path: Path) -> TreeStore:
    return open_trees(tmp_path / "shared")


@pytest.fixture
def sweeper(registry: Registry, trees: TreeStore, tmp_path: Path) -> Sweeper:
    galleries = GalleryStore(tmp_path / "galleries")
    return Sweeper("one", registry, LocalArtifactStore(tmp_path / "artifacts"), galleries, trees)


def added(registry: Registry, status: str = "ready", name: str = "clips") -> GalleryRecord:
    return registry.add_gallery_version(name, embedding_key="key", adapter=DIGEST, status=status)  # type: ignore[arg-type]


def status_of(registry: Registry, record: GalleryRecord) -> tuple[str, str | None]:
    (now,) = (r for r in registry.snapshot().galleries if r.key == record.key)
    return now.status, now.reason


def give_up(sweeper: Sweeper, registry: Registry, after_s: float) -> None:
    """A sweep of records as it would be when so much more than the grace period has passed."""
    sweeper._sweep_galleries(registry.snapshot(), registry.now() + after_s)


def test_a_version_whose_build_died_is_given_up(registry: Registry, sweeper: Sweeper) -> None:
    record = added(registry, "building")
    give_up(sweeper, registry, -60)
    assert status_of(registry, record) == ("building", None)
    give_up(sweeper, registry, 60)
    assert status_of(registry, record) == ("deleted", UNFINISHED)
    give_up(sweeper, registry, 120)
    assert status_of(registry, record) == ("deleted", UNFINISHED)


def test_a_version_that_a_job_may_be_building_stays(registry: Registry, sweeper: Sweeper) -> None:
    registry.start_job("build", "clips", job_id="job", adapter="find", arguments="{}")
    record, other = added(registry, "building"), added(registry, "building", "other")
    give_up(sweeper, registry, 60)
    assert [status_of(registry, each)[0] for each in (record, other)] == ["building", "deleted"]
    registry.abort_job("job", "enough")
    give_up(sweeper, registry, 60)
    assert status_of(registry, record) == ("deleted", UNFINISHED)


def test_superseded_versions_are_given_up_and_what_is_searched_or_newer_stays(
    registry: Registry, sweeper: Sweeper
) -> None:
    records = [added(registry) for _ in range(3)]
    registry.set_live_gallery("clips", 2)
    give_up(sweeper, registry, 60)
    assert [status_of(registry, record) for record in records] == [
        ("deleted", SUPERSEDED), ("ready", None), ("ready", None)
    ]  # fmt: skip


def test_a_tree_stays_as_long_as_a_version_needs_it(
    registry: Registry, sweeper: Sweeper, trees: TreeStore, tmp_path: Path
) -> None:
    digests = []
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "manifest.json").write_text(str(number))
        digests.append(trees.put_tree(tmp_path / f"{number}"))
    for digest in digests[:3]:
        record = added(registry, "building")
        registry.set_gallery_status("clips", record.version, "ready", tree=digest)
    registry.set_live_gallery("clips", 2)
    registry.set_gallery_status("clips", 1, "deleted", reason=SUPERSEDED)
    before = registry.now()
    registry.set_gallery_status("clips", 3, "deleted")
    sweeper.sweep(registry.snapshot())
    assert set(trees.digests()) == set(digests)  # each was put today
    sweeper._sweep_store(trees, _needed_trees, "tree", before)
    assert set(trees.digests()) == set(digests[1:3])
    sweeper._sweep_store(trees, _needed_trees, "tree", registry.now() + 60)
    assert trees.digests() == (digests[1],)
