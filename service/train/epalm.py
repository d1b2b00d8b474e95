"""Training an eP-ALM adapter on an OPT with encoders: what a frozen encoder perceives enters a frozen language model.

Connector and soft prompt get gradients and nothing else. Texts are put as the service puts them. Source: the authors'
training scripts and settings (`accelerate_training`, `configs`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from pydantic import JsonValue, ValidationError

from adapters.config import AdapterConfig, AnswerDecoding, AudioPreprocessing, Preprocessing, describe
from adapters.errors import BackboneMismatch, MissingPart
from adapters.families.base import NOTHING, backbone_ref
from adapters.families.epalm import PROMPT, EncoderName, EPalm, EPalmOptions
from adapters.importers.epalm import MAX_LENGTH, MAX_TEXT_TOKENS, NUM_BEAMS
from adapters.training.adapter import TextTraining, TrainableAdapter
from adapters.training.data import TextBatch
from adapters.training.loop import Objective
from service.backbone.base import TOKENIZER, TokenizedText
from service.backbone.config import AstConfig, TimesformerConfig, VisionConfig
from service.backbone.opt_backbone import OptBackbone
from service.config import MIB, InvalidSettings
from service.media import AnyMediaKind, MediaWorkers
from service.media.sound import HOP_S
from service.pipelines.opt import ENCODER_OF
from service.train.batches import Plan, padded
from service.train.examples import MAX_ANSWER_TOKENS, MAX_ANSWERS, Example, Examples, Part
from service.train.media import NAMES
from service.train.options import TrainOptions
from service.train.states import StateStore

LONGEST_TEXT = 512  # what a package's decoding may ask for


class Rates(NamedTuple):
    """Peaks of the learning rate, of the connectors and of the prompt."""

    connector: float
    prompt: float


# Of `ePALM_*.yaml`, whose prompts go through the network, and of `ePALM_pt_L_*.yaml`, whose do not.
RATES: Mapping[bool, Rates] = {True: Rates(2e-5, 1e-5), False: Rates(2e-4, 1e-3)}


class Window(NamedTuple):
    """The layers that something enters, from `start` up to `end`, and how many of the encoder's last blocks give it."""

    start: int
    end: int
    num_blocks: int


