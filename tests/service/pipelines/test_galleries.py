"""Building galleries: what goes in, what is left out and why, going on after a stop, and how versions appear."""

import asyncio
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterNotFound, ConversionError
from service.auth import LOCAL
from service.errors import BadQuery, DeadlineExceeded, GalleryBusy, GalleryNotFound, MissingMedia, NotReady, Overloaded
from service.gallery.sources import Source, read_sources
from service.media import MediaSource, MediaWorkers
from service.pipelines import galleries as galleries_module
from service.pipelines.galleries import BuildOptions, BuildProgress, to_thread_whole
from service.types import GalleryKind
from tests.service.gallery.galleries import write_strangely_named
from tests.service.media import tasks
from tests.service.pipelines.conftest import Collection, clip_sources, picture_sources, text_sources
from tests.service.test_bank import holders
from tests.service.worlds import Service, context, picture


def build(service: Service, name: str, sources: list[Source], adapter: str = "find", **options: Any) -> Any:
    """The record of a gallery just built."""
    chosen = BuildOptions(sources[0].kind, **options)
    return service.call(service.runtime.galleries.build(name, adapter, sources, chosen, context()))


def opened(service: Service, name: str) -> Any:
    return service.call(service.runtime.galleries.live(name, LOCAL))[1]


# --- what goes in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_a_gallery_holds_its_sources_in_order(service: Service, tmp_path: Path, kind: GalleryKind) -> None:
    sources = {"image": picture_sources, "video": clip_sources}.get(kind, lambda _: text_sources())(tmp_path)
    record = build(service, f"ordered-{kind}", sources)
    gallery = opened(service, record.name)
    assert gallery.ids == tuple(source.id for source in sources)
    assert (record.version, record.status, record.adapter_name) == (1, "ready", "find")
    assert gallery.manifest.adapter.name == "find"
    assert gallery.manifest.embedding_key == record.embedding_key
    for position, source in enumerate(sources):
        item = gallery.item(position)
        assert item.text == source.text
        assert (gallery.thumbnail(position) is not None) == (kind != "text")
        assert len(item.frame_times_s) == (3 if kind == "video" else 0)


