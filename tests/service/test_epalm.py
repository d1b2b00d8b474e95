"""Language models beside a BLIP in one process: answers, captions, mixed traffic, and the life of such an adapter."""

import asyncio
import random
import shutil
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.config import BASE_ADAPTER
from adapters.errors import MissingPart, ProbeFailed
from adapters.families.base import SlotView, UniformAdaptation
from adapters.families.epalm import EPalm
from adapters.package import Package, read_package, write_package
from service import runtime
from service.backbone.decoding import Start
from service.backbone.opt_answers import generate_texts, rank_texts
from service.backbone.opt_backbone import OptBackbone
from service.config import Settings
from service.errors import BadQuery
from service.gallery.sources import Source
from service.home import push_package
from service.lifecycle.writing import write_probed_package
from service.media import Preprocessing, SpectrogramPreprocessing, decode_image, decode_sound, decode_video
from service.metrics import Metrics
from service.pipelines.answering import UNSEEN
from service.pipelines.features import FeatureCache, Features
from service.pipelines.galleries import BuildOptions
from service.recordings import Recordings
from service.types import (
    AdapterInfo,
    CaptionQuery,
    GalleryMedia,
    GenerateDecode,
    Job,
    MediaBytes,
    MediaKind,
    RankDecode,
    VqaAnswer,
    VqaQuery,
)
from tests.service.media.clips import make_clip
from tests.service.media.sounds import make_sound_file, tone
from tests.service.opt_worlds import (
    ANSWERS,
    MAX_STEPS,
    NUM_MEL_BINS,
    RESOLUTION,
    make_opt_package,
    random_opt_tensors,
    write_tiny_opt,
)
from tests.service.worlds import Service, World, context, picture, running
from tests.tape import Counted, make_recordings

QUESTION = "what colour is the big circle?"
MEDIA: dict[str, MediaBytes] = {
    "image": MediaBytes("image", picture(1)),
    "video": MediaBytes("video", make_clip()),
    "audio": MediaBytes("audio", make_sound_file(tone(440, 0.6))),
}
# name -> task, encoder, medium, options
ADAPTERS: dict[str, tuple[Any, Any, MediaKind, dict[str, Any]]] = {
    "see": ("vqa", "vit", "image", {}),
    "watch": ("vqa", "timesformer", "video", {"end_layer_idx": 4, "prompt_len": 5, "prompt_mlp": False}),
    "listen": ("vqa", "ast", "audio", {"prompt_len": 0, "shared_connector": True, "answer_token_id": None}),
    "describe": ("caption", "vit", "image", {"shared_connector": True, "start_layer_idx": 0, "end_layer_idx": 2}),
    "hear": ("caption", "ast", "audio", {"injected_hidden_states": 3, "text_step": 2, "end_layer_idx": 4}),
}


class Both:
    """A service with a BLIP, the default, and an OPT; adapters of both."""

    def __init__(self, service: Service, opt: OptBackbone, packages: dict[str, Package]) -> None:
        self.service = service
        self.opt = opt
        self.packages = packages

    def answer(self, name: str, decode: Any = None, question: str = QUESTION, kind: str | None = None) -> VqaAnswer:
        return self.service.call(self.asking(name, decode, question, kind))

    def asking(
        self, name: str, decode: Any = None, question: str = QUESTION, kind: str | None = None
    ) -> Coroutine[Any, Any, VqaAnswer]:
        vqa = self.service.runtime.vqa
        task, _, medium, _ = ADAPTERS.get(name, ("vqa", None, "image", {}))
        media = MEDIA[kind or medium]
        if task == "caption":
            return vqa.caption(CaptionQuery(name, media, decode or GenerateDecode()), context())
        return vqa.answer(VqaQuery(name, question, media, decode or GenerateDecode()), context())