def default_window(num_layers: int, num_blocks: int, start: int | None = None, end: int | None = None) -> Window:
    """In the proportions of the authors' settings: layers 19 to 30 of 32, and six blocks that last for two layers each.

    The start lies at 19 / 32 of the depth, the last layer is left out, each block lasts for two layers where there are so
    many. What is given stays as it is.
    """
    usual = min(round(num_layers * 19 / 32), num_layers - 1)
    start = start if start is not None else usual if end is None else max(0, min(usual, end - 1))
    end = max(num_layers - 1, start + 1) if end is None else end
    return Window(start, end, max(1, min((end - start) // 2, num_blocks)))


@dataclass(frozen=True)
class OptTexts:
    """Captions and answers as the model writes them, questions as the service puts them.

    A caption, and a question with an answer, is one text: start, question with answer token, words, end. Where the text of
    the end token stands in a caption or answer it is taken out, as the authors do.
    """

    backbone: OptBackbone
    answer_token: int | None

    def tokenize(self, part: Part, text: str) -> TokenizedText:
        """See Texts."""
        if part == "question":
            return self.backbone.question(text, self.answer_token)
        ids = self.backbone.config.special_ids
        end = self.backbone.require_tokenizer().convert_ids_to_tokens(ids.eos)
        tokens = self.backbone.tokenize(text.replace(end, ""))
        words = tokens.ids if part == "caption" else tokens.ids[1:]
        return TokenizedText((*words, ids.eos), tokens.unknown)

    def limit(self, part: Part) -> int:
        """See Texts. A question and an answer of these lengths fit into the model's positions together."""
        positions = self.backbone.config.language_model.max_positions
        if part == "caption":
            return min(MAX_TEXT_TOKENS, positions)
        return min(MAX_TEXT_TOKENS if part == "question" else MAX_ANSWER_TOKENS, positions // 2)


@dataclass(frozen=True)
class TextBatches:
    """The batch of a step: of each question one answer, drawn in proportion to its weight, anew each time."""

    examples: Sequence[Example]
    store: StateStore
    plan: Plan
    pad: int

    def __call__(self, step: int) -> TextBatch:
        chosen = [self.examples[row] for row in self.plan.rows(step)]
        first = step * self.plan.batch_size
        texts = [self._text(example, first + place) for place, example in enumerate(chosen)]
        ids, mask = padded(texts, self.pad)
        return TextBatch(self.store.states([example.file for example in chosen]), ids, mask)

    def _text(self, example: Example, place: int) -> tuple[int, ...]:
        """The tokens of an example at a place of the run, which alone decides the answer that is drawn."""
        if not example.answers:
            return example.ids
        drawn = Random(f"{self.plan.seed}/answer/{place}").choices(example.answers, example.weights)
        return (*example.ids, *drawn[0])


class EPalmTraining:
    """See FamilyTraining."""

    kinds: tuple[AnyMediaKind, ...] = ("image", "video", "audio")
    weight_decay = 0.02  # the trainers' settings

    def __init__(self, options: TrainOptions, backbone: OptBackbone) -> None:
        """Raises: MissingPart where the language model has no row for the answer token."""
        self._options = options
        self._backbone = backbone
        asks = options.task == "vqa" and options.answer_token
        self._answer_token = backbone.answer_token(options.answer_token) if asks else None
        self.texts = OptTexts(backbone, self._answer_token)
        usual = RATES[options.prompt_mlp or not options.prompt_length]
        self.learning_rate = options.learning_rate or usual.connector
        self._prompt_rate = options.prompt_learning_rate or self.learning_rate * usual.prompt / usual.connector

    def config(self, examples: Examples, kind: AnyMediaKind) -> AdapterConfig:
        """See FamilyTraining. The kind of media picks the encoder."""
        backbone, dims, encoder = self._backbone, self._backbone.dims(), ENCODER_OF[kind]
        part = backbone.config.encoders.get(encoder)
        if part is None:
            raise MissingPart(f"this backbone has no {encoder}, which perceives {NAMES[kind].partition(' ')[2]}s")
        options = self._family_options(encoder, part.layers)
        config = AdapterConfig(
            family="epalm",
            task=self._options.task,
            rank=options.num_connectors,
            options=options.model_dump(mode="json"),
            backbone=backbone_ref(dims, backbone.parts, ("language_model", encoder, TOKENIZER)),
            preprocessing=self._preprocessing(part),
            max_text_tokens=self.texts.limit("question"),
            decoding=self._decoding(examples),
        )
        self._check_schedule(config, options)
        return config

    def _family_options(self, encoder: EncoderName, num_blocks: int) -> EPalmOptions:
        """Raises: InvalidSettings for an empty window."""
        given, layers = self._options, self._backbone.dims().layers
        window = default_window(layers, num_blocks, given.start_layer, given.end_layer)
        try:
            return EPalmOptions(
                encoder=encoder,
                start_layer_idx=window.start,
                end_layer_idx=window.end,
                injected_hidden_states=given.injected_hidden_states or window.num_blocks,
                shared_connector=given.shared_connector,
                text_step=given.text_step,
                prompt_len=given.prompt_length,
                prompt_mlp=given.prompt_mlp,
                answer_token_id=self._answer_token,
            )
        except ValidationError as error:
            raise InvalidSettings(describe(error)) from error

    def _check_schedule(self, config: AdapterConfig, options: EPalmOptions) -> None:
        """Raises: InvalidSettings for a window that the model does not have, or blocks that would enter nowhere."""
        try:
            schedule = EPalm().schedule(config, self._backbone.dims())
        except BackboneMismatch as error:
            raise InvalidSettings(error.message) from error
        entering = {feature for feature in schedule.layers if feature != NOTHING}
        if len(entering) < options.injected_hidden_states:
            raise InvalidSettings(
                f"of {options.injected_hidden_states} injected hidden states {len(entering)} would enter a layer, between "
                f"layer {options.start_layer_idx} and layer {options.end_layer_idx} by steps of {options.text_step}",
                param="injected_hidden_states",
            )

    def _preprocessing(
        self, encoder: VisionConfig | TimesformerConfig | AstConfig
    ) -> Preprocessing | AudioPreprocessing:
        """As the encoder wants it. Raises: InvalidSettings."""
        given = self._options
        if isinstance(encoder, AstConfig):
            for name in ("resolution", "num_frames"):
                if given.is_given(name):
                    raise InvalidSettings(f"{name} belongs to pictures and clips, and these are sounds", param=name)
            return AudioPreprocessing(num_mel_bins=encoder.num_mel_bins, max_steps=encoder.max_steps)
        resolution = given.resolution or encoder.grid * encoder.patch
        if resolution % encoder.patch:
            raise InvalidSettings(f"{resolution} is no multiple of the patch size {encoder.patch}", param="resolution")
        num_frames = encoder.num_frames if isinstance(encoder, TimesformerConfig) else 1
        return Preprocessing(resolution=resolution, num_frames=given.num_frames or num_frames)

    def _decoding(self, examples: Examples) -> AnswerDecoding:
        """Candidates are the answers trained on; a text, with its question, may be as long as the longest trained on."""
        longest = max(len(example.ids) + max(map(len, example.answers), default=0) for example in examples.examples)
        positions = self._backbone.config.language_model.max_positions
        answers = examples.answers[:MAX_ANSWERS]
        return AnswerDecoding(
            num_beams=NUM_BEAMS,
            max_length=min(max(MAX_LENGTH, longest), positions, LONGEST_TEXT),
            answers=answers,
            rank_k=min(AnswerDecoding().rank_k, len(answers) or AnswerDecoding().rank_k),
        )

    def store(
        self, config: AdapterConfig, files: Sequence[Path], kind: AnyMediaKind, workers: MediaWorkers
    ) -> StateStore:
        """See FamilyTraining."""
        options = EPalmOptions.model_validate(config.options)
        return StateStore(
            files,
            kind,
            config.preprocessing,
            workers,
            max_bytes=self._options.cache_mib * MIB,
            model=self._backbone.model,
            encoder=options.encoder,
            num_blocks=options.injected_hidden_states,
        )

    def batches(self, examples: Sequence[Example], store: StateStore, plan: Plan) -> Callable[[int], Any]:
        """See FamilyTraining."""
        return TextBatches(examples, store, plan, self._backbone.config.special_ids.pad)

    def objective(self, adapter: TrainableAdapter, batches: Callable[[int], Any], plan: Plan) -> Objective:
        """See FamilyTraining."""
        return TextTraining(self._backbone.model, adapter, batches)

    def rate_of(self, name: str) -> float:
        """See FamilyTraining: the prompt has a rate of its own."""
        return self._prompt_rate / self.learning_rate if name.startswith(PROMPT) else 1.0

    def numeric(self) -> dict[str, JsonValue]:
        """See FamilyTraining."""
        return {"prompt_learning_rate": self._prompt_rate} if self._options.prompt_length else {}

    def card_rows(self, config: AdapterConfig) -> dict[str, str]:
        """See FamilyTraining."""
        options = EPalmOptions.model_validate(config.options)
        connectors = "one connector" if options.num_connectors == 1 else f"{options.num_connectors} connectors"
        through = ", through the network" if options.prompt_mlp else ""
        prompt = f"{options.prompt_len} tokens{through}, learning rate up to {self._prompt_rate:g}"
        return {
            "family": (
                f"epalm, the last {options.injected_hidden_states} blocks of {options.encoder} into layers "
                f"{options.start_layer_idx} to {options.end_layer_idx - 1}, {connectors}"
            ),
            "input": _input(config),
            "prompt": prompt if options.prompt_len else "none",
        }


def _input(config: AdapterConfig) -> str:
    """What is perceived, in words."""
    wanted = config.preprocessing
    if isinstance(wanted, AudioPreprocessing):
        return f"the first {wanted.max_steps * HOP_S:.1f} s of a sound, {wanted.num_mel_bins} filter banks"
    frames = f"{wanted.num_frames} frames of " if config.options["encoder"] == "timesformer" else ""
    return f"{frames}{wanted.resolution} px"
