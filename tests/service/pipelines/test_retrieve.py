"""Searches: every kind of gallery and query, both reranks against a plain recomputation, and what is refused."""

import asyncio
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound
from adapters.families.uniadapter import frame_factors
from service.auth import LOCAL
from service.bank import batch_leases
from service.errors import (
    BadQuery,
    DeadlineExceeded,
    GalleryNotFound,
    IndexStale,
    Overloaded,
    UnsupportedMedia,
)
from service.gallery.sources import Source
from service.gallery.store import Gallery
from service.pipelines.galleries import BuildOptions
from service.pipelines.retrieve import NOT_MATCHED, Candidates, match_scores, shortlist
from service.pipelines.stages import Medium
from service.types import (
    GalleryMedia,
    MediaBytes,
    RequestContext,
    RerankMode,
    RetrievalInput,
    RetrieveAnswer,
    RetrieveQuery,
    TextQuery,
)
from tests.service.media.clips import make_clip
from tests.service.pipelines.conftest import TEXTS, Collection
from tests.service.test_bank import assert_nothing_taken, holders
from tests.service.worlds import Service, World, context, picture, running

Floats = np.ndarray[Any, np.dtype[np.float32]]
SENTENCE = TextQuery("a red circle and a square")
pytestmark = pytest.mark.usefixtures("collection")


def search(service: Service, query: RetrieveQuery, request: RequestContext | None = None) -> RetrieveAnswer:
    """The answer; whatever comes of it, nothing stays taken."""
    try:
        return service.call(service.runtime.retrieve.search(query, request or context()))
    finally:
        assert_nothing_taken(service.runtime)


def wanted(gallery: str, query: RetrievalInput = SENTENCE, k: int = 5, **changes: Any) -> RetrieveQuery:
    return replace(RetrieveQuery(gallery, query, k), **changes)


# --- by hand -------------------------------------------------------------------------------------------------


def text_vector(service: Service, adapter: str, text: str) -> Floats:
    """The sentence's unit feature, without the engine."""

    async def story() -> Floats:
        runtime = service.runtime
        async with runtime.loader.pin(adapter, LOCAL) as pin:
            with batch_leases(runtime.bank) as leases, torch.inference_mode():
                assert leases.add(pin.digest)
                adaptation = leases.adaptation([pin.digest])
                ids = torch.tensor([runtime.backbone.tokenize(text).ids])
                model = runtime.backbone.model
                hidden = model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool), adaptation)
                vector = functional.normalize(model.project("text_proj", hidden[:, 0], adaptation), dim=-1)[0]
                return cast(Floats, vector.numpy())

    return service.call(story())


def match_logit(service: Service, adapter: str, text: str, medium: Medium, *, weighs_frames: bool) -> float:
    """One pair through the cross-encoder, without the engine."""

    async def story() -> float:
        runtime, model = service.runtime, service.runtime.backbone.model
        async with runtime.loader.pin(adapter, LOCAL) as pin:
            seen = await runtime.stages.blip(pin).see(medium, pin, context())
            states, frames = seen.output.states, seen.output.frames
            assert frames is not None
            with batch_leases(runtime.bank) as leases, torch.inference_mode():
                assert leases.add(pin.digest)
                adaptation = leases.adaptation([pin.digest])
                ids = torch.tensor([runtime.backbone.tokenize(text).ids])
                mask = torch.ones_like(ids, dtype=torch.bool)
                factors = None
                if weighs_frames:
                    hidden = model.encode_text(ids, mask, adaptation)
                    vector = functional.normalize(model.project("text_proj", hidden[:, 0], adaptation), dim=-1)[0]
                    factors = frame_factors((functional.normalize(frames, dim=-1) @ vector)[None], states.shape[1])
                y = states.flatten(0, 1)[None]
                y_mask = torch.ones(y.shape[:2], dtype=torch.bool)
                hidden = model.encode_multimodal(ids, mask, y, y_mask, adaptation, factors)
                return float(model.project("itm_head", hidden[:, 0], adaptation)[0, 1])

    return service.call(story())


