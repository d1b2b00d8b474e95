"""A gallery version as an artifact: a real one, put elsewhere and fetched back, opens and is the same."""

import shutil

import numpy as np
import pytest

from adapters.artifacts import open_trees
from adapters.errors import DigestMismatch
from adapters.registry import GalleryRecord
from service.errors import GalleryDamaged
from service.gallery import Gallery
from service.gallery.store import GalleryStore
from service.gallery.trees import GalleryTrees
from tests.service.gallery.galleries import a_plan, build_all, some_media


@pytest.fixture(params=["flat", "hnsw"])
def version(request, tmp_path):
    """The folder of a version with copies of its media."""
    return build_all(
        tmp_path / "galleries", a_plan(index=request.param, copy_media=True), some_media(tmp_path / "media", 12)
    )


def every_file(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_gallery_version_comes_back_as_it_was(version, tmp_path):
    trees = open_trees(f"file://{tmp_path}/elsewhere")
    digest = trees.put_tree(version)
    files = every_file(version)
    before = Gallery.open(version, verify=True)
    trees.fetch_tree(digest, tmp_path / "other" / "clips" / "v7")
    assert every_file(tmp_path / "other" / "clips" / "v7") == files
    after = Gallery.open(tmp_path / "other" / "clips" / "v7", verify=True)
    assert after.digest == before.digest
    assert np.array_equal(after.vectors, before.vectors)
    assert after.item(3) == before.item(3)
    assert after.media_path(3).read_bytes() == before.media_path(3).read_bytes()


def test_it_survives_the_loss_of_the_home(version, tmp_path):
    trees = open_trees(f"file://{tmp_path}/elsewhere")
    digest = trees.put_tree(version)
    files = every_file(version)
    shutil.rmtree(tmp_path / "galleries")
    trees.fetch_tree(digest, version)
    assert every_file(version) == files
    Gallery.open(version, verify=True)


def a_record(tree=None):
    return GalleryRecord("clips", 7, 1, "key", "sha256:0", "find", 1, "ready", None, 0.0, 0.0, tree)


def test_what_was_opened_is_had_without_the_disk(tmp_path):
    folder = build_all(tmp_path / "galleries", a_plan(), some_media(tmp_path / "media", 3), version=7)
    trees = GalleryTrees(GalleryStore(tmp_path / "galleries"), open_trees(f"file://{tmp_path}/elsewhere"))
    record = a_record(open_trees(f"file://{tmp_path}/elsewhere").put_tree(folder))
    assert trees.if_open(record) is None
    assert trees.if_open(a_record()) is None
    gallery = trees.open(a_record())
    assert trees.if_open(a_record()) is gallery
    assert trees.if_open(record) is None, "its folder was not compared yet"
    assert trees.open(record) is gallery
    shutil.rmtree(folder)
    assert trees.if_open(record) is gallery
    with pytest.raises(GalleryDamaged, match="another version than the registry's"):
        trees.if_open(a_record("sha256:" + "1" * 64))


def test_vectors_that_were_changed_elsewhere_do_not_come_back(version, tmp_path):
    trees = open_trees(f"file://{tmp_path}/elsewhere")
    digest = trees.put_tree(version)
    (vectors,) = (tmp_path / "elsewhere").rglob("vectors.npy")
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1
    vectors.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"vectors\.npy"):
        trees.fetch_tree(digest, tmp_path / "v7")
    assert not (tmp_path / "v7").exists()
