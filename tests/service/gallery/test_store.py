"""Versions on disk, open, and the folder of galleries: real files throughout."""

import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from adapters.artifacts import open_trees
from adapters.errors import DigestMismatch, InvalidPackage, InvalidReference, UnsafePath
from service.errors import GalleryBusy, GalleryNotFound, MissingMedia
from service.gallery import EmbeddedItem, Gallery, GalleryBuild, GalleryStore, Source, normalise, pool
from service.gallery.manifest import FileRecord
from tests.service.gallery.galleries import KEY, OTHER_KEY, a_plan, build_all, embedded, some_media

# --- a version ---


@pytest.mark.parametrize("index", ["flat", "hnsw"])
@pytest.mark.parametrize("shard_size", [3, 64])
def test_a_version_gives_back_what_went_in(tmp_path, index, shard_size):
    sources = some_media(tmp_path / "media")
    sources[2] = replace(sources[2], text="a caption", metadata={"year": 1999, "ü": ["x"]})
    path = build_all(tmp_path / "g", a_plan(index=index), sources, shard_size=shard_size)
    gallery = Gallery.open(path, verify=True)
    assert path == tmp_path / "g/clips/v1" and len(gallery) == 8
    assert gallery.manifest.version == 1 and gallery.manifest.num_items == 8 and gallery.manifest.dimension == 8
    assert gallery.ids == tuple(source.id for source in sources)
    assert (gallery.vectors.dtype, gallery.vectors.shape) == (np.float32, (8, 8))
    for position, source in enumerate(sources):
        made, item = embedded(source), gallery.item(position)
        frames, lengths = gallery.frames_of([position])
        np.testing.assert_array_equal(frames[0], made.frames)
        np.testing.assert_array_equal(gallery.vectors[position], pool(made.frames))
        assert lengths.tolist() == [gallery.lengths[position]] == [len(made.frames)]
        assert gallery.position_of(source.id) == position
        assert (item.id, item.text, item.metadata) == (source.id, source.text, dict(source.metadata))
        assert item.frame_times_s == tuple(made.frame_times_s) and item.duration_s == 2.5
        assert gallery.thumbnail(position) == made.thumbnail
        assert gallery.media_path(position) == source.file
    assert gallery.index.search(np.array(gallery.vectors[5:6]), 3).positions[0, 0] == 5
    media = [gallery.item(position).media for position in range(8)]
    assert gallery.sources() == [
        replace(source, sha256=one.sha256) for source, one in zip(sources, media, strict=True) if one is not None
    ]


def test_frames_of_pads_with_zeros(tmp_path):
    sources = some_media(tmp_path / "media")
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(), sources))
    frames, lengths = gallery.frames_of([6, 0, 6])
    assert frames.shape == (3, max(lengths), 8)
    for row, position in enumerate([6, 0, 6]):
        np.testing.assert_array_equal(frames[row, : lengths[row]], embedded(sources[position]).frames)
        assert not frames[row, lengths[row] :].any()
    assert gallery.frames_of([])[0].shape == (0, 0, 8)


def test_pictures_and_texts(tmp_path):
    pictures = some_media(tmp_path / "media", 3, ".png")
    with GalleryBuild(tmp_path / "g", a_plan("image", name="stills"), pictures) as build:
        for source in pictures:
            build.add(EmbeddedItem(source.id, np.ones((1, 4), np.float32)))
        stills = Gallery.open(build.finish())
    assert stills.lengths.tolist() == [1, 1, 1] and stills.item(0).frame_times_s == () and stills.thumbnail(0) is None

    texts = [Source(f"t{n}", "text", text=f"text {n}") for n in range(3)]
    vectors = normalise(np.random.default_rng(0).standard_normal((3, 4)))
    with GalleryBuild(tmp_path / "g", a_plan("text", name="texts"), texts) as build:
        for source, vector in zip(texts, vectors, strict=True):
            build.add(EmbeddedItem(source.id, vector=vector))
        gallery = Gallery.open(build.finish(), verify=True)
    np.testing.assert_array_equal(gallery.vectors, vectors)
    assert gallery.lengths.tolist() == [0, 0, 0] and gallery.frames.shape == (0, 4)
    assert gallery.item(2).text == "text 2" and gallery.item(2).media is None
    with pytest.raises(MissingMedia, match="is a text"):
        gallery.media_path(0)


