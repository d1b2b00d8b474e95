"""Sources, resumable builds, versions on disk and the folder of galleries: real files throughout."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import service.gallery.store as store_module
from adapters.config import Preprocessing
from adapters.errors import (
    Conflict,
    ConversionError,
    DigestMismatch,
    InvalidPackage,
    InvalidReference,
    NonFiniteTensor,
    UnsafePath,
)
from service.errors import CorruptMedia, GalleryBusy, GalleryNotFound, MissingMedia
from service.gallery import (
    EmbeddedBy,
    EmbeddedItem,
    Gallery,
    GalleryBuild,
    GalleryPlan,
    GalleryStore,
    Source,
    check_item_id,
    embedding_key,
    frame_attention_weights,
    normalise,
    pool,
    read_sources,
)

KEY = f"sha256:{'1' * 64}"
OTHER_KEY = f"sha256:{'2' * 64}"


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Inodes in the order they were synced. Nothing really waits for the disk: the machine does not lose power here."""
    inodes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: inodes.append(os.fstat(descriptor).st_ino))
    return inodes


def a_plan(kind="video", **changes):
    fields = {
        "name": "clips",
        "kind": kind,
        "embedding_key": KEY,
        "adapter": EmbeddedBy(name="msrvtt", version=3, weights_digest=f"sha256:{'a' * 64}"),
        "preprocessing": Preprocessing(resolution=32, num_frames=4),
    }
    return GalleryPlan(**{**fields, **changes})


def some_media(folder, count=8, suffix=".mp4"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"clip{number}{suffix}").write_bytes(b"media %d" % number * (number + 1))
    return read_sources(folder)


def embedded(source, dimension=8):
    """Reproducible features of 1 to 4 frames for a clip."""
    seed = sum(source.id.encode())
    frames = np.random.default_rng(seed).standard_normal((1 + seed % 4, dimension)).astype(np.float32) * 4
    times = [0.5 * step for step in range(len(frames))]
    thumbnail = None if seed % 3 == 0 else b"\xff\xd8" + source.id.encode()
    return EmbeddedItem(source.id, frames, frame_times_s=times, duration_s=2.5, thumbnail=thumbnail)


def build_all(root, plan, sources, version=None, **options):
    with GalleryBuild(root, plan, sources, **options) as build:
        for source in build.pending():
            build.add(embedded(source))
        return build.finish(version)


