"""Questions: every way to answer, whose answer it is, and what is refused before anything runs."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.config import BASE_ADAPTER, AnswerDecoding
from adapters.errors import AdapterNotFound
from service.auth import LOCAL
from service.backbone.blip_answers import beam_search, rank_answers
from service.bank import batch_leases
from service.errors import (
    BadQuery,
    CorruptMedia,
    DeadlineExceeded,
    GalleryNotFound,
    Overloaded,
    TooLarge,
    UnsupportedMedia,
)
from service.loader import Pin
from service.metrics import Metrics
from service.pipelines.stage_set import StageSet
from service.pipelines.stages import Medium
from service.pipelines.vqa import VqaPipeline
from service.types import (
    GalleryMedia,
    GenerateDecode,
    MediaBytes,
    RankDecode,
    RequestContext,
    RetrieveQuery,
    VqaAnswer,
    VqaQuery,
)
from tests.service.media.clips import make_clip
from tests.service.pipelines.conftest import Collection
from tests.service.test_bank import assert_nothing_taken, holders
from tests.service.worlds import ANSWERS, Service, context, picture

RED = MediaBytes("image", picture(1))
QUESTION = "what colour is the circle?"
ASK = VqaQuery("ask", QUESTION, RED, GenerateDecode())
CHOICES = ("a big circle", "green", "red", "blue")


def answer(service: Service, query: VqaQuery, request: RequestContext | None = None) -> VqaAnswer:
    """The answer; whatever comes of it, nothing stays taken."""
    try:
        return service.call(service.runtime.vqa.answer(query, request or context()))
    finally:
        assert_nothing_taken(service.runtime)


def asked(**changes: Any) -> VqaQuery:
    return replace(ASK, **changes)


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["ask", "tell", "look", BASE_ADAPTER])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_generated_answers_equal_the_model_run_by_hand(service: Service, adapter: str, kind: str) -> None:
    data = picture(2) if kind == "image" else make_clip(num_frames=12, size=(32, 32))
    got = answer(service, asked(adapter=adapter, media=MediaBytes(kind, data), decode=GenerateDecode(3, 4)))  # type: ignore[arg-type]
    runtime = service.runtime

    async def by_hand() -> Any:
        async with runtime.loader.pin(adapter, LOCAL) as pin:
            memory, adaptation, leases = await _memory(service, pin, Medium(kind, data))  # type: ignore[arg-type]
            with torch.inference_mode(), leases:
                return beam_search(runtime.backbone.model, memory, 1, adaptation, num_beams=3, max_length=5)[0]

    expected = service.call(by_hand()).hypotheses
    assert got.answer == runtime.backbone.detokenize(expected[0].ids)
    assert [got.score, *[a.score for a in got.alternatives]] == pytest.approx([h.score for h in expected], abs=1e-4)
    assert got.index is None
    assert got.adapter.name == adapter


async def _memory(service: Service, pin: Pin, medium: Medium) -> tuple[Any, Any, Any]:
    """What the decoder reads, built without the engine."""
    runtime = service.runtime
    seen = await runtime.stages.blip(pin).see(medium, pin, context())
    model = runtime.backbone.model
    ids = torch.tensor([runtime.backbone.tokenize(QUESTION).ids])
    states = seen.output.states.flatten(0, 1)[None]
    leases = batch_leases(runtime.bank)
    batch = leases.__enter__()
    assert batch.add(pin.digest)
    adaptation = batch.adaptation([pin.digest])
    with torch.inference_mode():
        mask, y_mask = torch.ones_like(ids, dtype=torch.bool), torch.ones(states.shape[:2], dtype=torch.bool)
        question = model.encode_multimodal(ids, mask, states, y_mask, adaptation)
        assert model.decoder is not None
        memory = model.decoder.body.remember(question, mask, adaptation)
    return memory, adaptation, _Leave(leases)


class _Leave:
    """Ends leases that were begun elsewhere."""

    def __init__(self, leases: Any) -> None:
        self.leases = leases

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.leases.__exit__(None, None, None)


@pytest.mark.parametrize("adapter", ["ask", "tell", BASE_ADAPTER])
def test_ranked_answers_equal_the_model_run_by_hand(service: Service, adapter: str) -> None:
    got = answer(service, asked(adapter=adapter, decode=RankDecode(CHOICES, k=3)))
    runtime = service.runtime

    async def by_hand() -> Any:
        async with runtime.loader.pin(adapter, LOCAL) as pin:
            memory, adaptation, leases = await _memory(service, pin, Medium("image", picture(1)))
            ids = tuple(runtime.backbone.tokenize_answers(CHOICES))
            with torch.inference_mode(), leases:
                return rank_answers(runtime.backbone.model, memory, adaptation, [ids], [3])[0]

    expected = service.call(by_hand())
    assert got.index == expected.indices[expected.best]
    assert got.answer == CHOICES[got.index]
    assert len(got.alternatives) == 2
    scores = [got.score, *[alternative.score for alternative in got.alternatives]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(scores) == pytest.approx(sorted(expected.scores), abs=1e-4)


def test_without_candidates_the_adapters_own_answers_are_ranked(service: Service) -> None:
    got = answer(service, asked(decode=RankDecode()))
    assert {got.answer, *[alternative.answer for alternative in got.alternatives]} < set(ANSWERS)
    assert len(got.alternatives) == 2  # its rank_k is 3
    assert answer(service, asked(decode=RankDecode(ANSWERS))) == got
    everything = answer(service, asked(decode=RankDecode(k=1000)))
    assert len(everything.alternatives) == len(ANSWERS) - 1


def test_answers_that_a_package_brings_as_token_ids_are_ranked_and_spelt_out(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tuple(service.runtime.backbone.tokenize_answers(ANSWERS))
    by_ids = AnswerDecoding(answer_ids=ids, rank_k=3)
    from service.pipelines import answering

    expected = answer(service, asked(decode=RankDecode()))
    monkeypatch.setattr(answering, "_decoding", lambda config: by_ids)
    assert answer(service, asked(decode=RankDecode())) == expected


def test_defaults_are_the_adapters(service: Service) -> None:
    spelt_out = answer(service, asked(decode=GenerateDecode(num_beams=2, max_new_tokens=4)))
    assert answer(service, ASK) == spelt_out


def test_adapters_answer_differently(service: Service) -> None:
    scores = {
        answer(service, asked(adapter=name, decode=GenerateDecode(1, 2))).score for name in ("ask", "tell", "look")
    }
    assert len(scores) == 3


def test_an_item_of_a_gallery_may_be_asked_about(service: Service, collection: Collection) -> None:
    from_bytes = answer(service, asked(media=MediaBytes("image", picture(2))))
    from_gallery = answer(service, asked(media=GalleryMedia("pictures", "picture-2")))
    assert from_gallery == from_bytes
    clip = answer(service, asked(media=GalleryMedia("clips", "clip-1")))
    assert clip.answer
    assert answer(service, asked(media=GalleryMedia("clips", "clip-1"))) == clip


def test_unknown_words_are_told(service: Service) -> None:
    assert answer(service, asked(question="is the zyx red?")).warnings == ("unknown words: zyx",)


def test_stage_times_are_told(service: Service) -> None:
    first, second = context(), context()
    query = asked(media=MediaBytes("image", picture(101)))
    answer(service, query, first)
    assert set(first.stage_ms) == {"decode", "vision", "generate"}
    answer(service, query, second)
    assert set(second.stage_ms) == {"generate"}


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (asked(adapter="nobody"), AdapterNotFound, "nobody"),
        (asked(adapter="find"), BadQuery, "find was made for retrieval, not for questions"),
        (asked(question=" "), BadQuery, "question is empty"),
        (asked(question="red " * 40), BadQuery, "42 tokens; at most 16"),
        (asked(adapter=BASE_ADAPTER, decode=RankDecode()), BadQuery, "brings no answer list"),
        (asked(decode=RankDecode(())), BadQuery, "candidates is empty"),
        (asked(decode=RankDecode(("red", "  "))), BadQuery, "candidate 1 has no words"),
        (asked(decode=RankDecode(("red " * 30,))), BadQuery, "candidate 0 has 32 tokens; 24 fit"),
        (asked(decode=RankDecode(tuple(str(i) for i in range(31)))), TooLarge, "31 candidates; at most 30"),
        (asked(decode=RankDecode(("red " * 25_000,) * 21)), TooLarge, "more than 2000000 characters"),
        (asked(decode=GenerateDecode(max_new_tokens=24)), BadQuery, "at most 23"),
        (asked(media=GalleryMedia("nowhere", "x")), GalleryNotFound, "nowhere"),
        (asked(media=MediaBytes("image", b"no picture")), UnsupportedMedia, None),
        (asked(media=MediaBytes("image", picture(1)[:60])), CorruptMedia, None),
        (asked(media=MediaBytes("video", b"no clip")), UnsupportedMedia, None),
    ],
)
def test_what_cannot_be_answered_is_refused(
    service: Service, query: VqaQuery, error: type, message: str | None
) -> None:
    with pytest.raises(error, match=message):
        answer(service, query)


def test_items_that_are_texts_or_not_there_are_refused(service: Service, collection: Collection) -> None:
    with pytest.raises(BadQuery, match="holds texts"):
        answer(service, asked(media=GalleryMedia("texts", "text-0")))
    with pytest.raises(GalleryNotFound, match="no item 'picture-99'"):
        answer(service, asked(media=GalleryMedia("pictures", "picture-99")))


def test_a_deadline_of_a_millisecond_is_told(service: Service) -> None:
    with pytest.raises(DeadlineExceeded):
        answer(service, ASK, context(0.001))


def test_no_budget_means_no_decoding(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("decoded without a permit")

    door = service.runtime.admission
    with door.permit(door.flops * door.max_queue_seconds):
        monkeypatch.setattr(service.runtime.media, "image", never)
        with pytest.raises(Overloaded) as refusal:
            service.call(service.runtime.vqa.answer(ASK, context()))
        assert refusal.value.retry_after_s > 0


# --- many at once --------------------------------------------------------------------------------------------


def num_looks(service: Service) -> tuple[float, float]:
    """Media decoded so far, and jobs that looked at one."""
    sample = service.runtime.metrics.registry.get_sample_value
    decoded = sample("bank_stage_seconds_count", {"stage": "decode"})
    return decoded or 0.0, sample("bank_batch_jobs_sum", {"stage": "vision"}) or 0.0


QUESTIONS = ("what colour is it?", "is the circle big?", "what is red?", "is it a square?")
DECODES = (GenerateDecode(), GenerateDecode(1, 3), RankDecode(), RankDecode(CHOICES, k=2))


@pytest.mark.parametrize(
    "media",
    [MediaBytes("image", picture(102)), MediaBytes("video", make_clip(num_frames=11, size=(32, 32)))],
    ids=["picture", "clip"],
)
def test_many_questions_about_one_medium_look_at_it_once_and_are_answered_as_if_alone(
    service: Service, media: MediaBytes
) -> None:
    runtime = service.runtime
    queries = [
        VqaQuery(adapter, question, media, decode)
        for adapter in ("ask", "tell")
        for question, decode in zip(QUESTIONS, DECODES, strict=True)
    ]
    unshared = StageSet(runtime.engine, runtime.backbones, runtime.media, Metrics(), feature_cache_bytes=0)
    alone = VqaPipeline(unshared, runtime.loader, runtime.galleries, runtime.admission, max_candidates=30)
    expected = [service.call(alone.answer(query, context())) for query in queries]
    before = num_looks(service)

    async def at_once() -> list[VqaAnswer]:
        return await asyncio.gather(*(runtime.vqa.answer(query, context()) for query in queries))

    for got, want in zip(service.call(at_once()), expected, strict=True):
        assert (got.answer, got.index, got.adapter, got.warnings) == (
            want.answer,
            want.index,
            want.adapter,
            want.warnings,
        )
        assert got.score == pytest.approx(want.score, abs=1e-4)
    decoded, looked = (now - then for now, then in zip(num_looks(service), before, strict=True))
    assert (decoded, looked) == (2, 2)  # once for each adapter
    assert_nothing_taken(runtime)


def test_what_is_kept_is_not_changed_by_those_who_use_it(service: Service, collection: Collection) -> None:
    runtime = service.runtime
    media = MediaBytes("video", make_clip(num_frames=14, size=(32, 32)))

    async def kept_of(adapter: str) -> list[torch.Tensor]:
        async with runtime.loader.pin(adapter, LOCAL) as pin:
            stages = runtime.stages.blip(pin)
            output = (await stages.see(await stages.uploaded(media), pin, context())).output
            return [tensor for tensor in (output.states, output.frames) if tensor is not None]

    tensors = [tensor for adapter in ("ask", "find") for tensor in service.call(kept_of(adapter))]
    before = [tensor.clone() for tensor in tensors]
    for decode in DECODES:
        answer(service, asked(media=media, decode=decode))
    for gallery, rerank in (("clips", "frames"), ("weighted", "none"), ("texts", "match")):
        query = RetrieveQuery(gallery, media, 3, rerank)  # type: ignore[arg-type]
        service.call(runtime.retrieve.search(query, context()))
    now = [tensor for adapter in ("ask", "find") for tensor in service.call(kept_of(adapter))]
    assert all(one is other for one, other in zip(tensors, now, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_who_asks_about_what_was_seen_is_admitted_for_the_answer_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, admitted = service.runtime.admission, []
    permit = door.permit

    def noted(cost: float) -> Any:
        admitted.append(cost)
        return permit(cost)

    monkeypatch.setattr(door, "permit", noted)
    query = asked(media=MediaBytes("image", picture(103)))
    for _ in range(2):
        answer(service, query)
    assert 0 < admitted[1] < admitted[0]
    stranger = asked(media=MediaBytes("image", picture(104)))
    with door.permit(door.flops * door.max_queue_seconds - (admitted[0] + admitted[1]) / 2):
        with pytest.raises(Overloaded):
            service.call(service.runtime.vqa.answer(stranger, context()))
        service.call(service.runtime.vqa.answer(query, context()))


def test_failures_stay_with_their_own_request(service: Service) -> None:
    """Good, broken, unknown, late and abandoned requests at once: each gets what it would get alone."""
    good = [asked(adapter=name) for name in ("ask", "tell", "look")]
    alone = [answer(service, query) for query in good]
    bad = [
        (asked(media=MediaBytes("image", b"no picture")), context(), UnsupportedMedia),
        (asked(adapter="nobody"), context(), AdapterNotFound),
        (asked(question=""), context(), BadQuery),
        (ASK, context(0.0005), DeadlineExceeded),
    ]

    async def story() -> None:
        vqa = service.runtime.vqa
        tasks = [asyncio.create_task(vqa.answer(query, context())) for query in good * 4]
        failing = [asyncio.create_task(vqa.answer(query, request)) for query, request, _ in bad]
        left = [asyncio.create_task(vqa.answer(ASK, context())) for _ in range(4)]
        for number, task in enumerate(left):
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
        outcomes = await asyncio.gather(*failing, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [error for _, _, error in bad]
        assert all(isinstance(o, asyncio.CancelledError) for o in await asyncio.gather(*left, return_exceptions=True))
        for got, expected in zip(await asyncio.gather(*tasks), alone * 4, strict=True):
            assert (got.answer, got.adapter) == (expected.answer, expected.adapter)
            assert got.score == pytest.approx(expected.score, abs=1e-4)

    service.call(story())
    runtime = service.runtime
    assert runtime.admission.num_permits == holders(runtime.bank) == 0