@pytest.fixture(scope="module")
def both(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("both")
    opt = write_tiny_opt(folder / "opt")
    blip = world.settings.backbone_folder
    copied = world.copy(
        folder, backbone=None, backbones=f"blip={blip},opt={folder / 'opt'}", slots="4:3,8:2;opt=1:2,3:2"
    )
    packages = {}
    for seed, (name, (task, encoder, _, options)) in enumerate(ADAPTERS.items()):
        packages[name] = make_opt_package(folder / "made" / name, opt, task, encoder, seed=seed, options=options)
        push_package(copied.settings, folder / "made" / name, name)
    with running(copied.settings) as service:
        yield Both(service, opt, packages)


def values_of(kind: MediaKind) -> torch.Tensor:
    """A medium as its encoder gets it, decoded here."""
    data, prep = MEDIA[kind].data, Preprocessing(RESOLUTION)
    if kind == "audio":
        return torch.from_numpy(decode_sound(data, SpectrogramPreprocessing(NUM_MEL_BINS, MAX_STEPS)).banks)
    return torch.from_numpy(decode_image(data, prep) if kind == "image" else decode_video(data, prep, 3).frames)


def by_hand(both: Both, name: str) -> tuple[tuple[int, ...], list[torch.Tensor | None], UniformAdaptation]:
    """What the model is given for a request: the start of the text, the encoder's states, the adapter's slot."""
    package, (task, encoder, kind, _) = both.packages[name], ADAPTERS[name]
    family, dims, model = EPalm(), both.opt.dims(), both.opt.model
    slot = SlotView(family, family.fold(package.config, package.tensors, dims), family.schedule(package.config, dims))
    token = package.config.options["answer_token_id"]
    assert token is None or isinstance(token, int)
    start = (both.opt.config.special_ids.bos,) if task == "caption" else both.opt.question(QUESTION, token).ids
    with torch.inference_mode():
        return start, [model.perceive(encoder, values_of(kind)[None])[0]], UniformAdaptation(slot)


def test_recorded_words_answer_mixed_traffic_as_launched_ones_do(
    both: Both, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests of both backbones, many at a time, through a service that records."""
    settings = both.service.runtime.settings
    recorders: list[tuple[Recordings, Counted]] = []

    def make(device: torch.device, _: Settings) -> Recordings:
        recorders.append(make_recordings(device))
        return recorders[-1][0]

    monkeypatch.setattr(runtime, "_make_recordings", make)
    names = [*ADAPTERS, "ask", "tell", "look", "see", "ask", BASE_ADAPTER]
    decodes = [GenerateDecode(num_beams=beams) for beams in (1, 3)]
    asked = [(name, decode) for decode in decodes for name in names]
    with running(settings.model_copy(update={"home": copied(settings.home, tmp_path)})) as service:
        recorded = Both(service, both.opt, both.packages)

        async def together(of: Both) -> list[VqaAnswer]:
            return await asyncio.gather(*(of.asking(name, decode) for name, decode in asked))

        found, wanted = service.call(together(recorded)), both.service.call(together(both))
        registry = service.runtime.metrics.registry
        for hosted in service.runtime.backbones:
            label = {"backbone": hosted.name}
            assert (registry.get_sample_value("bank_recording_bytes", label) or 0) > 0
            assert registry.get_sample_value("bank_recording_failed", label) == 0
    for own, other in zip(found, wanted, strict=True):
        assert (own.answer, own.adapter) == (other.answer, other.adapter)
        assert own.score == pytest.approx(other.score, abs=1e-4)
    assert len(recorders) == 2
    assert all(recorder.num_played > recorder.num_recorded > 0 for _, recorder in recorders)


def copied(home: Path, folder: Path) -> Path:
    shutil.copytree(home, folder / "home")
    return folder / "home"


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_request_is_what_the_model_makes_of_it(both: Both, name: str, num_beams: int) -> None:
    start, states, adaptation = by_hand(both, name)
    with torch.inference_mode():
        (found,) = generate_texts(both.opt.model, [Start(start, 16)], states, adaptation, num_beams=num_beams)
    answer = both.answer(name, GenerateDecode(num_beams=num_beams))
    words = found.hypotheses[0].ids[len(start) :]
    token = both.packages[name].config.options["answer_token_id"]
    words = words[: words.index(token)] if token in words else words
    assert answer.answer == both.opt.detokenize(words)
    assert answer.score == pytest.approx(found.hypotheses[0].score, abs=1e-4)
    assert (answer.adapter.name, answer.adapter.digest) == (name, both.packages[name].weights_digest)
    assert len(answer.alternatives) == num_beams - 1


@pytest.mark.parametrize("name", ["see", "watch", "listen"])
def test_given_answers_are_ranked_as_the_model_ranks_them(both: Both, name: str) -> None:
    start, states, adaptation = by_hand(both, name)
    candidates = tuple(both.opt.tokenize_answers(ANSWERS))
    with torch.inference_mode():
        (found,) = rank_texts(both.opt.model, [start], states, adaptation, [candidates], [3])
    answer = both.answer(name, RankDecode())
    assert answer.index == found.indices[found.best] and answer.answer == ANSWERS[answer.index]
    assert answer.score == pytest.approx(max(found.scores), abs=1e-4)
    assert both.answer(name, RankDecode(ANSWERS, k=3)) == answer


def test_the_default_length_counts_the_question_and_one_that_is_asked_for_does_not(both: Both) -> None:
    num_question = len(both.opt.question(QUESTION, both.opt.answer_token("</a>")).ids)
    default, longer = both.answer("see", GenerateDecode(1)), both.answer("see", GenerateDecode(1, 30))
    assert len(default.answer.split()) <= 16 - num_question
    assert longer.answer.startswith(default.answer)
    long_question = " ".join(["red"] * 20)
    assert len(both.answer("see", GenerateDecode(1), long_question).answer.split()) <= 1


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("see", "audio", "see takes `image`, not `audio`"),
        ("see", "video", "see takes `image`, not `video`"),
        ("watch", "image", "watch takes `video`, not `image`"),
        ("hear", "image", "hear takes `audio`, not `image`"),
        ("ask", "audio", "ask looks at pictures and clips, and hears nothing"),
    ],
)
def test_a_medium_that_an_adapter_does_not_perceive_is_refused(both: Both, name: str, kind: str, message: str) -> None:
    with pytest.raises(BadQuery, match=message):
        both.answer(name, kind=kind)


def test_adapters_are_used_for_what_they_were_made_for(both: Both) -> None:
    runtime, media = both.service.runtime, MEDIA["image"]
    with pytest.raises(BadQuery, match="describe was made for caption, not for questions"):
        both.service.call(runtime.vqa.answer(VqaQuery("describe", QUESTION, media, GenerateDecode()), context()))
    with pytest.raises(BadQuery, match="see was made for vqa, not for captions"):
        both.service.call(runtime.vqa.caption(CaptionQuery("see", media, GenerateDecode()), context()))
    with pytest.raises(MissingPart, match="a BLIP is not served for caption"):
        both.service.call(runtime.vqa.caption(CaptionQuery("__base__", media, GenerateDecode()), context()))


def test_too_much_is_refused_with_counts(both: Both) -> None:
    with pytest.raises(BadQuery, match="question has 33 tokens; at most 24"):
        both.answer("see", question=" ".join(["red"] * 30))
    with pytest.raises(BadQuery, match="max_new_tokens may be at most"):
        both.answer("see", GenerateDecode(1, 500))
    with pytest.raises(BadQuery, match="question is empty"):
        both.answer("see", question="  ")


def test_an_item_of_a_gallery_is_perceived_once_whatever_the_adapter(both: Both, tmp_path: Path) -> None:
    """No adapter has a part in the encoder."""
    (tmp_path / "one.png").write_bytes(picture(3))
    runtime, source = both.service.runtime, Source("one.png", "image", tmp_path / "one.png")
    build = runtime.galleries.build("pictures", "find", [source], BuildOptions("image"), context())
    both.service.call(build)
    registry = runtime.metrics.registry

    def num_perceived() -> float:
        return registry.get_sample_value("bank_batch_jobs_count", {"stage": "perceive"}) or 0.0

    before = num_perceived()
    media = GalleryMedia("pictures", "one.png")
    both.service.call(runtime.vqa.answer(VqaQuery("see", QUESTION, media, GenerateDecode()), context()))
    both.service.call(runtime.vqa.caption(CaptionQuery("describe", media, GenerateDecode()), context()))
    assert num_perceived() == before + 1
    with pytest.raises(BadQuery, match="watch takes `video`"):
        both.service.call(runtime.vqa.answer(VqaQuery("watch", QUESTION, media, GenerateDecode()), context()))


@pytest.mark.parametrize("kind", MEDIA)
def test_all_who_ask_about_one_medium_at_once_have_it_perceived_once(
    both: Both, monkeypatch: pytest.MonkeyPatch, kind: MediaKind
) -> None:
    """Whatever they ask, by whatever adapter of that encoder; and the first may take its adapter with it."""
    runtime = both.service.runtime
    names = [name for name, (_, _, medium, _) in ADAPTERS.items() if medium == kind]
    decodes: list[Any] = [GenerateDecode(), GenerateDecode(1, 4)]
    asked = [(name, decode) for name in names for decode in decodes]
    asked += [(name, RankDecode()) for name in names if ADAPTERS[name][0] == "vqa"]
    monkeypatch.setattr(runtime.stages.on("opt"), "_features", Features(0, Metrics(), "opt"))
    expected = [both.answer(name, decode) for name, decode in asked]
    monkeypatch.setattr(runtime.stages.on("opt"), "_features", Features(1 << 20, Metrics(), "opt"))
    jobs, submit = [], runtime.engine.submit

    def noted(job: Job) -> Any:
        jobs.append(job)
        return submit(job)

    monkeypatch.setattr(runtime.engine, "submit", noted)

    async def at_once() -> list[VqaAnswer]:
        return list(await asyncio.gather(*(both.asking(name, decode) for name, decode in asked)))

    for got, want in zip(both.service.call(at_once()), expected, strict=True):
        assert (got.answer, got.adapter) == (want.answer, want.adapter)
        assert got.score == pytest.approx(want.score, abs=1e-4)
    (perceived,) = [job for job in jobs if job.stage == "perceive"]
    assert perceived.adapter == BASE_ADAPTER


def test_a_language_model_does_not_retrieve(both: Both, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(picture(4))
    runtime, source = both.service.runtime, Source("one.png", "image", tmp_path / "one.png")
    with pytest.raises(BadQuery, match="see was made for vqa, not for retrieval"):
        both.service.call(runtime.galleries.build("no", "see", [source], BuildOptions("image"), context()))


def test_without_an_adapter_a_language_model_says_that_it_saw_nothing(both: Both, tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path,
        backbones=f"opt={both.service.runtime.settings.backbone_folders['opt']}",
        threads=1,
        media_workers=1,
    )
    with running(settings) as service:
        query = VqaQuery("__base__", QUESTION, MEDIA["image"], GenerateDecode(1, 5))
        one = service.call(service.runtime.vqa.answer(query, context()))
        other = VqaQuery("__base__", QUESTION, MEDIA["audio"], GenerateDecode(1, 5))
        assert service.call(service.runtime.vqa.answer(other, context())).answer == one.answer
        assert one.warnings == (UNSEEN,)


@pytest.mark.parametrize("decode", [GenerateDecode(2), RankDecode(ANSWERS, k=3)], ids=["generate", "rank"])
@pytest.mark.parametrize("name", ["see", "watch", "listen", "ask"])
def test_a_request_is_admitted_for_what_its_jobs_cost(
    both: Both, monkeypatch: pytest.MonkeyPatch, name: str, decode: Any
) -> None:
    """A question weighs in every row that is run behind it, a soft prompt too; what was perceived weighs nothing."""
    runtime = both.service.runtime
    admitted, run, permit, submit = [], [], runtime.admission.permit, runtime.engine.submit

    def noted(cost: float) -> Any:
        admitted.append(cost)
        return permit(cost)

    def counted(job: Any) -> Any:
        run.append(job.cost)
        return submit(job)

    monkeypatch.setattr(runtime.admission, "permit", noted)
    monkeypatch.setattr(runtime.engine, "submit", counted)
    runtime.stages.on("opt" if name in ADAPTERS else "blip")._features._cache = FeatureCache(1 << 20)
    for question in (QUESTION, QUESTION, "what colour is the big red circle at the left?"):
        both.answer(name, decode, question)
    assert len(run) == 4
    assert admitted == pytest.approx([sum(run[:2]), run[2], run[3]])
    if isinstance(decode, RankDecode):
        assert admitted[2] > admitted[1]


# --- both at once --------------------------------------------------------------------------------------------


def test_mixed_traffic_is_answered_as_if_alone_by_the_right_adapters(both: Both) -> None:
    runtime = both.service.runtime
    names = [*ADAPTERS, "ask", "look"]
    alone = {name: both.answer(name) for name in names}
    chance = random.Random(5)
    asked = [chance.choice(names) for _ in range(60)]

    async def all_at_once() -> list[VqaAnswer]:
        return list(await asyncio.gather(*(both.asking(name) for name in asked)))

    for name, got in zip(asked, both.service.call(all_at_once()), strict=True):
        assert (got.answer, got.adapter) == (alone[name].answer, alone[name].adapter)
        assert got.score == pytest.approx(alone[name].score, abs=1e-4)
    assert runtime.metrics.registry.get_sample_value("bank_backbone_loads_total") == 2
    assert {one.name for one in runtime.backbones} == {"blip", "opt"}


def test_slots_take_the_memory_that_their_shapes_say(both: Both) -> None:
    both.answer("see"), both.answer("describe")
    runtime, family, dims = both.service.runtime, EPalm(), both.opt.dims()
    size_of = {
        rank: sum(4 * torch.Size(shape).numel() for shape in family.slot_shapes(dims, rank).values()) for rank in (1, 3)
    }
    held = runtime.backbones.named("opt").bank.residency()["device"]
    see, describe = (both.packages[name].weights_digest for name in ("see", "describe"))
    assert held[see] == size_of[3] and held[describe] in size_of.values()
    digests = {package.weights_digest for package in both.packages.values()}
    assert not digests & runtime.backbones.named("blip").bank.residency()["device"].keys()
    assert held.keys() <= digests


# --- the life of an adapter ----------------------------------------------------------------------------------


def until(condition: Any, within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_push_promote_canary_and_rollback_work_for_this_family(both: Both, tmp_path: Path) -> None:
    runtime, registry = both.service.runtime, both.service.runtime.registry
    for seed in (50, 51):
        make_opt_package(tmp_path / str(seed), both.opt, "caption", "ast", seed=seed, probed=True)
        runtime.deployments.push(tmp_path / str(seed), "lively", actor="ada")
    until(lambda: [registry.snapshot().version("lively", number).status for number in (1, 2)] == ["ready", "ready"])

    def served(key: str | None = None) -> AdapterInfo:
        query = CaptionQuery("lively", MEDIA["audio"], GenerateDecode())
        return both.service.call(runtime.vqa.caption(query, context(routing_key=key))).adapter

    assert served().version == 1

    def promote(rollout: str, **wanted: Any) -> None:
        registry.start_rollout("lively", "prod", 2, rollout_id=rollout, replicas=[runtime.replica_id], **wanted)
        until(lambda: not registry.snapshot().rollout(rollout).is_active)  # type: ignore[union-attr]
        both.service.call(runtime.loader.refresh())

    promote("some", traffic=0.5)
    assert {served(f"user-{number}").version for number in range(20)} == {1, 2}
    promote("all")
    assert served().version == 2
    registry.roll_back("lively", "prod", rollout_id="back", expect=2)
    both.service.call(runtime.loader.refresh())
    assert served().version == 1


@pytest.mark.parametrize("dead", ["connector.0", "connector.1", "prompt"])
def test_a_dead_part_does_not_pass(both: Both, tmp_path: Path, dead: str) -> None:
    package = make_opt_package(tmp_path / "alive", both.opt, seed=60, probed=True)
    groups = EPalm().site_groups(package.config, both.opt.dims())
    assert set(groups) == {"connector.0", "connector.1", "prompt"}
    tensors = dict(package.tensors) | {name: torch.zeros_like(package.tensors[name]) for name in groups[dead]}
    with pytest.raises(ProbeFailed, match=dead.replace(".", r"\.")):
        write_probed_package(tmp_path / "dead", package.config, tensors, "# dead\n", both.opt)
    write_package(tmp_path / "forged", package.config, tensors, "# forged\n", package.probe)
    runtime, registry = both.service.runtime, both.service.runtime.registry
    name = f"forged-{dead.replace('.', '-')}"
    runtime.deployments.push(tmp_path / "forged", name, actor="ada")
    until(lambda: registry.snapshot().version(name, 1).status == "failed")


def test_a_package_is_read_without_its_backbone(both: Both, tmp_path: Path) -> None:
    package = make_opt_package(tmp_path / "one", both.opt, "vqa", "ast", seed=61)
    assert read_package(tmp_path / "one").weights_digest == package.weights_digest
    tensors = random_opt_tensors(package.config, both.opt, 61)
    again = write_package(tmp_path / "two", package.config, tensors, "# two\n", None)
    assert again.weights_digest == package.weights_digest