def by_cosine(gallery: Gallery, vector: Floats, k: int) -> dict[str, float]:
    """The k best items and their scores, best first."""
    scores = gallery.vectors @ vector
    return {gallery.ids[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")[:k]}


# --- searching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gallery", "adapter"),
    [("pictures", "find"), ("clips", "find"), ("texts", "find"), ("headed", "heads"), ("plain", BASE_ADAPTER)],
)
def test_a_sentence_finds_the_nearest_items_of_any_gallery(
    service: Service, collection: Collection, gallery: str, adapter: str
) -> None:
    got = search(service, wanted(gallery, k=4))
    expected = by_cosine(collection[gallery], text_vector(service, adapter, SENTENCE.text), 4)
    assert [hit.id for hit in got.hits] == list(expected)
    assert [hit.score for hit in got.hits] == pytest.approx(list(expected.values()), abs=1e-5)
    assert all(hit.scores == {"search": hit.score} for hit in got.hits)
    assert (got.gallery, got.gallery_version, got.num_items) == (gallery, 1, len(collection[gallery]))
    assert got.adapter.name == adapter
    assert (got.rerank, got.rerank_depth) == ("none", 0)


def test_a_picture_finds_itself_and_texts_near_it(service: Service, collection: Collection) -> None:
    media = MediaBytes("image", picture(3))
    got = search(service, wanted("pictures", media, k=2))
    assert got.hits[0].id == "picture-3"
    assert got.hits[0].score == pytest.approx(1.0, abs=1e-5)
    vector = collection["pictures"].vectors[3]
    assert [hit.id for hit in search(service, wanted("texts", media)).hits] == list(
        by_cosine(collection["texts"], vector, 5)
    )


def test_a_clip_finds_itself_however_its_gallery_pools(service: Service) -> None:
    clip = MediaBytes("video", make_clip(num_frames=8 + 12, size=(32, 32)))
    for gallery in ("clips", "weighted"):
        hit = search(service, wanted(gallery, clip, k=1)).hits[0]
        assert hit.id == "clip-1"
        assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_an_item_of_a_gallery_searches_another(service: Service) -> None:
    got = search(service, wanted("clips", GalleryMedia("pictures", "picture-0"), k=10))
    by_bytes = search(service, wanted("clips", MediaBytes("image", picture(0)), k=10))
    assert [hit.id for hit in got.hits] == [hit.id for hit in by_bytes.hits]
    assert [hit.score for hit in got.hits] == pytest.approx([hit.score for hit in by_bytes.hits], abs=1e-6)


def test_hits_tell_what_the_gallery_knows_of_them(service: Service) -> None:
    hit = search(service, wanted("pictures", MediaBytes("image", picture(2)), k=1)).hits[0]
    assert (hit.text, hit.metadata, hit.has_thumbnail, hit.has_media, hit.frames) == (
        "caption 2",
        {"number": 2},
        True,
        True,
        (),
    )
    text = search(service, wanted("texts", k=1)).hits[0]
    assert text.text in TEXTS
    assert (text.has_thumbnail, text.has_media) == (False, False)


def test_k_above_the_gallerys_size_gives_all(service: Service, collection: Collection) -> None:
    for gallery in ("clips", "headed"):
        got = search(service, wanted(gallery, k=20))
        assert {hit.id for hit in got.hits} == set(collection[gallery].ids)
        assert [hit.score for hit in got.hits] == sorted((hit.score for hit in got.hits), reverse=True)


def test_unknown_words_and_stage_times_are_told(service: Service) -> None:
    request = context()
    got = search(service, wanted("clips", TextQuery("a zyx circle"), rerank="frames"), request)
    assert got.warnings == ("unknown words: zyx",)
    assert set(request.stage_ms) == {"text", "search", "frames"}


# --- looking again -------------------------------------------------------------------------------------------


def test_frames_pools_each_clip_as_the_query_weighs_its_frames(service: Service, collection: Collection) -> None:
    """score = cos(q, sum_t w_t v_t) with w = softmax_t(cos(v_t, q) / tau)."""
    for name in ("clips", "weighted"):
        got = search(service, wanted(name, k=4, rerank="frames"))
        query, gallery = text_vector(service, "find", SENTENCE.text), collection[name]
        expected = {}
        for position, item_id in enumerate(gallery.ids):
            frames = np.asarray(gallery.frames_of([position])[0][0], np.float64)
            cosines = frames @ query / np.linalg.norm(frames, axis=1)
            weights = np.exp(cosines / gallery.manifest.tau)
            weights /= weights.sum()
            pooled = weights @ frames
            expected[item_id] = (float(pooled @ query / np.linalg.norm(pooled)), weights)
        assert [hit.id for hit in got.hits] == sorted(expected, key=lambda item: -expected[item][0])
        for hit in got.hits:
            score, weights = expected[hit.id]
            assert hit.score == hit.scores["frames"] == pytest.approx(score, abs=1e-5)
            assert set(hit.scores) == {"search", "frames"}
            assert [frame.weight for frame in hit.frames] == pytest.approx(list(weights), abs=1e-5)
            times = [frame.time_s for frame in hit.frames]
            assert times == sorted(set(times))


@pytest.mark.parametrize(("gallery", "adapter"), [("pictures", "find"), ("clips", "find"), ("matched", "frames")])
def test_match_scores_pairs_with_the_cross_encoder(
    service: Service, collection: Collection, gallery: str, adapter: str
) -> None:
    got = search(service, wanted(gallery, k=3, rerank="match", rerank_depth=4))
    assert got.rerank_depth == 4
    opened = collection[gallery]
    first = by_cosine(opened, text_vector(service, adapter, SENTENCE.text), 4)
    weighs_frames = adapter == "frames"
    logits = {}
    for item_id in first:
        position = opened.position_of(item_id)
        medium = service.call(service.runtime.galleries.medium_at(opened, position))
        logits[item_id] = match_logit(service, adapter, SENTENCE.text, medium, weighs_frames=weighs_frames)
    assert [hit.id for hit in got.hits] == sorted(logits, key=lambda item: -logits[item])[:3]
    for hit in got.hits:
        assert hit.score == hit.scores["match"] == pytest.approx(logits[hit.id], abs=1e-4)
        assert hit.scores["search"] == pytest.approx(first[hit.id], abs=1e-5)
        assert bool(hit.frames) == weighs_frames
        if weighs_frames:
            assert sum(frame.weight for frame in hit.frames) == pytest.approx(1.0)


def test_a_picture_is_matched_with_texts(service: Service, collection: Collection) -> None:
    got = search(service, wanted("texts", MediaBytes("image", picture(4)), k=5, rerank="match"))
    medium = Medium("image", picture(4))
    expected = {
        item: match_logit(service, "find", text, medium, weighs_frames=False)
        for item, text in zip(collection["texts"].ids, TEXTS, strict=True)
    }
    assert [hit.id for hit in got.hits] == sorted(expected, key=lambda item: -expected[item])
    assert [hit.score for hit in got.hits] == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-4)


