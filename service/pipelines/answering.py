"""How each kind of backbone puts a question, goes on from it, and chooses among given answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.config import AdapterConfig, AnswerDecoding, Preprocessing
from adapters.families.epalm import options_of
from service.backbone.base import Backbone
from service.backbone.cost import decode_cost, encoder_cost, tokens_per_frame
from service.errors import BadQuery
from service.loader import Pin
from service.pipelines.blip import BlipStages, frames_of, preprocessing_of, question_cost, text_limit
from service.pipelines.opt import ENCODER_OF, OptStages
from service.pipelines.stage_set import AnyStages
from service.pipelines.stages import EncodedQuery, Medium, tokenize_within, within_limit
from service.types import (
    ChooseInput,
    ContinueInput,
    GenerateDecode,
    GenerateInput,
    Hypothesis,
    MediaBytes,
    MediaSource,
    RankInput,
    RankOutput,
    RequestContext,
)

Candidates = tuple[tuple[int, ...], ...]
OPT_DECODING = AnswerDecoding(max_length=30)  # of the whole text, as eP-ALM's authors have it
UNSEEN = "without an adapter the language model perceives nothing: the medium was not looked at"


@dataclass(frozen=True)
class Search:
    """How far an answer is searched for: beams, and the longest text, its start included."""

    num_beams: int
    max_length: int


class Answering(Protocol):
    """One kind's way."""

    @property
    def backbone(self) -> Backbone:
        """What answers."""

    def check_medium(self, media: MediaSource, pin: Pin) -> None:
        """Raises: BadQuery for a medium that the adapter cannot perceive."""

    def question(self, text: str, pin: Pin) -> EncodedQuery:
        """A question as it is put. Raises: BadQuery when it is empty or too long."""

    def caption(self, pin: Pin) -> EncodedQuery:
        """What a caption starts from. Raises: MissingPart."""

    def decoding(self, pin: Pin) -> AnswerDecoding:
        """The adapter's defaults."""

    def search(self, decode: GenerateDecode, question: EncodedQuery, pin: Pin) -> Search:
        """How far to search. Raises: BadQuery when the decoder has no such positions."""

    def max_answer_length(self) -> int:
        """Tokens of the longest candidate that can be scored."""

    def cost_of_generating(self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin) -> float:
        """Estimated operations of a request that searches so far for an answer; none for looking, where states were kept."""

    def cost_of_ranking(
        self, medium: Medium, question: EncodedQuery, candidates: Candidates, k: int, pin: Pin
    ) -> float:
        """Estimated operations of a request that scores the best k of the candidates; of looking as above."""

    async def generate(
        self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin, context: RequestContext
    ) -> Sequence[Hypothesis]:
        """Answers, best first; their ids hold words and special tokens of the answer, not of the question."""

    async def rank(
        self,
        medium: Medium,
        question: EncodedQuery,
        candidates: Candidates,
        k: int,
        pin: Pin,
        context: RequestContext,
    ) -> RankOutput:
        """The candidates looked at, and their scores."""


def answering(stages: AnyStages) -> Answering:
    """The way of a backbone's kind."""
    return BlipAnswering(stages) if isinstance(stages, BlipStages) else OptAnswering(stages)


class BlipAnswering:
    """The question is read together with the picture, and the decoder writes from [DEC] on."""

    def __init__(self, stages: BlipStages) -> None:
        self._stages = stages
        self.backbone = stages.backbone

    def check_medium(self, media: MediaSource, pin: Pin) -> None:
        """See Answering."""
        if isinstance(media, MediaBytes) and media.kind == "audio":
            raise BadQuery(f"{pin.info.name} looks at pictures and clips, and hears nothing", param="audio")

    def question(self, text: str, pin: Pin) -> EncodedQuery:
        """See Answering."""
        return tokenize_within(self.backbone, text, text_limit(pin.config, self.backbone), param="question")

    def caption(self, pin: Pin) -> EncodedQuery:
        """See Answering: never."""
        self.backbone.require("caption")
        raise AssertionError("a BLIP does not write captions. This is a bug.")

    def decoding(self, pin: Pin) -> AnswerDecoding:
        """See Answering."""
        return _decoding(pin.config) or AnswerDecoding()

    def search(self, decode: GenerateDecode, question: EncodedQuery, pin: Pin) -> Search:
        """See Answering."""
        decoding = self.decoding(pin)
        length = decoding.max_length if decode.max_new_tokens is None else decode.max_new_tokens + 1
        if length > self.max_answer_length():
            limit = self.max_answer_length() - 1
            raise BadQuery(f"max_new_tokens may be at most {limit}", param="decode.max_new_tokens")
        return Search(decode.num_beams or decoding.num_beams, length)

    def max_answer_length(self) -> int:
        """See Answering."""
        stack = self.backbone.config.decoder
        assert stack is not None, "the pipeline required a decoder. This is a bug."
        return stack.max_positions

    def cost_of_generating(self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin) -> float:
        """See Answering."""
        return self._cost(medium, question, search.num_beams, search.max_length, pin)

    def cost_of_ranking(
        self, medium: Medium, question: EncodedQuery, candidates: Candidates, k: int, pin: Pin
    ) -> float:
        """See Answering."""
        return self._cost(medium, question, k, max(map(len, candidates)), pin)

    def _cost(self, medium: Medium, question: EncodedQuery, rows: int, length: int, pin: Pin) -> float:
        """Of writing so many rows of that length, [DEC] counted, and of looking at the medium."""
        config, preprocessing = self.backbone.config, preprocessing_of(pin.config, self.backbone)
        memory = frames_of(medium, preprocessing) * tokens_per_frame(config, preprocessing.resolution)
        stack = config.decoder
        assert stack is not None, "the pipeline required a decoder. This is a bug."
        return (
            self._stages.cost_of_seeing(medium, pin)
            + question_cost(self.backbone, len(question.ids), memory)
            + decode_cost(stack, rows, length, len(question.ids))
        )

    async def generate(
        self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin, context: RequestContext
    ) -> Sequence[Hypothesis]:
        """See Answering."""
        states = (await self._stages.see(medium, pin, context)).output.states.flatten(0, 1)  # [F*P, D]
        asked = GenerateInput(question.ids, states, search.num_beams, search.max_length)
        return (await self._stages.generate(asked, pin, context)).hypotheses

    async def rank(
        self,
        medium: Medium,
        question: EncodedQuery,
        candidates: Candidates,
        k: int,
        pin: Pin,
        context: RequestContext,
    ) -> RankOutput:
        """See Answering."""
        states = (await self._stages.see(medium, pin, context)).output.states.flatten(0, 1)
        return await self._stages.rank(RankInput(question.ids, states, candidates, k), pin, context)