def test_unknown_items_and_positions(tmp_path):
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media")))
    with pytest.raises(GalleryNotFound, match="no item 'nope'"):
        gallery.position_of("nope")
    for position in (-1, 8):
        with pytest.raises(IndexError):
            gallery.item(position)


# --- media ---


@pytest.mark.parametrize("copy", [False, True])
def test_missing_and_changed_media_are_noticed(tmp_path, copy):
    sources = some_media(tmp_path / "media")
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(copy_media=copy), sources))
    path = gallery.media_path(3)
    assert path.read_bytes() == sources[3].file.read_bytes()
    assert path.is_relative_to(gallery.path) == copy
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(MissingMedia, match="changed"):
        gallery.media_path(3)
    path.write_bytes(content + b"x")
    with pytest.raises(MissingMedia, match="changed"):
        gallery.media_path(3)
    path.write_bytes(content)
    assert gallery.media_path(3) == path
    path.unlink()
    with pytest.raises(MissingMedia, match="cannot be read"):
        gallery.media_path(3)
    path.mkdir()
    with pytest.raises(MissingMedia, match="regular file"):
        gallery.media_path(3)


def test_a_media_file_is_digested_once_while_it_stays_the_same(tmp_path, monkeypatch):
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media")))
    digested, record = [], FileRecord.of
    monkeypatch.setattr(FileRecord, "of", lambda path: digested.append(path) or record(path))
    assert gallery.media_path(3) == gallery.media_path(3)
    assert len(digested) == 1


def test_copies_survive_their_originals_and_equal_files_share_one(tmp_path):
    sources = some_media(tmp_path / "media")
    sources[1].file.write_bytes(sources[0].file.read_bytes())
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(copy_media=True), sources), verify=True)
    for source in sources:
        source.file.unlink()
    assert gallery.media_path(0) == gallery.media_path(1)
    assert len(list((gallery.path / "media").iterdir())) == 7
    again = build_all(tmp_path / "g", a_plan(copy_media=True, embedding_key=OTHER_KEY), gallery.sources())
    assert Gallery.open(again).media_path(7).read_bytes() == gallery.media_path(7).read_bytes()


def test_a_copy_that_is_a_link_out_of_the_gallery_is_refused(tmp_path):
    sources = some_media(tmp_path / "media")
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(copy_media=True), sources))
    path = gallery.media_path(0)
    path.unlink()
    path.symlink_to(sources[0].file)
    with pytest.raises(UnsafePath):
        gallery.media_path(0)


def rewrite_item(gallery, position, **changes):
    """Tamper with a version, sizes and digests included."""
    lines = (gallery.path / "items.jsonl").read_bytes().splitlines()
    item = json.loads(lines[position])
    item["media"].update(changes)
    lines[position] = json.dumps(item, separators=(",", ":")).encode()
    offsets = np.load(gallery.path / "offsets.npy")
    offsets[1] = np.cumsum([0, *(len(line) + 1 for line in lines)])
    np.save(gallery.path / "offsets.npy", offsets)
    (gallery.path / "items.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    manifest = json.loads((gallery.path / "manifest.json").read_bytes())
    manifest["files"]["items.jsonl"] = FileRecord.of(gallery.path / "items.jsonl").model_dump()
    (gallery.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("path", ["../../../secret.mp4", "media/../../secret.mp4", "/etc/passwd", "media/x"])
def test_a_copy_named_outside_the_gallery_is_refused(tmp_path, path):
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(copy_media=True), some_media(tmp_path / "media")))
    rewrite_item(gallery, 2, path=path)
    with pytest.raises(UnsafePath):
        Gallery.open(gallery.path).media_path(2)


def test_a_reference_without_an_absolute_path_is_refused(tmp_path):
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media")))
    rewrite_item(gallery, 2, path="clip.mp4")
    with pytest.raises(UnsafePath):
        Gallery.open(gallery.path).media_path(2)


# --- damage ---


