"""The manifest: the same bytes for the same files, and nothing in it is believed that its digest does not cover."""

import json
import os
from pathlib import Path

import pytest

from adapters.artifacts.manifest import FileRecord, Manifest, check_file_name, sha256, tree_files, tree_manifest
from adapters.errors import DigestMismatch, InvalidPackage, UnsafePath
from adapters.package import files_digest

FILES = {"a": b"1", "b/c": b"22"}
RECORDS = {name: FileRecord(size_bytes=len(data), sha256=sha256(data)) for name, data in FILES.items()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_manifest_lists_name_size_and_digest_of_each_file() -> None:
    manifest = Manifest.of_package(FILES)
    assert manifest.digest == files_digest(FILES)
    assert json.loads(manifest.dump()) == {
        "format_version": 1,
        "digest": manifest.digest,
        "files": {"a": {"size_bytes": 1, "sha256": sha256(b"1")}, "b/c": {"size_bytes": 2, "sha256": sha256(b"22")}},
    }
    assert Manifest.parse(manifest.dump(), manifest.digest) == manifest


def test_the_digest_of_a_tree_is_that_of_its_files_in_whatever_order() -> None:
    manifest = Manifest.of_tree(RECORDS)
    assert Manifest.of_tree(dict(reversed(RECORDS.items()))).dump() == manifest.dump()
    manifest.check_tree()
    for changed in (
        {**RECORDS, "d": RECORDS["a"]},
        {"a": RECORDS["a"]},
        {"a": RECORDS["a"], "b": RECORDS["b/c"]},
        {**RECORDS, "a": RECORDS["b/c"]},
    ):
        assert Manifest.of_tree(changed).digest != manifest.digest
        with pytest.raises(DigestMismatch, match="its files have the digest"):
            manifest.model_copy(update={"files": changed}).check_tree()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:-1],
        lambda text: b"\xff" + text,
        lambda text: text.replace(b'"a"', b'"../a"'),
        lambda text: text.replace(b'"a"', b'"/etc/passwd"'),
        lambda text: text.replace(b'"a"', b'"b/../../a"'),
        lambda text: text.replace(b'"size_bytes":1', b'"size_bytes":-1'),
        lambda text: text.replace(b'"format_version":1', b'"format_version":2'),
        lambda text: text.replace(b"sha256:", b"md5:"),
        lambda text: text.replace(b'"files"', b'"more":1,"files"'),
        lambda text: b'{"digest":"sha256:' + b"0" * 64 + b'","files":{},"format_version":1}',
    ],
)
def test_a_manifest_that_is_none_is_damage(damage) -> None:  # type: ignore[no-untyped-def]
    manifest = Manifest.of_tree(RECORDS)
    with pytest.raises(DigestMismatch, match=f"manifest of artifact {manifest.digest} is damaged"):
        Manifest.parse(damage(manifest.dump()), manifest.digest)


def test_the_manifest_of_another_artifact_is_damage() -> None:
    manifest, other = Manifest.of_tree(RECORDS), Manifest.of_tree({"a": RECORDS["a"]})
    with pytest.raises(DigestMismatch, match=f"that of {other.digest}"):
        Manifest.parse(other.dump(), manifest.digest)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "./a", "a\\b", "a\nb", "a\0", "\udcff"]
)
def test_names_that_leave_their_folder_or_cannot_be_written_are_refused(name: str) -> None:
    with pytest.raises(UnsafePath):
        check_file_name(name)


@pytest.mark.parametrize("name", ["a", ".hidden", "a b", "...", "ä/ö.jpg", "a*b?[c]#%20", "~"])
def test_other_names_are_not(name: str) -> None:
    assert check_file_name(name) == name


def test_the_files_of_a_folder_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    write(tmp_path, {"z": b"", "b/c/d": b"", "b/a": b"", "a": b""})
    (tmp_path / "empty").mkdir()
    assert list(tree_files(tmp_path)) == ["a", "b/a", "b/c/d", "z"]


def test_the_manifest_of_a_folder(tmp_path: Path) -> None:
    manifest, stamps = tree_manifest(write(tmp_path / "tree", FILES))
    assert manifest == Manifest.of_tree(RECORDS)
    assert {name: stamp.size_bytes for name, stamp in stamps.items()} == {"a": 1, "b/c": 2}
    with pytest.raises(InvalidPackage, match="No such file"):
        tree_manifest(tmp_path / "nothing")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(InvalidPackage, match="holds no file"):
        tree_manifest(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "odd name"])
def test_links_devices_and_odd_names_are_refused(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", FILES)
    match kind:
        case "link":
            (folder / "b" / "x").symlink_to(folder / "a")
        case "folder link":
            (folder / "x").symlink_to(folder / "b")
        case "pipe":
            os.mkfifo(folder / "x")
        case "odd name":
            (folder / "x\ny").write_text("")
    with pytest.raises(UnsafePath):
        tree_manifest(folder)