class OptAnswering:
    """The question is the start of a text that the language model goes on with; what it perceives enters its layers."""

    def __init__(self, stages: OptStages) -> None:
        self._stages = stages
        self.backbone = stages.backbone

    def check_medium(self, media: MediaSource, pin: Pin) -> None:
        """See Answering."""
        if isinstance(media, MediaBytes):
            self._stages.check_medium(media.kind, pin)

    def question(self, text: str, pin: Pin) -> EncodedQuery:
        """See Answering."""
        limit = min(self._max_positions - 1, pin.config.max_text_tokens if pin.config else self._max_positions - 1)
        answer_token = None if pin.config is None else options_of(pin.config).answer_token_id
        tokens = within_limit(text, limit, lambda: self.backbone.question(text, answer_token), param="question")
        return self._with_warnings(tokens, pin)

    def caption(self, pin: Pin) -> EncodedQuery:
        """See Answering: from the start token alone."""
        return self._with_warnings(EncodedQuery((self.backbone.config.special_ids.bos,), ()), pin)

    def _with_warnings(self, question: EncodedQuery, pin: Pin) -> EncodedQuery:
        return question if pin.config is not None else EncodedQuery(question.ids, (*question.warnings, UNSEEN))

    def decoding(self, pin: Pin) -> AnswerDecoding:
        """See Answering."""
        return _decoding(pin.config) or OPT_DECODING

    def search(self, decode: GenerateDecode, question: EncodedQuery, pin: Pin) -> Search:
        """See Answering. The authors' limit counts the question too; one that is asked for does not."""
        decoding, start = self.decoding(pin), len(question.ids)
        length = decoding.max_length if decode.max_new_tokens is None else start + decode.max_new_tokens
        length = max(length, start + 1)
        if length > self._max_positions:
            raise BadQuery(
                f"max_new_tokens may be at most {self._max_positions - start} after a question of {start} tokens",
                param="decode.max_new_tokens",
            )
        return Search(decode.num_beams or decoding.num_beams, length)

    @property
    def _max_positions(self) -> int:
        return self.backbone.config.language_model.max_positions

    def max_answer_length(self) -> int:
        """See Answering."""
        return self._max_positions // 2

    def cost_of_generating(self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin) -> float:
        """See Answering. `max_length` counts the question, which every beam holds."""
        return self._perceiving(medium, pin) + self._stages.text_cost(search.num_beams, search.max_length, pin)[0]

    def cost_of_ranking(
        self, medium: Medium, question: EncodedQuery, candidates: Candidates, k: int, pin: Pin
    ) -> float:
        """See Answering. Each candidate is read behind the question."""
        length = len(question.ids) + max(map(len, candidates))
        return self._perceiving(medium, pin) + self._stages.text_cost(k, length, pin)[0]

    def _perceiving(self, medium: Medium, pin: Pin) -> float:
        """Estimated operations of the adapter's encoder; none where its states of the medium were kept."""
        if pin.config is None or medium.kept is not None:
            return 0.0
        options, preprocessing = options_of(pin.config), pin.config.preprocessing
        encoder = self.backbone.config.encoders[options.encoder]
        side = preprocessing.resolution if isinstance(preprocessing, Preprocessing) else 0
        frames = preprocessing.num_frames if isinstance(preprocessing, Preprocessing) else 1
        shape = (3, side, side) if ENCODER_OF["image"] == options.encoder else (frames, 3, side, side)
        return encoder_cost(encoder, shape)[0]

    async def generate(
        self, medium: Medium, question: EncodedQuery, search: Search, pin: Pin, context: RequestContext
    ) -> Sequence[Hypothesis]:
        """See Answering. What follows a second answer token is cut, as the authors' scripts do."""
        states = await self._stages.perceive(medium, pin, context)
        text = ContinueInput(question.ids, states, search.num_beams, search.max_length)
        found = await self._stages.generate(text, pin, context)
        end = None if pin.config is None else options_of(pin.config).answer_token_id
        return [Hypothesis(_until(h.ids[len(question.ids) :], end), h.score) for h in found.hypotheses]

    async def rank(
        self,
        medium: Medium,
        question: EncodedQuery,
        candidates: Candidates,
        k: int,
        pin: Pin,
        context: RequestContext,
    ) -> RankOutput:
        """See Answering."""
        states = await self._stages.perceive(medium, pin, context)
        return await self._stages.rank(ChooseInput(question.ids, states, candidates, k), pin, context)


def _until(ids: tuple[int, ...], end: int | None) -> tuple[int, ...]:
    return ids[: ids.index(end)] if end is not None and end in ids else ids


def _decoding(config: AdapterConfig | None) -> AnswerDecoding | None:
    return None if config is None else config.decoding
