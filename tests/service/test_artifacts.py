"""Packages kept elsewhere than in the home: pushed there, read from there, and served while nobody answers."""

import asyncio
from pathlib import Path

import pytest

from adapters.artifacts import LocalArtifactStore, RemoteArtifactStore
from adapters.errors import ArtifactUnavailable, InvalidReference
from adapters.package import read_files
from service.auth import LOCAL
from service.backbones import Backbones
from service.errors import AdapterDamaged
from service.folders import HomeFolders, open_registry
from service.http.errors import rule_of
from service.loader import Loader
from service.metrics import Metrics
from service.runtime import open_artifacts
from service.types import GenerateDecode, MediaBytes, VqaQuery
from tests.service.worlds import World, context, make_bank, picture, running


@pytest.fixture
def elsewhere(world: World, tmp_path: Path) -> World:
    """A world whose packages go to a URL; only `new` is there."""
    elsewhere = world.copy(tmp_path, artifacts_url=f"file://{tmp_path}/elsewhere")
    elsewhere.push("new", seed=70)
    return elsewhere


def loader_of(world: World, metrics: Metrics) -> Loader:
    return Loader(
        open_registry(world.settings),
        open_artifacts(world.settings),
        Backbones.of_one(world.backbone, make_bank(world.backbone), metrics),
        metrics,
    )


def pin(world: World, reference: str) -> Metrics:
    """Load an adapter into a fresh loader; what was measured."""
    metrics = Metrics()

    async def story() -> None:
        loader = loader_of(world, metrics)
        try:
            async with loader.pin(reference, LOCAL) as pin:
                assert pin.info.name == reference
        finally:
            await loader.close()

    asyncio.run(story())
    return metrics


def test_loads_are_timed_by_where_the_package_came_from(elsewhere: World, tmp_path: Path) -> None:
    def sources(metrics: Metrics) -> dict[str, float]:
        samples = metrics.adapter_load_seconds.collect()[0].samples
        return {sample.labels["source"]: sample.value for sample in samples if sample.name.endswith("_count")}

    assert sources(pin(elsewhere, "new")) == {"remote": 1}
    assert sources(pin(elsewhere, "new")) == {"disk": 1}  # from the cache
    HomeFolders(elsewhere.settings.home).artifact_cache.rename(tmp_path / "no-cache")
    assert sources(pin(elsewhere, "new")) == {"remote": 1}


def test_by_default_packages_are_in_the_home(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)
    store = open_artifacts(copied.settings)
    assert isinstance(store, LocalArtifactStore)
    assert store.root == HomeFolders(copied.settings.home).artifacts
    assert not HomeFolders(copied.settings.home).artifact_cache.exists()


def test_a_folder_elsewhere_is_a_local_store_too(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path, artifacts_url=str(tmp_path / "elsewhere"))
    record = copied.push("new", seed=71)
    assert LocalArtifactStore(tmp_path / "elsewhere").has(record.package_digest)
    pin(copied, "new")


def test_a_push_goes_to_the_url_and_a_load_comes_from_it(elsewhere: World, tmp_path: Path) -> None:
    digest = open_registry(elsewhere.settings).snapshot().version("new", 1).package_digest
    store = open_artifacts(elsewhere.settings)
    assert isinstance(store, RemoteArtifactStore)
    assert store.digests() == (digest,)
    pin(elsewhere, "new")
    cached = HomeFolders(elsewhere.settings.home).artifact_cache / "sha256" / digest.removeprefix("sha256:")
    assert read_files(cached) == store.read(digest)
    with pytest.raises(AdapterDamaged, match=r"no artifact sha256:.* in file:///.*/elsewhere"):
        pin(elsewhere, "ask")


def test_what_is_cached_is_served_while_nobody_answers_and_the_rest_is_503(elsewhere: World, tmp_path: Path) -> None:
    elsewhere.push("other", seed=72)
    pin(elsewhere, "new")
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    (tmp_path / "elsewhere").symlink_to("elsewhere")  # whatever is asked of it fails
    pin(elsewhere, "new")
    with pytest.raises(ArtifactUnavailable, match="failed") as caught:
        pin(elsewhere, "other")
    rule = rule_of(caught.value)
    assert (rule.status, rule.code) == (503, "artifact_unavailable")
    assert rule.retry_after_s is not None


def test_a_cache_of_no_size_keeps_nothing(elsewhere: World) -> None:
    settings = elsewhere.settings.model_copy(update={"artifact_cache_mib": 0})
    store = open_artifacts(settings)
    (digest,) = store.digests()
    assert store.read(digest)
    assert list(HomeFolders(settings.home).artifact_cache.rglob("README.md")) == []


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nosuch://bucket/x", InvalidReference, "nosuch"),
        ("wandb://bucket/x", ArtifactUnavailable, "[Ii]nstall wandbfs"),
    ],
)
def test_a_url_that_cannot_be_opened_stops_the_start_with_its_reason(
    world: World, tmp_path: Path, url: str, error: type[Exception], message: str
) -> None:
    copied = world.copy(tmp_path, artifacts_url=url)
    with pytest.raises(error, match=message):
        open_artifacts(copied.settings)
    with pytest.raises(error, match=message), running(copied.settings):
        pass


def test_a_question_gets_the_same_answer_from_either_place(world: World, elsewhere: World, tmp_path: Path) -> None:
    home = world.copy(tmp_path / "other")
    home.push("new", seed=70)
    query = VqaQuery("new", "what colour is the circle?", MediaBytes("image", picture(1)), GenerateDecode())
    answers = []
    for settings in (home.settings, elsewhere.settings):
        with running(settings) as service:
            answers.append(service.call(service.runtime.vqa.answer(query, context())).answer)
    assert answers[0] == answers[1]
