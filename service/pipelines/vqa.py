"""Questions about media, and captions: pin -> permit -> decode -> perceive -> generate or rank."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from adapters.config import Task
from service.admission import Admission
from service.errors import BadQuery, TooLarge
from service.loader import Loader, Pin
from service.pipelines.answering import Answering, Candidates, answering
from service.pipelines.galleries import Galleries
from service.pipelines.stage_set import StageSet
from service.pipelines.stages import EncodedQuery, Medium, within_deadline
from service.types import (
    Alternative,
    CaptionQuery,
    GalleryMedia,
    GenerateDecode,
    MediaBytes,
    MediaSource,
    RankDecode,
    RequestContext,
    VqaAnswer,
    VqaQuery,
)

CACHED_ANSWER_LISTS = 64
MAX_CANDIDATE_CHARS = 2_000_000  # of all candidates together: tokens take a hundred times the memory of their text
PURPOSE: dict[Task, str] = {"vqa": "questions", "caption": "captions"}


class VqaPipeline:
    """Answers `/vqa` and `/caption`."""

    def __init__(
        self, stages: StageSet, loader: Loader, galleries: Galleries, admission: Admission, *, max_candidates: int
    ) -> None:
        self._stages = stages
        self._loader = loader
        self._galleries = galleries
        self._admission = admission
        self._max_candidates = max_candidates
        self._answer_lists: OrderedDict[str, Candidates] = OrderedDict()

    async def answer(self, query: VqaQuery, context: RequestContext) -> VqaAnswer:
        """Answer one question.

        Raises: AdapterNotFound, Forbidden, BadQuery, BadMedia, MissingPart, Overloaded, TooLarge, DeadlineExceeded and what
        loading an adapter can raise.
        """
        async with (
            within_deadline(context),
            self._loader.pin(query.adapter, context.principal, context.routing_key) as pin,
        ):
            way = self._way(pin, "vqa", query.media)
            question = way.question(query.question, pin)
            if isinstance(query.decode, RankDecode):
                return await self._ranked(query.media, query.decode, question, way, pin, context)
            return await self._generated(query.media, query.decode, question, way, pin, context)

    async def caption(self, query: CaptionQuery, context: RequestContext) -> VqaAnswer:
        """Put a medium into words. Raises: as `answer`."""
        async with (
            within_deadline(context),
            self._loader.pin(query.adapter, context.principal, context.routing_key) as pin,
        ):
            way = self._way(pin, "caption", query.media)
            return await self._generated(query.media, query.decode, way.caption(pin), way, pin, context)

    def _way(self, pin: Pin, task: Task, media: MediaSource) -> Answering:
        """How the adapter's backbone answers. Raises: BadQuery, MissingPart."""
        if pin.config is not None and pin.config.task != task:
            raise BadQuery(f"{pin.info.name} was made for {pin.config.task}, not for {PURPOSE[task]}", param="adapter")
        way = answering(self._stages.of(pin))
        way.backbone.require(task)
        way.check_medium(media, pin)
        return way

    async def _generated(
        self,
        media: MediaSource,
        decode: GenerateDecode,
        question: EncodedQuery,
        way: Answering,
        pin: Pin,
        context: RequestContext,
    ) -> VqaAnswer:
        search = way.search(decode, question, pin)
        medium = await self._medium(media, pin, context)
        with self._admission.permit(way.cost_of_generating(medium, question, search, pin)):
            hypotheses = await way.generate(medium, question, search, pin, context)
        options = [Alternative(way.backbone.detokenize(h.ids), h.score) for h in hypotheses]
        return VqaAnswer(options[0].answer, options[0].score, None, tuple(options[1:]), pin.info, question.warnings)

    async def _ranked(
        self,
        media: MediaSource,
        decode: RankDecode,
        question: EncodedQuery,
        way: Answering,
        pin: Pin,
        context: RequestContext,
    ) -> VqaAnswer:
        candidates, texts = await asyncio.to_thread(self._candidates, decode, way, pin)
        medium = await self._medium(media, pin, context)
        k = min(decode.k or way.decoding(pin).rank_k, len(candidates))
        with self._admission.permit(way.cost_of_ranking(medium, question, candidates, k, pin)):
            ranked = await way.rank(medium, question, candidates, k, pin, context)
        order = sorted(range(k), key=lambda place: (-ranked.scores[place], ranked.indices[place]))
        options = [Alternative(texts[ranked.indices[i]], ranked.scores[i], ranked.indices[i]) for i in order]
        return VqaAnswer(
            options[0].answer, options[0].score, options[0].index, tuple(options[1:]), pin.info, question.warnings
        )

    async def _medium(self, media: MediaSource, pin: Pin, context: RequestContext) -> Medium:
        """What to look at, with what is kept of it: this is before the permit, which then costs less."""
        stages = self._stages.of(pin)
        match media:
            case MediaBytes():
                medium = await stages.uploaded(media)
            case GalleryMedia(gallery, item):
                medium = await self._galleries.medium(gallery, item, context.principal)
        return stages.recall(medium, pin, context)

    def _candidates(self, decode: RankDecode, way: Answering, pin: Pin) -> tuple[Candidates, Sequence[str]]:
        """Token ids and texts of the answers to choose from."""
        decoding = way.decoding(pin)
        if decode.candidates is not None:
            if len(decode.candidates) > self._max_candidates:
                raise TooLarge(f"{len(decode.candidates)} candidates; at most {self._max_candidates} are allowed")
            if sum(map(len, decode.candidates)) > MAX_CANDIDATE_CHARS:
                raise TooLarge(
                    f"the candidates have more than {MAX_CANDIDATE_CHARS} characters", param="decode.candidates"
                )
            if not decode.candidates:
                raise BadQuery("decode.candidates is empty", param="decode.candidates")
            return _tokenized(way, decode.candidates), decode.candidates
        if decoding.answer_ids:
            return decoding.answer_ids, [way.backbone.detokenize(ids) for ids in decoding.answer_ids]
        if not decoding.answers:
            raise BadQuery(f"{pin.info.name} brings no answer list: give decode.candidates", param="decode.candidates")
        known = self._answer_lists.get(pin.digest)
        if known is None:
            known = self._answer_lists[pin.digest] = _tokenized(way, decoding.answers)
            if len(self._answer_lists) > CACHED_ANSWER_LISTS:
                self._answer_lists.popitem(last=False)
        return known, decoding.answers


def _tokenized(way: Answering, texts: Sequence[str]) -> Candidates:
    limit = way.max_answer_length()
    tokenized = way.backbone.tokenize_answers(texts)
    for index, ids in enumerate(tokenized):
        if len(ids) < 3:
            raise BadQuery(f"candidate {index} has no words", param="decode.candidates")
        if len(ids) > limit:
            raise BadQuery(f"candidate {index} has {len(ids)} tokens; {limit} fit", param="decode.candidates")
    return tuple(tokenized)
