"""Training a UniAdapter on a BLIP: to retrieve, from pairs of media and texts, or to answer, from questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from adapters.config import AdapterConfig, AnswerDecoding, Preprocessing
from adapters.families.base import HEADS, backbone_ref
from adapters.families.uniadapter import UniAdapterOptions
from adapters.training.adapter import AnswerTraining, RetrievalTraining, TrainableAdapter
from adapters.training.data import AnswerBatch, RetrievalBatch
from adapters.training.loop import FitOptions, Objective
from adapters.training.objectives import RetrievalSettings
from service.backbone.base import TokenizedText
from service.backbone.blip_backbone import TASK_PARTS, BlipBackbone
from service.config import MIB, InvalidSettings
from service.media import AnyMediaKind, MediaWorkers
from service.train.batches import Plan, padded
from service.train.examples import MAX_ANSWER_TOKENS, MAX_ANSWERS, Example, Examples, Part
from service.train.options import TrainOptions
from service.train.pixels import PixelStore

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class BlipTexts:
    """[CLS] words [SEP] of captions and questions, [DEC] words [SEP] of answers."""

    backbone: BlipBackbone

    def tokenize(self, part: Part, text: str) -> TokenizedText:
        """See Texts."""
        tokens = self.backbone.tokenize(text)
        if part != "answer":
            return tokens
        return TokenizedText((self.backbone.config.special_ids.bos, *tokens.ids[1:]), tokens.unknown)

    def limit(self, part: Part) -> int:
        """See Texts."""
        if part == "answer":
            decoder = self.backbone.config.decoder
            assert decoder is not None, "the caller required a decoder. This is a bug."
            return min(MAX_ANSWER_TOKENS, decoder.max_positions)
        stack = self.backbone.config.text_encoder
        assert stack is not None, "the caller required a text encoder. This is a bug."
        return min(self.backbone.manifest.max_text_tokens, stack.max_positions)


@dataclass(frozen=True)
class Batches:
    """Batches of examples. `pad` fills up ids."""

    examples: Sequence[Example]
    store: PixelStore
    pad: int

    def retrieval(self, rows: Sequence[int]) -> RetrievalBatch:
        """Pairs; those of one file match each other."""
        chosen = [self.examples[row] for row in rows]
        files = [example.file for example in chosen]
        ids, mask = padded([example.ids for example in chosen], self.pad)
        return RetrievalBatch(self.store.pixels(files), ids, mask, torch.tensor(files))

    def answers(self, rows: Sequence[int]) -> AnswerBatch:
        """Questions with all their answers. Weights are such that the loss is a mean over questions."""
        chosen = [self.examples[row] for row in rows]
        files = list(dict.fromkeys(example.file for example in chosen))
        pixels = self.store.pixels(files)
        num_pictures = pixels.shape[0] * pixels.shape[1]  # what the loss divides by
        question_ids, question_mask = padded([example.ids for example in chosen], self.pad)
        answer_ids, answer_mask = padded([ids for example in chosen for ids in example.answers], self.pad)
        weights = torch.tensor([weight for example in chosen for weight in example.weights])
        return AnswerBatch(
            pixels,
            question_ids,
            question_mask,
            torch.tensor([files.index(example.file) for example in chosen]),
            answer_ids,
            answer_mask,
            torch.tensor([question for question, example in enumerate(chosen) for _ in example.answers]),
            weights * (num_pictures / len(chosen)),
        )


class UniAdapterTraining:
    """See FamilyTraining."""

    kinds: tuple[AnyMediaKind, ...] = ("image", "video")
    weight_decay = FitOptions.weight_decay

    def __init__(self, options: TrainOptions, backbone: BlipBackbone) -> None:
        """Raises: InvalidSettings for a resolution that the patches do not divide."""
        patch = backbone.config.vision.patch
        if options.resolution is not None and options.resolution % patch:
            raise InvalidSettings(f"{options.resolution} is no multiple of the patch size {patch}", param="resolution")
        self._options = options
        self._backbone = backbone
        self.texts = BlipTexts(backbone)
        self.learning_rate = options.learning_rate or LEARNING_RATE

    def config(self, examples: Examples, kind: AnyMediaKind) -> AdapterConfig:
        """See FamilyTraining."""
        options, backbone, dims = self._options, self._backbone, self._backbone.dims()
        family = UniAdapterOptions(kv_rank=options.kv_rank, frame_aware_attention=options.frame_aware)
        tuned_heads = HEADS if options.is_retrieval and options.heads else ()
        used_heads = HEADS if options.is_retrieval and not options.heads else ()
        frames = {} if options.num_frames is None else {"num_frames": options.num_frames}
        return AdapterConfig(
            family="uniadapter",
            task=options.task,
            rank=options.rank,
            options=family.model_dump(mode="json"),
            heads=tuned_heads,
            backbone=backbone_ref(dims, backbone.parts, (*TASK_PARTS[options.task], *used_heads)),
            preprocessing=Preprocessing(resolution=options.resolution or backbone.resolution, **frames),
            max_text_tokens=self.texts.limit("question"),
            decoding=None if options.is_retrieval else self._decoding(examples),
        )

    def _decoding(self, examples: Examples) -> AnswerDecoding:
        """Candidates are the answers trained on; a generated answer may be as long as the longest of them."""
        decoder = self._backbone.config.decoder
        assert decoder is not None, "the caller required a decoder. This is a bug."
        longest = max(len(ids) for example in examples.examples for ids in example.answers)
        answers = examples.answers[:MAX_ANSWERS]
        return AnswerDecoding(
            answers=answers,
            rank_k=min(AnswerDecoding().rank_k, len(answers)),
            max_length=min(max(AnswerDecoding().max_length, longest), decoder.max_positions),
        )

    def store(
        self, config: AdapterConfig, files: Sequence[Path], kind: AnyMediaKind, workers: MediaWorkers
    ) -> PixelStore:
        """See FamilyTraining."""
        return PixelStore(files, kind, config.preprocessing, workers, max_bytes=self._options.cache_mib * MIB)

    def batches(self, examples: Sequence[Example], store: PixelStore, plan: Plan) -> Callable[[int], Any]:
        """See FamilyTraining."""
        batches = Batches(examples, store, self._backbone.config.special_ids.pad)
        make: Callable[[Sequence[int]], Any] = batches.retrieval if self._options.is_retrieval else batches.answers
        return lambda step: make(plan.rows(step))

    def objective(self, adapter: TrainableAdapter, batches: Callable[[int], Any], plan: Plan) -> Objective:
        """See FamilyTraining."""
        options, model = self._options, self._backbone.model
        if not options.is_retrieval:
            return AnswerTraining(model, adapter, batches)
        return RetrievalTraining(
            model,
            adapter,
            batches,
            RetrievalSettings(frame_aware=options.frame_aware),
            ramp_steps=plan.steps_per_epoch,  # the released trainer's: soft targets have their full weight after one epoch
            queue_size=options.queue_size,
            seed=options.seed,
        )

    def rate_of(self, name: str) -> float:
        """See FamilyTraining: all learn alike."""
        return 1.0

    def numeric(self) -> dict[str, JsonValue]:
        """See FamilyTraining."""
        return {"queue_size": self._options.queue_size}

    def card_rows(self, config: AdapterConfig) -> dict[str, str]:
        """See FamilyTraining."""
        options, pixels = self._options, config.pixels
        rows = {
            "family": f"uniadapter, rank {options.rank}, key/value rank {options.kv_rank or 'none'}",
            "input": f"{pixels.resolution} px; {pixels.num_frames} frames of a clip",
        }
        if options.is_retrieval:
            rows["heads"] = ", ".join(config.heads) or "the backbone's own"
        return rows