@pytest.mark.parametrize("name", ["vectors.npy", "frames.npy", "offsets.npy", "ids.json", "items.jsonl", "index.faiss"])
def test_damaged_files_are_named(tmp_path, name):
    path = build_all(tmp_path / "g", a_plan(index="hnsw"), some_media(tmp_path / "media"))
    file = path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match=name):
        Gallery.open(path, verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(DigestMismatch, match=name):
        Gallery.open(path)
    file.unlink()
    with pytest.raises(DigestMismatch, match=name):
        Gallery.open(path)


def test_a_damaged_item_found_while_reading_is_a_typed_error(tmp_path):
    path = build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media"))
    content = (path / "items.jsonl").read_bytes()
    (path / "items.jsonl").write_bytes(b"}" + content[1:])
    with pytest.raises(DigestMismatch, match="damaged"):
        Gallery.open(path).item(0)


def test_verifying_covers_copied_media(tmp_path):
    path = build_all(tmp_path / "g", a_plan(copy_media=True), some_media(tmp_path / "media"))
    copy = next((path / "media").iterdir())
    copy.write_bytes(copy.read_bytes()[::-1])
    Gallery.open(path)
    with pytest.raises(DigestMismatch):
        Gallery.open(path, verify=True)


@pytest.mark.parametrize(
    "change",
    [
        {"num_items": 7},
        {"dimension": 9},
        {"kind": "text"},
        {"format_version": 2},
        {"version": "1"},
        {"unknown": 1},
        {"tau": 0},
        {"embedding_key": "x"},
        {"files": {"../evil": {"sha256": KEY, "size_bytes": 0}}},
        {"files": {}},
        {"num_items": 10**6},
        {"index": "hnsw"},
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, change):
    path = build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media"))
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(InvalidPackage):
        Gallery.open(path)


# --- the store ---


def test_the_store_lists_opens_and_deletes(tmp_path):
    store, sources = GalleryStore(tmp_path / "g"), some_media(tmp_path / "media", 2)
    assert store.names() == []
    for name in ("b", "a", "a"):
        build_all(store.root, a_plan(name=name), sources)
    (store.root / "Not A Name").mkdir()
    (store.root / "empty").mkdir()
    assert store.names() == ["a", "b"] and store.versions("a") == [1, 2] and store.latest("a") == 2
    gallery = store.open("a", 1)
    assert store.open("a", 1) is gallery and gallery.manifest.version == 1
    store.delete("a", 1)
    assert store.versions("a") == [2]
    assert gallery.item(1).id == "clip1.mp4"  # whoever holds it keeps it
    with pytest.raises(GalleryNotFound, match="no version 1; known: 2"):
        store.open("a", 1)
    with pytest.raises(GalleryNotFound):
        store.delete("a", 1)
    store.delete("a", 2)
    assert store.names() == ["b"]
    assert sorted(path.name for path in (store.root / "a").iterdir()) == [".last-version", ".lock"]


def test_an_unknown_gallery_lists_at_most_twenty_names(tmp_path):
    store = GalleryStore(tmp_path)
    with pytest.raises(GalleryNotFound, match="there are none"):
        store.versions("clips")
    for number in range(25):
        folder = tmp_path / f"g{number:02}/v1"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    with pytest.raises(GalleryNotFound, match=r"known: g00, g01.* g19 and 5 more"):
        store.latest("clips")
    for name in ("../etc", "A", "", "a/b"):
        with pytest.raises(InvalidReference):
            store.versions(name)


def test_threads_opening_one_version_share_one_instance(tmp_path, monkeypatch):
    store = GalleryStore(tmp_path / "g")
    build_all(store.root, a_plan(), some_media(tmp_path / "media", 2))
    opened, real = [], Gallery.open
    monkeypatch.setattr(Gallery, "open", lambda path: opened.append(path) or real(path))
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.open("clips", 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and len({id(gallery) for gallery in found}) == 1 and len(found) == 8
    store.release("clips", 1)
    assert store.open("clips", 1) is not found[0]


def test_the_store_builds(tmp_path):
    store, sources = GalleryStore(tmp_path / "g"), some_media(tmp_path / "media", 2)
    with store.build(a_plan(), sources) as build:
        with pytest.raises(GalleryBusy):
            store.build(a_plan(), sources)
        for source in build.pending():
            build.add(embedded(source))
        assert build.finish() == store.open("clips", store.latest("clips")).path


@pytest.mark.parametrize("copy_media", [False, True])
def test_the_digest_of_a_version_s_folder_is_known_without_reading_it(tmp_path, copy_media):
    sources = some_media(tmp_path / "media", 3)
    with GalleryBuild(tmp_path / "g", a_plan(copy_media=copy_media, index="hnsw"), sources) as build:
        for source in sources:
            build.add(embedded(source))
        (tmp_path / "g" / "clips").glob(".build-*").__next__().joinpath("media", "copy.tmp").write_bytes(b"left behind")
        path = build.finish()
    trees = open_trees(tmp_path / "trees")
    assert Gallery.open(path).tree_digest == trees.put_tree(path)
    assert ("media" in {file.parent.name for file in path.rglob("*")}) == copy_media