def test_embedding_keys_are_remembered_and_are_not_when_there_are_many(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    galleries = service.runtime.galleries

    async def keys() -> list[str]:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            return [galleries.key(pin, "video", "frame_attention", tau) for tau in (0.1, 0.2, 0.3, 0.1, 0.2, 0.3)]

    once = service.call(keys())
    assert once[:3] == once[3:] and len(set(once)) == 3
    monkeypatch.setattr(galleries_module, "MAX_KEYS", 2)
    assert service.call(keys()) == once


def test_ids_of_a_folder_are_its_relative_paths(service: Service, tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.png", "sub/ä b.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(len(name)))
    build(service, "folder", read_sources(tmp_path))
    assert opened(service, "folder").ids == ("b.png", "sub/a.png", "sub/ä b.png")


def test_another_pooling_or_adapter_is_another_key_and_an_index_is_not(service: Service, tmp_path: Path) -> None:
    clips = clip_sources(tmp_path)
    keys = [
        build(service, "keys", clips, adapter=adapter, **options).embedding_key
        for adapter, options in (
            ("find", {}),
            ("find", {"index": "hnsw"}),
            ("find", {"pooling": "frame_attention"}),
            ("find", {"pooling": "frame_attention", "tau": 0.5}),
            ("heads", {}),
            ("__base__", {}),
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_pooling_means_nothing_where_there_is_one_frame(service: Service, tmp_path: Path) -> None:
    pictures = picture_sources(tmp_path, 2)
    mean, weighted = (build(service, "single", pictures, pooling=pooling) for pooling in ("mean", "frame_attention"))
    assert mean.embedding_key == weighted.embedding_key


def test_typed_options_are_checked_against_what_there_is() -> None:
    options = BuildOptions.checked(kind="video", pooling="frame_attention", index="hnsw", copy_media=True)
    assert options == BuildOptions("video", pooling="frame_attention", index="hnsw", copy_media=True)
    with pytest.raises(BadQuery, match="pooling 'max' is none of mean, frame_attention"):
        BuildOptions.checked(kind="video", pooling="max", index="flat")
    with pytest.raises(BadQuery, match="index 'tree' is none of flat, hnsw"):
        BuildOptions.checked(kind="video", pooling="mean", index="tree")


# --- what is left out ----------------------------------------------------------------------------------------


def test_broken_files_are_quarantined_and_the_rest_is_built(service: Service, tmp_path: Path) -> None:
    sources = picture_sources(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"no picture at all")
    (tmp_path / "2.png").write_bytes(picture(2)[:70])
    sources.append(Source("missing", "image", tmp_path / "missing.png"))
    steps: list[BuildProgress] = []
    work = service.runtime.galleries.build("partial", "find", sources, BuildOptions("image"), context(), steps.append)
    service.call(work)
    gallery = opened(service, "partial")
    assert gallery.ids == ("picture-0", "picture-3")
    left_out = {entry.source: entry.code for entry in gallery.quarantined()}
    assert left_out["picture-1"] == "unsupported_media"
    assert left_out["picture-2"] == "corrupt_media"
    assert set(left_out) == {"picture-1", "picture-2", "missing"}
    assert steps[-1] == BuildProgress(done=5, total=5, quarantined=3)
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_a_file_that_is_not_named_in_utf8_is_left_out_and_listed(service: Service, tmp_path: Path) -> None:
    for number, name in enumerate((b"a.png", b"caf\xe9.png", "é.png".encode())):
        write_strangely_named(tmp_path, name, picture(number))
    steps: list[BuildProgress] = []
    sources, options = read_sources(tmp_path), BuildOptions("image")
    service.call(service.runtime.galleries.build("strange", "find", sources, options, context(), steps.append))
    gallery = opened(service, "strange")
    assert gallery.ids == ("a.png", "é.png")
    assert [(entry.source, entry.message) for entry in gallery.quarantined()] == [
        (r"caf\xe9.png", "its name is not UTF-8")
    ]
    assert steps[-1] == BuildProgress(done=3, total=3, quarantined=1)


@pytest.mark.parametrize(("num_kills", "num_tries", "left_out"), [(1, 2, []), (2, 2, ["picture-1"])])
def test_an_item_whose_worker_was_killed_gets_one_more_try(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_kills: int,
    num_tries: int,
    left_out: list[str],
) -> None:
    sources = picture_sources(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(picture(2)[:70])
    media, tries = service.runtime.stages.media, Counter[str]()
    decode = media.image

    async def image(source: MediaSource, prep: Any) -> Any:
        assert isinstance(source, Path)
        tries[source.name] += 1
        if source.name == "1.png" and tries["1.png"] <= num_kills:
            await killed_at_work(media, tmp_path / f"worker-{tries['1.png']}")
        return await decode(source, prep)

    monkeypatch.setattr(media, "image", image)
    name = f"killed-{num_kills}"
    build(service, name, sources)
    quarantined = {entry.source: entry.code for entry in opened(service, name).quarantined()}
    assert quarantined == {**dict.fromkeys(left_out, "media_too_large"), "picture-2": "corrupt_media"}
    assert tries["1.png"] == num_tries
    assert tries["2.png"] == 1  # looked at to the end: another try would say the same


async def killed_at_work(media: MediaWorkers, folder: Path) -> None:
    """Raises what a call raises whose worker somebody else kills."""
    folder.mkdir()
    call = asyncio.ensure_future(media.call(tasks.meet, folder, 2))  # waits for a second worker, which never comes
    while not (workers := list(folder.iterdir())):
        await asyncio.sleep(0.005)
    os.kill(int(workers[0].name), signal.SIGKILL)
    await call


def test_texts_that_are_too_long_are_quarantined(service: Service) -> None:
    build(service, "wordy", [*text_sources(), Source("long", "text", text="red " * 50)])
    gallery = opened(service, "wordy")
    assert [(entry.source, entry.code) for entry in gallery.quarantined()] == [("long", "bad_query")]


def test_where_nothing_can_be_embedded_no_version_appears(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConversionError, match="nothing could be embedded"):
        build(service, "nothing", [Source("a", "image", tmp_path / "a.png")])
    service.call(service.runtime.loader.refresh())
    assert "nothing" not in service.runtime.loader.snapshot.gallery_versions
    with pytest.raises(GalleryNotFound):
        opened(service, "nothing")
    (tmp_path / "a.png").write_bytes(picture(1))
    assert build(service, "nothing", [Source("a", "image", tmp_path / "a.png")]).status == "ready"


def test_adapters_that_do_not_retrieve_are_refused(service: Service) -> None:
    with pytest.raises(BadQuery, match="ask was made for vqa"):
        build(service, "refused", text_sources(), adapter="ask")
    with pytest.raises(AdapterNotFound):
        build(service, "refused", text_sources(), adapter="nobody")
    assert holders(service.runtime.bank) == 0


# --- stopping and going on -----------------------------------------------------------------------------------


def test_a_build_that_was_stopped_goes_on_where_it_was(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = picture_sources(tmp_path, 12)
    galleries = service.runtime.galleries
    monkeypatch.setattr(galleries_module, "BUILD_CONCURRENCY", 2)
    steps: list[BuildProgress] = []

    async def stopped() -> None:
        def report(progress: BuildProgress) -> None:
            steps.append(progress)
            if progress.done >= 5:
                task.cancel()

        work = galleries.build("resumed", "find", sources, BuildOptions("image"), context(), report)
        task = asyncio.create_task(work)
        with pytest.raises(asyncio.CancelledError):
            await task

    service.call(stopped())
    assert holders(service.runtime.bank) == 0
    seen: list[str] = []
    see = service.runtime.stages.on("").see

    async def counted(medium: Any, pin: Any, request: Any) -> Any:
        seen.append(medium.source.name)
        return await see(medium, pin, request)

    monkeypatch.setattr(service.runtime.stages.on(""), "see", counted)
    record = build(service, "resumed", sources)
    assert record.version == 1
    assert 0 < len(seen) <= 12 - 5
    assert opened(service, "resumed").ids == tuple(source.id for source in sources)


@pytest.mark.parametrize("error", [NotReady("the engine is stopping"), DeadlineExceeded("too late")])
def test_an_error_that_says_nothing_about_the_item_stops_the_build_and_leaves_nothing_out(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sources = picture_sources(tmp_path, 5)
    see, num_seen = service.runtime.stages.on("").see, 0

    async def failing(*arguments: Any) -> Any:
        nonlocal num_seen
        num_seen += 1
        if num_seen > 2:
            raise error
        return await see(*arguments)

    name = f"stopped-{type(error).__name__.lower()}"
    with monkeypatch.context() as patch:
        patch.setattr(service.runtime.stages.on(""), "see", failing)
        with pytest.raises(type(error)):
            build(service, name, sources)
    build(service, name, sources)
    gallery = opened(service, name)
    assert len(gallery) == 5
    assert gallery.quarantined() == ()


def test_a_full_media_queue_is_waited_for(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    see, refusals = service.runtime.stages.on("").see, iter(range(4))

    async def busy(*arguments: Any) -> Any:
        if next(refusals, None) is not None:
            raise Overloaded("too many wait", retry_after_s=0.0)
        return await see(*arguments)

    monkeypatch.setattr(service.runtime.stages.on(""), "see", busy)
    build(service, "patient", picture_sources(tmp_path, 3))
    gallery = opened(service, "patient")
    assert (len(gallery), gallery.quarantined()) == (3, ())


def test_one_gallery_is_built_by_one_at_a_time(service: Service, tmp_path: Path) -> None:
    sources, galleries = picture_sources(tmp_path, 3), service.runtime.galleries

    async def both() -> list[Any]:
        builds = [galleries.build("raced", "find", sources, BuildOptions("image"), context()) for _ in range(2)]
        return list(await asyncio.gather(*builds, return_exceptions=True))

    outcomes = service.call(both())
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds.count("GalleryBusy") == 1 or [o.version for o in outcomes] == [1, 2]
    assert not [o for o in outcomes if isinstance(o, Exception) and not isinstance(o, GalleryBusy)]


def test_a_build_that_is_called_off_while_it_opens_gives_its_lock_back(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, store = picture_sources(tmp_path, 1), service.runtime.galleries.store
    begun, may_end, made = threading.Event(), threading.Event(), []
    open_build = store.build

    def slowly(*args: Any) -> Any:
        made.append(open_build(*args))
        begun.set()
        assert may_end.wait(10)
        return made[0]

    async def call_off() -> None:
        work = service.runtime.galleries.build("called-off", "find", sources, BuildOptions("image"), context())
        task = asyncio.create_task(work)
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patch:
        patch.setattr(store, "build", slowly)
        service.call(call_off())
    assert len(made) == 1  # and held here, so that nothing but its end can have freed the lock
    assert build(service, "called-off", sources).version == 1


def test_a_crash_between_number_and_files_does_not_block_the_name(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after it took a number: the next build takes the next one."""
    sources, registry = picture_sources(tmp_path, 2), service.runtime.registry

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_gallery_status", die)
        with pytest.raises(Killed):
            build(service, "crashed", sources)
    service.call(service.runtime.loader.refresh())
    with pytest.raises(GalleryNotFound, match="no live version"):
        opened(service, "crashed")
    assert build(service, "crashed", sources).version == 2
    assert len(opened(service, "crashed")) == 2


# --- versions ------------------------------------------------------------------------------------------------


def test_a_new_version_takes_over_and_the_old_one_stays(service: Service, tmp_path: Path) -> None:
    build(service, "growing", picture_sources(tmp_path, 2))
    assert len(opened(service, "growing")) == 2
    assert build(service, "growing", picture_sources(tmp_path, 4)).version == 2
    service.call(service.runtime.loader.refresh())
    assert len(opened(service, "growing")) == 4
    assert len(service.call(service.runtime.galleries.version("growing", 1, LOCAL))) == 2
    size = service.runtime.metrics.registry.get_sample_value("bank_gallery_items", {"gallery": "growing"})
    assert size == 4


def test_media_of_items_are_checked_before_they_are_given_out(service: Service, collection: Collection) -> None:
    medium = service.call(service.runtime.galleries.medium("clips", "clip-0", LOCAL))
    assert medium.kind == "video"
    assert medium.source == collection.folder / "0.mp4"
    assert medium.digest == collection["clips"].item(0).media.sha256  # type: ignore[union-attr]
    with pytest.raises(BadQuery, match="holds texts"):
        service.call(service.runtime.galleries.medium("texts", "text-0", LOCAL))
    with pytest.raises(GalleryNotFound, match="version 9"):
        service.call(service.runtime.galleries.version("clips", 9, LOCAL))


def test_copied_media_outlive_their_originals(service: Service, tmp_path: Path) -> None:
    build(service, "kept", picture_sources(tmp_path, 2), copy_media=True)
    for file in tmp_path.iterdir():
        file.unlink()
    medium = service.call(service.runtime.galleries.medium("kept", "picture-1", LOCAL))
    assert isinstance(medium.source, Path)
    assert medium.source.read_bytes() == picture(1)


# --- threads -------------------------------------------------------------------------------------------------


def test_a_cancellation_waits_until_the_thread_is_through() -> None:
    import threading

    may_end, ended = threading.Event(), []

    def work() -> None:
        assert may_end.wait(30)
        ended.append(True)

    async def story() -> None:
        task = asyncio.create_task(to_thread_whole(work))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended

    asyncio.run(story())


# --- embedding anew ------------------------------------------------------------------------------------------


def test_what_is_embedded_anew_is_what_was_embedded_whatever_its_paths_lead_to_now(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "photo.png").write_bytes(picture(77))
    (tmp_path / "media").mkdir()
    record = build(service, "swapped", picture_sources(tmp_path / "media", 3))
    (tmp_path / "media" / "1.png").unlink()
    (tmp_path / "media" / "1.png").symlink_to(tmp_path / "private" / "photo.png")
    with pytest.raises(MissingMedia, match="1 of 3 items"):
        service.call(service.runtime.galleries.rebuild("swapped", record.version, "find", context()))
    (tmp_path / "moved.png").write_bytes(picture(1))
    (tmp_path / "media" / "1.png").unlink()
    (tmp_path / "media" / "1.png").symlink_to(tmp_path / "moved.png")  # the same picture
    again = service.call(service.runtime.galleries.rebuild("swapped", record.version, "find", context()))
    assert (again.version, again.content) == (record.version + 1, record.content)
