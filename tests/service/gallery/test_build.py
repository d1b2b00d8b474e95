"""Resumable builds: what goes in, what is left out, and what crashes cost. Real files throughout."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import service.gallery.build as build_module
from adapters.errors import Conflict, ConversionError, InvalidReference, NonFiniteTensor
from service.errors import CorruptMedia, GalleryBusy, MissingMedia
from service.gallery import (
    EmbeddedItem,
    Gallery,
    GalleryBuild,
    GalleryStore,
    Quarantined,
    frame_attention_weights,
    pool,
    read_sources,
)
from service.gallery.files import digest_file
from tests.service.gallery.galleries import (
    OTHER_KEY,
    a_plan,
    build_all,
    contents,
    embedded,
    some_media,
    write_manifest,
    write_strangely_named,
)

# --- what goes in ---


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


@pytest.mark.parametrize("copy_media", [False, True])
def test_media_that_is_not_what_its_source_names_is_not_taken(tmp_path, copy_media):
    sources = some_media(tmp_path / "media", 2)
    sources = [replace(source, sha256=digest_file(source.file)[0]) for source in sources]
    sources[0].file.write_bytes(b"another file, long before the build")
    with GalleryBuild(tmp_path / "g", a_plan(copy_media=copy_media), sources) as build:
        with pytest.raises(MissingMedia, match="not the file that was embedded before"):
            build.add(embedded(sources[0]))
        build.quarantine(sources[0].id, MissingMedia("changed"))
        build.add(embedded(sources[1]))
        path = build.finish()
    assert len(Gallery.open(path, verify=True)) == 1
    assert sum(b"another file" in data for data in contents(path).values()) == 0


def test_what_was_written_and_not_published_costs_no_embedding(tmp_path):
    sources, plan = some_media(tmp_path / "media", 3), a_plan(copy_media=True)
    with GalleryBuild(tmp_path / "g", plan, sources, shard_size=2) as build:
        with pytest.raises(ValueError, match="nothing was written"):
            build.publish()
        for source in sources:
            build.add(embedded(source))
        assert (build.write(4) / "manifest.json").is_file()
    assert GalleryStore(tmp_path / "g").names() == []
    with GalleryBuild(tmp_path / "g", plan, sources, shard_size=2) as build:
        assert build.pending() == []
        assert len(Gallery.open(build.finish(5), verify=True)) == 3
    assert GalleryStore(tmp_path / "g").versions("clips") == [5]


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


# --- what is left out ---


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


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_that_is_not_named_in_utf8_is_left_out_and_listed(tmp_path, copy):
    some_media(tmp_path / "media", 2)
    write_strangely_named(tmp_path / "media", b"clip\xe9.mp4")
    sources = read_sources(tmp_path / "media")
    for _ in range(2):  # also when the build goes on
        with GalleryBuild(tmp_path / "g", a_plan(copy_media=copy), sources) as build:
            assert [source.id for source in build.pending()] == ["clip0.mp4", "clip1.mp4"]
            assert build.num_quarantined == 1
    gallery = Gallery.open(build_all(tmp_path / "g", a_plan(copy_media=copy), sources), verify=True)
    assert gallery.ids == ("clip0.mp4", "clip1.mp4")
    assert gallery.quarantined() == (Quarantined(r"clip\xe9.mp4", "invalid_reference", "its name is not UTF-8"),)


def test_a_gallery_of_nothing_but_quarantine_is_refused_with_a_reason(tmp_path):
    sources = some_media(tmp_path / "media", 2)
    with GalleryBuild(tmp_path / "g", a_plan(), sources) as build:
        for source in sources:
            build.quarantine(source.id, MissingMedia("it is gone"))
        with pytest.raises(ConversionError, match=r"clip0\.mp4.*it is gone"):
            build.finish()


# --- stopping and going on ---


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
from service.gallery import GalleryBuild, read_sources
from tests.service.gallery.galleries import a_plan, embedded
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
        patch.setattr(build_module.shutil, "rmtree", crash)
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