def test_a_second_match_finds_the_states_it_needs_in_the_cache(service: Service) -> None:
    first, second = context(), context()
    query = wanted("matched", TextQuery("the circle is small"), k=4, rerank="match")
    search(service, query, first)
    answer = search(service, query, second)
    assert "decode" not in second.stage_ms
    assert "vision" not in second.stage_ms
    assert answer.hits


@pytest.mark.parametrize(
    "media",
    [MediaBytes("image", picture(105)), MediaBytes("video", make_clip(num_frames=13, size=(32, 32)))],
    ids=["picture", "clip"],
)
def test_searches_with_one_medium_look_at_it_once(
    service: Service, media: MediaBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, admitted = service.runtime, []
    permit = runtime.admission.permit

    def noted(cost: float) -> Any:
        admitted.append(cost)
        return permit(cost)

    monkeypatch.setattr(runtime.admission, "permit", noted)
    queries = [wanted("clips", media, k=3), wanted("texts", media, k=3, rerank="match"), wanted("weighted", media, k=2)]

    def num_looked() -> float:
        return runtime.metrics.registry.get_sample_value("bank_batch_jobs_sum", {"stage": "vision"}) or 0.0

    async def at_once() -> list[RetrieveAnswer]:
        return await asyncio.gather(*(runtime.retrieve.search(query, context()) for query in queries * 3))

    before = num_looked()
    answers = service.call(at_once())
    assert num_looked() == before + 1
    assert answers[:3] == answers[3:6] == answers[6:]
    plain = admitted[0]
    assert plain > 0 and admitted.count(plain) == 6  # nobody had seen it when they came
    assert search(service, queries[0]).hits == answers[0].hits
    assert admitted[-1] == 0.0


def test_many_candidates_are_matched_in_parts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    query = wanted("pictures", k=6, rerank="match", rerank_depth=6)
    whole = search(service, query)
    monkeypatch.setattr("service.pipelines.retrieve.PAIRS_PER_JOB", 2)
    parts = search(service, query)
    assert [hit.id for hit in parts.hits] == [hit.id for hit in whole.hits]
    assert [hit.score for hit in parts.hits] == pytest.approx([hit.score for hit in whole.hits], abs=1e-5)


def test_a_clip_whose_file_is_gone_fails_the_match_and_not_the_search(service: Service, tmp_path: Any) -> None:
    from service.errors import MissingMedia
    from tests.service.pipelines.conftest import picture_sources

    sources = picture_sources(tmp_path, 3)
    service.call(service.runtime.galleries.build("vanishing", "find", sources, BuildOptions("image"), context()))
    (tmp_path / "1.png").unlink()
    assert len(search(service, wanted("vanishing", k=3)).hits) == 3
    with pytest.raises(MissingMedia, match="picture-1"):
        search(service, wanted("vanishing", k=3, rerank="match"))


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_query_of_another_adapter_is_stale_and_both_are_named(service: Service) -> None:
    for adapter in ("heads", "frames", BASE_ADAPTER):
        with pytest.raises(IndexStale, match=r"'clips' version 1 was embedded with find@1; .* " + adapter):
            search(service, wanted("clips", adapter=adapter))
    with pytest.raises(IndexStale, match=r"embedded with __base__; .* find@1"):
        search(service, wanted("plain", adapter="find"))


def test_the_galleries_own_adapter_may_be_asked_for_by_any_name(service: Service) -> None:
    implied = search(service, wanted("clips"))
    digest = implied.adapter.digest
    for reference in ("find", "find@1", digest):
        assert search(service, wanted("clips", adapter=reference)).hits == implied.hits


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (wanted("nowhere"), GalleryNotFound, "nowhere"),
        (wanted("clips", k=0), BadQuery, "between 1 and 20, not 0"),
        (wanted("clips", k=21), BadQuery, "between 1 and 20, not 21"),
        (wanted("pictures", k=5, rerank="match", rerank_depth=3), BadQuery, "rerank_depth 3 is below k 5"),
        (wanted("pictures", k=7, rerank="match"), BadQuery, "rerank_depth 7 is above the limit of 6"),
        (wanted("texts", rerank="frames"), BadQuery, "this one holds texts"),
        (wanted("texts", rerank="match"), BadQuery, "both sides here are alike"),
        (wanted("clips", MediaBytes("image", picture(0)), k=4, rerank="match"), BadQuery, "both sides here are alike"),
        (wanted("clips", TextQuery("  ")), BadQuery, "query.text is empty"),
        (wanted("clips", TextQuery("red " * 20)), BadQuery, "22 tokens; at most 16"),
        (wanted("clips", MediaBytes("image", b"no picture")), UnsupportedMedia, None),
        (wanted("clips", GalleryMedia("texts", "text-0")), BadQuery, "holds texts"),
        (wanted("clips", GalleryMedia("pictures", "nothing")), GalleryNotFound, "no item 'nothing'"),
        (wanted("clips", adapter="ask"), BadQuery, "ask was made for vqa, not for retrieval"),
        (wanted("clips", adapter="nobody"), AdapterNotFound, "nobody"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    service: Service, query: RetrieveQuery, error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        search(service, query)


def test_a_deadline_of_a_millisecond_is_told(service: Service) -> None:
    with pytest.raises(DeadlineExceeded):
        search(service, wanted("clips", rerank="match", k=4), context(0.001))


def test_no_budget_no_search(service: Service) -> None:
    door = service.runtime.admission
    with door.permit(door.flops * door.max_queue_seconds), pytest.raises(Overloaded):
        service.call(service.runtime.retrieve.search(wanted("clips", rerank="match", k=4), context()))


def test_searches_that_are_left_in_the_middle_leave_nothing_behind(service: Service) -> None:
    async def story() -> None:
        modes: list[RerankMode] = ["none", "match", "frames"]
        queries = [wanted("matched", k=4, rerank=modes[i % 3]) for i in range(24)]
        tasks = [asyncio.create_task(service.runtime.retrieve.search(query, context())) for query in queries]
        for number, task in enumerate(tasks):
            if number % 2:
                await asyncio.sleep(0.002)
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, RetrieveAnswer) for outcome in outcomes[::2])

    service.call(story())
    assert service.runtime.admission.num_permits == holders(service.runtime.bank) == 0


