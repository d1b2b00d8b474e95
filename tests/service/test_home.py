"""What the command line does to a home without a server."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.config import AnswerDecoding
from adapters.errors import BackboneMismatch, Conflict, InvalidPackage, InvalidReference, MissingPart, RankTooLarge
from adapters.package import read_package, write_package
from service.backbone.folder import load_backbone
from service.config import Settings
from service.errors import BadQuery
from service.folders import HomeFolders
from service.gallery.sources import Source
from service.gallery.store import GalleryStore
from service.home import build_gallery, open_registry, push_package
from service.pipelines.galleries import BuildOptions, BuildProgress
from tests.service.worlds import World, adapter_config, make_package, picture, random_tensors, write_tiny_backbone

TEXTS = [Source(str(number), "text", text=text) for number, text in enumerate(("a red circle", "a blue square"))]


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path)


def test_a_first_push_is_served_and_later_ones_wait_for_a_promotion(copied: World) -> None:
    first = copied.push("new", seed=30)
    second = copied.push("new", seed=31)
    assert (first.version, second.version, first.status) == (1, 2, "ready")
    registry = open_registry(copied.settings)
    assert registry.snapshot().aliases_of("new") == {"prod": 1}
    registry.close()


def test_pushing_the_same_package_again_changes_nothing(copied: World, tmp_path: Path) -> None:
    make_package(tmp_path / "package", copied.backbone, seed=32)
    once = push_package(copied.settings, tmp_path / "package", "new")
    registry = open_registry(copied.settings)
    generation = registry.revision().generation
    assert push_package(copied.settings, tmp_path / "package", "new") == once
    assert registry.revision().generation == generation
    registry.close()


def test_a_home_is_made_where_there_is_none_and_takes_packages_before_its_backbone(
    world: World, tmp_path: Path
) -> None:
    make_package(tmp_path / "package", world.backbone, seed=33)
    settings = Settings(home=tmp_path / "deep" / "home")
    record = push_package(settings, tmp_path / "package", "first")
    stored = HomeFolders(settings.home).artifacts / "sha256" / record.package_digest.removeprefix("sha256:")
    assert read_package(stored).weights_digest == record.weights_digest


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"resolution": 17}, "no multiple of the patch"),
        ({"decoding": AnswerDecoding(answer_ids=((1, 5, 2), (1, 10**9, 2)))}, r"answer_ids\[1\]"),
        ({"decoding": AnswerDecoding(answer_ids=((1, -1, 2),))}, r"answer_ids\[0\]"),
        ({"decoding": AnswerDecoding(answer_ids=((1,),))}, r"answer_ids\[0\]"),
        ({"decoding": AnswerDecoding(answer_ids=((1,) * 25,))}, r"answer_ids\[0\]"),
        ({"parts": {}}, "no digest of decoder, text_encoder, vision"),
    ],
)
def test_a_config_that_its_backbone_could_not_run_is_refused(
    copied: World, tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    wanted = dict(wanted)
    parts = wanted.pop("parts", None)
    config = adapter_config(copied.backbone, **wanted)
    if parts is not None:
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"parts": parts})})
    write_package(tmp_path / "package", config, random_tensors(config, copied.backbone.dims(), 35), "", None)
    with pytest.raises(InvalidPackage, match=message):
        push_package(copied.settings, tmp_path / "package", "new")


def test_what_this_backbone_cannot_serve_is_refused_before_anything_is_stored(copied: World, tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path / "other", with_decoder=False)
    other = load_backbone(tmp_path / "other")
    make_package(tmp_path / "whole", copied.backbone, seed=34)
    make_package(tmp_path / "wide", copied.backbone, seed=35, rank=9)
    make_package(tmp_path / "kv", copied.backbone, seed=36, options={"kv_rank": 9})
    before = sorted(HomeFolders(copied.settings.home).artifacts.rglob("*"))
    to_other = copied.settings.model_copy(update={"backbone": tmp_path / "other"})
    assert "decoder" not in other.parts
    with pytest.raises((MissingPart, BackboneMismatch)):
        push_package(to_other, tmp_path / "whole", "new")
    for package in ("wide", "kv"):
        with pytest.raises(RankTooLarge, match="rank 9 is above the largest slot bucket, 8"):
            push_package(copied.settings, tmp_path / package, "new")
    with pytest.raises(InvalidPackage):
        push_package(copied.settings, tmp_path / "nothing", "new")
    with pytest.raises(InvalidReference):
        push_package(copied.settings, tmp_path / "whole", "../new")
    registry = open_registry(copied.settings)
    assert "new" not in registry.snapshot().adapters
    registry.close()
    assert sorted(HomeFolders(copied.settings.home).artifacts.rglob("*")) == before


def test_two_who_push_at_once_get_two_versions_and_one_alias(copied: World, tmp_path: Path) -> None:
    for seed in (40, 41):
        make_package(tmp_path / str(seed), copied.backbone, seed=seed)
    records = []

    def push(seed: int) -> None:
        records.append(push_package(copied.settings, tmp_path / str(seed), "raced"))

    threads = [threading.Thread(target=push, args=(seed,)) for seed in (40, 41)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.version for record in records} == {1, 2}
    registry = open_registry(copied.settings)
    assert set(registry.snapshot().aliases_of("raced")) == {"prod"}
    registry.close()


def test_a_gallery_is_built_with_an_engine_of_its_own_and_reported(copied: World, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(b"no picture")
    sources = [Source(name, "image", tmp_path / name) for name in ("a.png", "b.png")]
    steps: list[BuildProgress] = []
    record = asyncio.run(
        build_gallery(copied.settings, "mine", "find", sources, BuildOptions("image"), report=steps.append)
    )
    assert (record.version, record.status, record.adapter_name) == (1, "ready", "find")
    assert steps[-1] == BuildProgress(done=2, total=2, quarantined=1)
    assert GalleryStore(HomeFolders(copied.settings.home).galleries).versions("mine") == [1]


def test_a_gallery_that_cannot_be_built_ends_the_engine_too(copied: World) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(BadQuery, match="ask was made for vqa"):
        asyncio.run(build_gallery(copied.settings, "mine", "ask", TEXTS, BuildOptions("text")))
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()


def test_an_alias_somebody_else_set_first_is_theirs(copied: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.registry import Registry

    def lost(*_: object, **__: object) -> None:
        raise Conflict("somebody was faster")

    monkeypatch.setattr(Registry, "set_alias", lost)
    assert copied.push("new", seed=42).version == 1
