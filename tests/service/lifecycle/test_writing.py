"""Packages written with a probe, and packages made elsewhere that are given one."""

import shutil
from pathlib import Path

import pytest

from adapters.errors import Conflict, InvalidPackage, MissingPart, ProbeFailed
from adapters.package import PROBE_FILE, Package, read_files, read_package, write_package
from adapters.probe import parse_probe
from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.lifecycle.writing import renew_probe, write_probed_package
from tests.service.lifecycle.packages import KINDS, package_of, zeroed
from tests.service.worlds import write_tiny_backbone


def written(folder: Path, package: Package) -> Path:
    """The package as another tool would write it: without a probe."""
    write_package(folder, package.config, package.tensors, "# Not ours\n", None)
    return folder


@pytest.mark.parametrize("name", ["vqa-kv", "retrieval-frames-kv-heads"])
def test_a_package_is_written_with_its_probe_and_twice_the_same(name: str, backbone: Backbone, tmp_path: Path) -> None:
    package = package_of(backbone, KINDS[name])
    one, two = (
        write_probed_package(tmp_path / folder, package.config, package.tensors, "card", backbone)
        for folder in ("one", "two")
    )
    assert one.path == tmp_path / "one"
    assert one.weights_digest == package.weights_digest
    assert one.package_digest == two.package_digest == read_package(tmp_path / "one").package_digest
    read = read_package(tmp_path / "one", dims=backbone.dims())
    assert read.probe is not None
    parse_probe(read.probe, read.config)
    assert (tmp_path / "one" / PROBE_FILE).stat().st_size < 8192


def test_nothing_is_written_when_a_part_is_dead_or_the_folder_is_taken(backbone: Backbone, tmp_path: Path) -> None:
    package = package_of(backbone, KINDS["vqa"])
    dead = zeroed(package, KINDS["vqa"].tensors_of("visual", backbone))
    with pytest.raises(ProbeFailed, match="visual"):
        write_probed_package(tmp_path / "dead", dead.config, dead.tensors, "", backbone)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(Conflict, match="taken"):
        write_probed_package(tmp_path / "taken", package.config, package.tensors, "", backbone)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_a_package_made_elsewhere_gets_a_probe_and_keeps_its_other_files(backbone: Backbone, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", package_of(backbone, KINDS["retrieval"]))
    before = read_files(folder)
    given = renew_probe(folder, backbone)
    after = read_files(folder)
    assert {name: after[name] for name in before} == before and PROBE_FILE in after
    assert (given.path, given.package_digest) == (folder, read_package(folder).package_digest)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


def test_a_probe_that_is_wrong_is_renewed_and_a_copy_leaves_the_original_alone(
    backbone: Backbone, tmp_path: Path
) -> None:
    package = package_of(backbone, KINDS["vqa"])
    good = write_probed_package(tmp_path / "good", package.config, package.tensors, "# Not ours\n", backbone)
    folder = written(tmp_path / "bad", package)
    other = write_probed_package(
        tmp_path / "other", package.config, package_of(backbone, KINDS["vqa"], seed=2).tensors, "", backbone
    )
    assert other.path is not None
    shutil.copy(other.path / PROBE_FILE, folder / PROBE_FILE)
    before = read_files(folder)
    copy = renew_probe(folder, backbone, tmp_path / "copy")
    assert read_files(folder) == before
    assert copy.path == tmp_path / "copy" and copy.package_digest == good.package_digest
    assert renew_probe(folder, backbone).package_digest == good.package_digest


def test_a_folder_named_by_a_dot_is_as_good(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "theirs", package_of(backbone, KINDS["vqa"]))
    monkeypatch.chdir(folder)
    renew_probe(Path(), backbone)
    assert read_package(folder).probe is not None


def test_what_is_no_package_of_this_backbone_gets_none(backbone: Backbone, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", package_of(backbone, KINDS["vqa"]))
    write_tiny_backbone(tmp_path / "other" / "backbone", with_heads=False)
    with pytest.raises(MissingPart, match="itm_head"):
        renew_probe(folder, load_backbone(tmp_path / "other" / "backbone"))
    dead = zeroed(package_of(backbone, KINDS["vqa"]), KINDS["vqa"].tensors_of("multimodal", backbone))
    lifeless = written(tmp_path / "dead", dead)
    with pytest.raises(ProbeFailed, match="multimodal"):
        renew_probe(lifeless, backbone)
    assert read_package(folder).probe is read_package(lifeless).probe is None
    with pytest.raises(InvalidPackage):
        renew_probe(tmp_path / "nothing", backbone)