def test_the_answer_names_the_version_that_embedded_the_gallery(world: World, tmp_path: Any) -> None:
    """Another name may hold the same weights; the gallery says by whom it was made."""
    world = world.copy(tmp_path)
    world.push("zebra", "retrieval", seed=70)
    world.push("zebra", "retrieval", seed=4)  # the weights of find@1
    sources = [Source("a", "text", text="a red circle")]
    with running(world.settings) as service:
        build = service.runtime.galleries.build("striped", "zebra@2", sources, BuildOptions("text"), context())
        service.call(build)
        got = search(service, wanted("striped", k=1)).adapter
        assert (got.name, got.version) == ("zebra", 2)


# --- the authors' score table --------------------------------------------------------------------------------


def test_the_shortlist_takes_the_lower_position_of_equals() -> None:
    assert shortlist(np.array([0.1, 0.5, 0.5, 0.9], np.float32), 3) == [3, 1, 2]
    assert shortlist(np.array([0.1], np.float32), 9) == [0]


def test_what_was_not_looked_at_gets_the_authors_score() -> None:
    similarities = np.array([0.1, 0.5, 0.4], np.float32)

    def match(chosen: list[int]) -> Floats:
        assert chosen == [1, 2]
        return np.array([[0.0, 2.0], [0.0, 3.0]], np.float32)

    assert match_scores(similarities, 2, match).tolist() == [NOT_MATCHED, 2.0, 3.0]
    assert match_scores(similarities, 2, match, beta=2.0).tolist() == pytest.approx([NOT_MATCHED, 3.0, 3.8])


def test_reordered_candidates_keep_all_scores_and_the_earlier_order_of_equals() -> None:
    found = Candidates([7, 3, 9], {"search": np.array([0.9, 0.8, 0.7], np.float32)}, "search")
    again = found.ordered("match", np.array([1.0, 2.0, 1.0], np.float32))
    assert again.positions == [3, 7, 9]
    assert again.scores["search"].tolist() == pytest.approx([0.8, 0.9, 0.7])
    assert again.by == "match"
    head = again.head(2)
    assert (head.positions, len(head.scores["match"])) == ([3, 7], 2)