def contents(path):
    """Every file of a version except what says when it was made."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()} | {
        "manifest.json": b""
    }


# --- sources ---


def test_a_folder_gives_its_media_sorted_by_relative_path(tmp_path):
    for name in ("b.MP4", "a/z.webm", "a/é.mkv", ".hidden.mp4", ".git/x.mp4", "note.txt", "still.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [source.id for source in read_sources(tmp_path, "video")] == ["a/z.webm", "a/é.mkv", "b.MP4"]
    assert [source.file for source in read_sources(tmp_path, "image")] == [tmp_path / "still.png"]
    with pytest.raises(ConversionError, match="image and video"):
        read_sources(tmp_path)
    with pytest.raises(ConversionError, match="nothing"):
        read_sources(tmp_path, "text")


def write_manifest(tmp_path, *lines):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_manifest_gives_files_relative_to_its_folder_with_ids_captions_and_metadata(tmp_path):
    path = write_manifest(
        tmp_path,
        {"file": "./sub/a.jpg", "caption": "a red ball"},
        "",
        {"id": "second", "file": "/data/b.png", "metadata": {"tags": ["x", 1]}},
    )
    assert read_sources(path) == [
        Source("sub/a.jpg", "image", tmp_path / "sub/a.jpg", "a red ball"),
        Source("second", "image", Path("/data/b.png"), None, {"tags": ["x", 1]}),
    ]


def test_texts_are_named_by_their_line(tmp_path):
    sources = read_sources(write_manifest(tmp_path, {"text": "a dog"}, {"text": "a cat", "id": "cat"}))
    assert [(source.id, source.kind, source.text) for source in sources] == [
        ("1", "text", "a dog"),
        ("cat", "text", "a cat"),
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "EOF"),
        ("[]", "object"),
        ({"file": "a.mp4", "txet": 1}, "txet"),
        ({"id": "x"}, "either"),
        ({"file": "a.mp4", "text": "b"}, "either"),
        ({"file": "a.exe"}, "extension"),
        ({"file": "a\0.mp4"}, "extension"),
        ({"file": "a.mp4", "id": "tab\there"}, "control"),
        ({"file": "a.mp4", "id": ""}, "1 to 200"),
        ({"file": "a.mp4", "id": 5}, "id"),
        ({"text": "  "}, "empty"),
        ({"text": "x", "caption": "y"}, "caption"),
        ('{"file": "a.mp4", "metadata": {"x": NaN}}', "JSON"),
        ('{"file": "a.mp4", "metadata": {"x": "\\ud800"}}', "JSON"),
        ('{"file": "a.mp4", "metadata": ' + '{"x":' * 5000 + "1" + "}" * 5001, "recursion"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, reason):
    path = write_manifest(tmp_path, {"file": "fine.mp4"}, line)
    with pytest.raises(ConversionError, match=rf"items\.jsonl line 2: .*{reason}"):
        read_sources(path)


def test_two_sources_with_one_id_are_both_named(tmp_path):
    path = write_manifest(tmp_path, {"file": "a.mp4"}, {"file": "b.mp4"}, {"file": "c.mp4", "id": "a.mp4"})
    with pytest.raises(ConversionError, match=r"line 1 and .*line 3 both have the id 'a.mp4'"):
        read_sources(path)
    with pytest.raises(ConversionError, match="neither"):
        read_sources(tmp_path / "absent")
    with pytest.raises(ConversionError, match="image and video"):
        read_sources(write_manifest(tmp_path, {"file": "a.mp4"}, {"file": "b.png"}))


@pytest.mark.parametrize("item_id", ["x", "../../etc/passwd", "ひらがな 👩‍👩‍👧", "a" * 200, "%2e?&#"])
def test_item_ids_are_any_text(item_id):
    assert check_item_id(item_id) == item_id


@pytest.mark.parametrize("item_id", ["", "a" * 201, "a\n", "\x7f", "\u2028", "\ud800", "\0"])
def test_item_ids_hold_no_control_characters(item_id):
    with pytest.raises(InvalidReference):
        check_item_id(item_id)


# --- embedding key ---


def test_the_embedding_key_changes_with_every_ingredient_and_not_with_order():
    ingredients = {
        "parts": {"vision": "sha256:1", "text": "sha256:2"},
        "weights_digest": "sha256:3",
        "preprocessing": {"resolution": 384},
        "frame_sampling": "uniform",
        "pooling": {"kind": "mean", "tau": 0.1},
        "numerics": "1",
    }
    key = embedding_key(**ingredients)
    assert key.startswith("sha256:") and len(key) == 71
    assert embedding_key(**{**ingredients, "parts": {"text": "sha256:2", "vision": "sha256:1"}}) == key
    changes = [{"x": "y"}, "sha256:4", {"resolution": 480}, "dense", {"kind": "mean", "tau": 0.2}, "2"]
    others = {embedding_key(**{**ingredients, name: value}) for name, value in zip(ingredients, changes, strict=True)}
    assert len(others | {key}) == 7


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
    assert gallery.sources() == sources


def test_frames_of_pads_with_zeros(tmp_path):
    sources = some_media(tmp_path / "media")
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(), sources))
    frames, lengths = gallery.frames_of([6, 0, 6])
    assert frames.shape == (3, max(lengths), 8)
    for row, position in enumerate([6, 0, 6]):
        np.testing.assert_array_equal(frames[row, : lengths[row]], embedded(sources[position]).frames)
        assert not frames[row, lengths[row] :].any()
    assert gallery.frames_of([])[0].shape == (0, 0, 8)


def test_the_order_is_the_sources_whatever_the_order_of_adding(tmp_path):
    sources = some_media(tmp_path / "media")
    straight = build_all(tmp_path / "a", a_plan(), sources)
    with GalleryBuild(tmp_path / "b", a_plan(), sources, shard_size=3) as build:
        for source in reversed(sources):
            build.add(embedded(source))
        shuffled = build.finish()
    assert contents(straight) == contents(shuffled)


def test_frame_attention_pooling_uses_the_recorded_tau(tmp_path):
    sources = some_media(tmp_path / "media")
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(pooling="frame_attention", tau=0.25), sources))
    frames = embedded(sources[1]).frames
    np.testing.assert_array_equal(gallery.vectors[1], pool(frames, frame_attention_weights(frames, 0.25)))
    assert gallery.manifest.tau == 0.25


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
    digested, record = [], store_module._record
    monkeypatch.setattr(store_module, "_record", lambda path: digested.append(path) or record(path))
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
    manifest["files"]["items.jsonl"] = store_module._record(gallery.path / "items.jsonl").model_dump()
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


def test_a_manifest_survives_its_file(tmp_path):
    path = build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media"))
    manifest = Gallery.open(path).manifest
    assert type(manifest).parse(manifest.model_dump_json().encode()) == manifest
    assert {"vectors.npy", "frames.npy", "items.jsonl"} <= manifest.files.keys()


# --- building ---


def test_quarantined_sources_are_left_out_and_listed(tmp_path):
    sources = some_media(tmp_path / "media")
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        for source in sources:
            if source.id in ("clip2.mp4", "clip5.mp4"):
                build.quarantine(source.id, CorruptMedia("the clip cannot be decoded: \ud800" + "x" * 5000))
            else:
                build.add(embedded(source))
        gallery = Gallery.open(build.finish())
    assert len(gallery) == 6 and gallery.manifest.num_quarantined == 2 and "clip2.mp4" not in gallery.ids
    assert [(entry.source, entry.code) for entry in gallery.quarantined()] == [
        ("clip2.mp4", "corrupt_media"),
        ("clip5.mp4", "corrupt_media"),
    ]
    assert len(gallery.quarantined()[0].message) == 500


def test_a_gallery_of_nothing_but_quarantine_is_refused_with_a_reason(tmp_path):
    sources = some_media(tmp_path / "media", 2)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        for source in sources:
            build.quarantine(source.id, MissingMedia("it is gone"))
        with pytest.raises(ConversionError, match=r"clip0\.mp4.*it is gone"):
            build.finish()


def test_a_build_that_stops_goes_on_where_it_was(tmp_path):
    sources = some_media(tmp_path / "media")
    with GalleryBuild(tmp_path / "g", a_plan(), sources, shard_size=3) as build:
        for source in sources[:4]:
            build.add(embedded(source))
        build.quarantine(sources[4].id, CorruptMedia("broken"))
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        assert build.done_sources() == {source.id for source in sources[:5]}
        assert build.pending() == sources[5:]
        for source in sources[5:]:
            build.add(embedded(source))
        path = build.finish()
    assert Gallery.open(path, verify=True).ids == tuple(source.id for source in sources if source != sources[4])
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "v1"]


CHILD = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.service.gallery.test_store import *
root, sources = Path(sys.argv[2]), read_sources(Path(sys.argv[3]))
build = GalleryBuild(root, a_plan(copy_media=True), sources, shard_size=2)
for source in sources[:5]:
    build.add(embedded(source))
print("built", flush=True)
sys.stdin.readline()
os._exit(1)
"""


