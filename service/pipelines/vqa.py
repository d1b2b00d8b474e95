"""Questions about pictures and clips: pin -> permit -> decode -> vision -> generate or rank."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from adapters.config import AdapterConfig, AnswerDecoding, Preprocessing
from service.admission import Admission
from service.backbone.cost import decode_cost, tokens_per_frame, vision_cost
from service.errors import BadQuery, TooLarge
from service.loader import Loader, Pin
from service.pipelines.galleries import Galleries
from service.pipelines.stages import (
    Medium,
    StageRunner,
    preprocessing_of,
    question_cost,
    text_limit,
    tokenize_within,
    within_deadline,
)
from service.types import (
    Alternative,
    GalleryMedia,
    GenerateDecode,
    GenerateInput,
    Hypothesis,
    MediaBytes,
    MediaSource,
    RankDecode,
    RankInput,
    RequestContext,
    VqaAnswer,
    VqaQuery,
)

CACHED_ANSWER_LISTS = 64
MAX_CANDIDATE_CHARS = 2_000_000  # of all candidates together: tokens take a hundred times the memory of their text
Candidates = tuple[tuple[int, ...], ...]


class VqaPipeline:
    """Answers `/vqa`."""

    def __init__(
        self, stages: StageRunner, loader: Loader, galleries: Galleries, admission: Admission, *, max_candidates: int
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
            return await self._answer(query, pin, context)

    async def _answer(self, query: VqaQuery, pin: Pin, context: RequestContext) -> VqaAnswer:
        backbone = self._stages.backbone
        if pin.config is not None and pin.config.task != "vqa":
            raise BadQuery(f"{pin.info.name} was made for {pin.config.task}, not for questions", param="adapter")
        backbone.require("vqa")
        limit = text_limit(pin.config, backbone)
        question = tokenize_within(backbone, query.question, limit, param="question")
        decoding = _decoding(pin.config)
        candidates: Candidates = ()
        texts: Sequence[str] = ()
        if isinstance(query.decode, RankDecode):
            candidates, texts = await asyncio.to_thread(self._candidates, query.decode, decoding, pin)
        medium = await self._medium(query.media, context)
        cost = self._cost(query, pin, len(question.ids), candidates)
        with self._admission.permit(cost):
            seen = await self._stages.see(medium, pin, context)
            states = seen.output.states.flatten(0, 1)  # [F*P, D]
            if isinstance(query.decode, GenerateDecode):
                num_beams, max_length = self._lengths(query.decode, decoding)
                asked = GenerateInput(question.ids, states, num_beams, max_length)
                return self._generated(
                    (await self._stages.generate(asked, pin, context)).hypotheses, pin, question.warnings
                )
            k = min(query.decode.k or decoding.rank_k, len(candidates))
            ranked = await self._stages.rank(RankInput(question.ids, states, candidates, k), pin, context)
        order = sorted(range(k), key=lambda place: (-ranked.scores[place], ranked.indices[place]))
        options = [Alternative(texts[ranked.indices[i]], ranked.scores[i], ranked.indices[i]) for i in order]
        return VqaAnswer(
            options[0].answer, options[0].score, options[0].index, tuple(options[1:]), pin.info, question.warnings
        )

    def _generated(self, hypotheses: Sequence[Hypothesis], pin: Pin, warnings: tuple[str, ...]) -> VqaAnswer:
        options = [Alternative(self._stages.backbone.detokenize(h.ids), h.score) for h in hypotheses]
        return VqaAnswer(options[0].answer, options[0].score, None, tuple(options[1:]), pin.info, warnings)

    async def _medium(self, media: MediaSource, context: RequestContext) -> Medium:
        match media:
            case MediaBytes(kind, data):
                return Medium(kind, data)
            case GalleryMedia(gallery, item):
                return await self._galleries.medium(gallery, item, context.principal)

    def _lengths(self, decode: GenerateDecode, decoding: AnswerDecoding) -> tuple[int, int]:
        """Beams, and the length with [DEC]. Raises: BadQuery when the decoder has no such positions."""
        stack = self._stages.backbone.config.decoder
        assert stack is not None
        length = decoding.max_length if decode.max_new_tokens is None else decode.max_new_tokens + 1
        if length > stack.max_positions:
            raise BadQuery(f"max_new_tokens may be at most {stack.max_positions - 1}", param="decode.max_new_tokens")
        return decode.num_beams or decoding.num_beams, length

    def _candidates(self, decode: RankDecode, decoding: AnswerDecoding, pin: Pin) -> tuple[Candidates, Sequence[str]]:
        """Token ids and texts of the answers to choose from."""
        backbone = self._stages.backbone
        if decode.candidates is not None:
            if len(decode.candidates) > self._max_candidates:
                raise TooLarge(f"{len(decode.candidates)} candidates; at most {self._max_candidates} are allowed")
            if sum(map(len, decode.candidates)) > MAX_CANDIDATE_CHARS:
                raise TooLarge(
                    f"the candidates have more than {MAX_CANDIDATE_CHARS} characters", param="decode.candidates"
                )
            if not decode.candidates:
                raise BadQuery("decode.candidates is empty", param="decode.candidates")
            return self._tokenized(decode.candidates), decode.candidates
        if decoding.answer_ids:
            return decoding.answer_ids, [backbone.detokenize(ids) for ids in decoding.answer_ids]
        if not decoding.answers:
            raise BadQuery(f"{pin.info.name} brings no answer list: give decode.candidates", param="decode.candidates")
        known = self._answer_lists.get(pin.digest)
        if known is None:
            known = self._answer_lists[pin.digest] = self._tokenized(decoding.answers)
            if len(self._answer_lists) > CACHED_ANSWER_LISTS:
                self._answer_lists.popitem(last=False)
        return known, decoding.answers

    def _tokenized(self, texts: Sequence[str]) -> Candidates:
        backbone = self._stages.backbone
        stack = backbone.config.decoder
        assert stack is not None
        tokenized = backbone.tokenize_answers(texts)
        for index, ids in enumerate(tokenized):
            if len(ids) < 3:
                raise BadQuery(f"candidate {index} has no words", param="decode.candidates")
            if len(ids) > stack.max_positions:
                raise BadQuery(
                    f"candidate {index} has {len(ids)} tokens; {stack.max_positions} fit", param="decode.candidates"
                )
        return tuple(tokenized)

    def _cost(self, query: VqaQuery, pin: Pin, length: int, candidates: Candidates) -> float:
        """Estimated operations of the whole request; a gallery item may turn out cheaper, being cached."""
        backbone = self._stages.backbone
        preprocessing = preprocessing_of(pin.config, backbone)
        frames = _num_frames(query.media, preprocessing)
        memory = frames * tokens_per_frame(backbone.config, preprocessing.resolution)
        stack = backbone.config.decoder
        assert stack is not None
        decoding = _decoding(pin.config)
        if isinstance(query.decode, GenerateDecode):
            beams, steps = self._lengths(query.decode, decoding)
            rows = beams
        else:
            rows, steps = min(query.decode.k or decoding.rank_k, len(candidates)), max(map(len, candidates))
        return (
            vision_cost(backbone.config, preprocessing.resolution, frames)
            + question_cost(backbone, length, memory)
            + decode_cost(stack, rows, steps, length)
        )


def _decoding(config: AdapterConfig | None) -> AnswerDecoding:
    return (config.decoding if config is not None else None) or AnswerDecoding()


def _num_frames(media: MediaSource, preprocessing: Preprocessing) -> int:
    return 1 if isinstance(media, MediaBytes) and media.kind == "image" else preprocessing.num_frames
