"""The file helpers under galleries."""

import hashlib
from contextlib import suppress

import numpy as np
import pytest

from service.errors import GalleryBusy
from service.gallery import files


def test_equal_data_is_one_json_whatever_the_order_of_keys():
    assert files.canonical_json({"b": [1, None], "a": "ü"}) == '{"a":"ü","b":[1,null]}'.encode()
    for data in (float("nan"), float("inf"), "\ud800"):
        with pytest.raises(ValueError):
            files.canonical_json(data)


def test_a_file_has_the_digest_of_its_bytes(tmp_path):
    content = b"x" * 3_000_000
    (tmp_path / "f").write_bytes(content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert files.digest_file(tmp_path / "f") == (digest, len(content))
    assert files.digest_of(content) == digest


def test_a_stamp_tells_a_file_from_none_and_a_regular_one_from_a_folder(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert files.stamp(tmp_path / "f") == files.regular_stamp(tmp_path / "f")
    assert files.stamp(tmp_path / "f")[0] == 3
    assert files.stamp(tmp_path / "gone") != files.stamp(None)
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError):
            files.regular_stamp(path)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, synced):
    path = tmp_path / "f"
    files.write_file(path, b"old")
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    with suppress(ZeroDivisionError), files.written_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"


def test_a_lock_is_held_by_one_until_it_is_closed(tmp_path):
    with files.locked(tmp_path / ".lock", "clips"):
        with pytest.raises(GalleryBusy, match="clips"):
            files.locked(tmp_path / ".lock", "clips")
    files.locked(tmp_path / ".lock", "clips").close()


def test_versions_are_whole_folders_and_numbers_outlive_them(tmp_path):
    assert files.version_numbers(tmp_path / "absent") == []
    assert files.highest_version(tmp_path) == 0
    for name in ("v2", "v10", "v03", "v0", "vx", ".build-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "v11").mkdir()
    assert files.version_numbers(tmp_path) == [2, 10]
    files.record_highest_version(tmp_path)
    (tmp_path / "v10/manifest.json").unlink()
    assert files.version_numbers(tmp_path) == [2]
    assert files.highest_version(tmp_path) == 10


def test_arrays_come_back_from_disk_and_others_are_refused(tmp_path):
    written = files.new_array(tmp_path / "a.npy", (3, 2))
    written[:] = np.arange(6).reshape(3, 2)
    written.flush()
    np.testing.assert_array_equal(files.mapped_array(tmp_path / "a.npy"), [[0, 1], [2, 3], [4, 5]])
    for array in (np.zeros((3, 2)), np.zeros(3, np.float32)):
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(ValueError, match=r"b\.npy"):
            files.mapped_array(tmp_path / "b.npy")


def test_bytes_come_back_from_disk_even_if_there_are_none(tmp_path):
    for content in (b"abc", b""):
        (tmp_path / "f").write_bytes(content)
        assert files.mapped_bytes(tmp_path / "f").tobytes() == content