def test_another_process_builds_and_dies(tmp_path):
    sources = some_media(tmp_path / "media")
    checkout = Path(__file__).parents[3]
    command = [sys.executable, "-c", CHILD, str(checkout), str(tmp_path / "g"), str(tmp_path / "media")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "built\n"
        with pytest.raises(GalleryBusy, match="clips"):
            GalleryBuild(tmp_path / "g", a_plan(), sources)
        with GalleryBuild(tmp_path / "g", a_plan(name="another"), sources):
            pass
        child.communicate("die\n")
    plan = a_plan(copy_media=True)
    with GalleryBuild(tmp_path / "g", plan, sources) as build:
        assert build.done_sources() == {source.id for source in sources[:4]}  # the fifth was in memory only
        for source in build.pending():
            build.add(embedded(source))
        path = build.finish()
    Gallery.open(path, verify=True)
    assert contents(path) == contents(build_all(tmp_path / "undisturbed", plan, sources))


class Crash(BaseException):
    """The process dies: nothing after it happens."""


def test_nothing_takes_its_place_before_it_is_synced(tmp_path, monkeypatch, synced):
    sources = some_media(tmp_path / "media")
    real = {name: getattr(os, name) for name in ("replace", "rename")}
    unsynced, moved = [], []

    def checking(name):
        def call(source, target):
            moved.append(Path(target).name)
            inside = [path for path in Path(source).rglob("*") if path.is_file()]
            files = inside if Path(source).is_dir() else [Path(source)]
            unsynced.extend(file for file in [*files, Path(source)] if file.stat().st_ino not in synced)
            real[name](source, target)

        return call

    for name in real:
        monkeypatch.setattr(os, name, checking(name))
    build_all(tmp_path / "g", a_plan(index="hnsw", copy_media=True), sources, shard_size=3)
    assert not unsynced
    assert {"shard-000002.npz", "shard-000002.json", "manifest.json", "media", "v1"} <= set(moved)
    assert synced[-1] == (tmp_path / "g/clips").stat().st_ino  # the rename itself is durable when `finish` returns


@pytest.mark.parametrize("copy", [False, True])
def test_a_crash_before_any_rename_loses_no_version_and_changes_no_byte(tmp_path, monkeypatch, copy):
    sources = some_media(tmp_path / "media", 5)
    plan = a_plan(copy_media=copy)
    expected = contents(build_all(tmp_path / "undisturbed", plan, sources, shard_size=2))
    real = {name: getattr(os, name) for name in ("replace", "rename")}

    def attempt(root, survive):
        """Build; the rename after `survive` of them, and all later ones, crash. Returns whether the build got through."""
        left = [survive]

        def crashing(name):
            def call(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise Crash
                return real[name](*args)

            return call

        for name in real:
            monkeypatch.setattr(os, name, crashing(name))
        try:
            with GalleryBuild(root, plan, sources, shard_size=2) as build:
                for source in build.pending():
                    build.add(embedded(source))
                build.finish()
        except Crash:
            return False
        finally:
            for name, function in real.items():
                monkeypatch.setattr(os, name, function)
        return True

    for survive in range(100):
        root = tmp_path / f"g{survive}"
        if attempt(root, survive):
            break
        assert GalleryStore(root).names() == []
        assert contents(build_all(root, plan, sources, shard_size=2)) == expected
        assert sorted(file.name for file in (root / "clips").iterdir()) == [".lock", "v1"]
    assert 10 < survive < 100


@pytest.mark.parametrize("copy", [False, True])
def test_a_crash_after_the_version_appeared_costs_nothing_but_a_second_version(tmp_path, monkeypatch, copy):
    sources, plan = some_media(tmp_path / "media", 3), a_plan(copy_media=copy)

    def crash(path):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store_module.shutil, "rmtree", crash)
        with pytest.raises(Crash):
            build_all(tmp_path / "g", plan, sources)
    first = Gallery.open(tmp_path / "g/clips/v1", verify=True)
    assert contents(build_all(tmp_path / "g", plan, sources)) == contents(first.path)


def test_finishing_again_after_a_failure_keeps_the_media_copies(tmp_path, monkeypatch):
    sources, real = some_media(tmp_path / "media", 3), os.rename

    def full_disk(source, target):
        if Path(target).name == "v1":
            raise OSError("no space left")
        real(source, target)

    with GalleryBuild(tmp_path / "g", a_plan(copy_media=True), sources) as build:
        for source in sources:
            build.add(embedded(source))
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full_disk)
            with pytest.raises(OSError, match="space"):
                build.finish()
        Gallery.open(build.finish(), verify=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_shard_is_embedded_again(tmp_path, damage):
    sources = some_media(tmp_path / "media")
    with GalleryBuild(tmp_path / "g", a_plan(), sources, shard_size=2) as build:
        for source in sources[:6]:
            build.add(embedded(source))
    shard = sorted((tmp_path / "g/clips").glob(".build-*/shard-*.npz"))[1]
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "truncate":
        shard.write_bytes(content[:100])
    elif damage == "remove":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        assert build.pending() == [*sources[2:4], *sources[6:]]
    assert contents(build_all(tmp_path / "g", a_plan(), sources)) == contents(
        build_all(tmp_path / "undisturbed", a_plan(), sources)
    )


def test_a_quarantine_line_cut_short_is_tried_again(tmp_path):
    sources = some_media(tmp_path / "media", 3)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        for source in sources:
            build.quarantine(source.id, CorruptMedia("broken"))
    path = next((tmp_path / "g/clips").glob(".build-*/quarantine.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        assert build.pending() == sources[2:]
        build.quarantine(sources[2].id, CorruptMedia("broken"))
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("change", ["key", "file", "metadata", "order", "pooling", "copy"])
def test_a_leftover_of_another_key_or_other_inputs_is_discarded(tmp_path, change):
    sources, plan = some_media(tmp_path / "media"), a_plan()
    with GalleryBuild(tmp_path / "g", plan, sources) as build:
        build.add(embedded(sources[0]))
    with GalleryBuild(tmp_path / "g", plan, some_media_again(sources)) as build:
        assert len(build.done_sources()) == 1
    if change == "key":
        plan = a_plan(embedding_key=OTHER_KEY)
    elif change == "pooling":
        plan = a_plan(pooling="frame_attention")
    elif change == "copy":
        plan = a_plan(copy_media=True)
    elif change == "file":
        sources[7].file.write_bytes(b"new")
    elif change == "metadata":
        sources[7] = replace(sources[7], metadata={"new": True})
    else:
        sources.reverse()
    with GalleryBuild(tmp_path / "g", plan, sources) as build:
        assert build.done_sources() == frozenset()
    assert len(list((tmp_path / "g/clips").glob(".build-*"))) == 1


def some_media_again(sources):
    return [replace(source) for source in sources]


def test_media_that_changes_or_vanishes_during_the_build_is_not_taken(tmp_path):
    sources = some_media(tmp_path / "media", 3)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        sources[0].file.write_bytes(b"other")
        sources[1].file.unlink()
        for source in sources[:2]:
            with pytest.raises(MissingMedia):
                build.add(embedded(source))
            build.quarantine(source.id, MissingMedia("changed"))
        build.add(embedded(sources[2]))
        assert len(Gallery.open(build.finish())) == 1


def test_a_source_that_never_existed_is_missing_not_fatal(tmp_path):
    sources = read_sources(write_manifest(tmp_path, {"file": "gone.mp4"}))
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        with pytest.raises(MissingMedia, match=r"gone\.mp4"):
            build.add(embedded(sources[0]))


@pytest.mark.parametrize("frames", [np.full((2, 8), np.nan), np.full((2, 8), np.inf), np.zeros((2, 8))])
def test_features_without_a_direction_are_refused(tmp_path, frames):
    sources = some_media(tmp_path / "media", 2)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        with pytest.raises(NonFiniteTensor, match=r"clip0\.mp4"):
            build.add(EmbeddedItem(sources[0].id, frames.astype(np.float32), frame_times_s=(0, 1)))
        assert build.pending() == sources


def test_misuse_of_a_build_is_refused(tmp_path):
    sources = some_media(tmp_path / "media", 3)
    ones = np.ones((2, 8), np.float32)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        build.add(embedded(sources[0]))
        for item in (
            embedded(sources[0]),
            EmbeddedItem("stranger", ones, frame_times_s=(0, 1)),
            EmbeddedItem(sources[1].id, ones, frame_times_s=(0,)),
            EmbeddedItem(sources[1].id, ones[0], frame_times_s=(0,)),
            EmbeddedItem(sources[1].id, vector=ones[0]),
            EmbeddedItem(sources[1].id, ones[:, :5], frame_times_s=(0, 1)),
        ):
            with pytest.raises(ValueError):
                build.add(item)
        with pytest.raises(ValueError, match="2 sources"):
            build.finish()
        with pytest.raises(ValueError, match="from 1"):
            build.finish(0)
    with pytest.raises(ValueError, match="closed"):
        build.add(embedded(sources[1]))
    build.close()
    with pytest.raises(ConversionError, match="same id"):
        GalleryBuild(tmp_path / "g", a_plan(), [sources[0], sources[0]])
    with pytest.raises(ConversionError, match="kind"):
        GalleryBuild(tmp_path / "g", a_plan("image"), sources)
    with pytest.raises(InvalidReference):
        GalleryBuild(tmp_path / "g", a_plan(name="../evil"), sources)


def test_versions_count_up_can_be_given_and_are_never_given_twice(tmp_path):
    sources, root = some_media(tmp_path / "media", 2), tmp_path / "g"
    assert build_all(root, a_plan(), sources).name == "v1"
    assert build_all(root, a_plan(), sources, version=7).name == "v7"
    with pytest.raises(Conflict, match="version 7"):
        build_all(root, a_plan(), sources, version=7)
    store = GalleryStore(root)
    store.delete("clips", 7)
    assert store.versions("clips") == [1]
    assert build_all(root, a_plan(), sources).name == "v8"


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
