"""Train the demo's small BLIP on the plain world; after that it is frozen for good."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from adapters.training.data import AnswerBatch
from adapters.training.losses import ContrastiveFeatures, answer_loss, contrastive_loss, shifted_nll
from adapters.training.objectives import RetrievalSettings, encode_pairs, matching_loss_of
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, SpecialIds, TextConfig, VisionConfig
from service.demo.batches import Texts, answer_batch, description_batch, draw_items, retrieval_batch

POSITION_AMPLITUDE = 0.5


@dataclass(frozen=True)
class PretrainOptions:
    """Sizes and schedule of the plain world's training.

    `second_object_at` and `third_object_at` are steps; `num_described` pictures of a batch are captioned by the decoder,
    which so learns every word of the plain captions.
    """

    steps: int = 6000
    learning_rate: float = 1e-3
    batch_size: int = 48
    num_questions: int = 4
    num_described: int = 16
    second_object_at: int = 500
    third_object_at: int = 1500
    seed: int = 1


def demo_config(vocab_size: int, special_ids: SpecialIds, max_positions: int) -> BlipConfig:
    """The demo's architecture: 64 px pictures in 4x4 patches, width 128, 4 layers everywhere."""
    width, layers, heads = 128, 4, 4
    text = TextConfig(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        vocab_size=vocab_size,
        max_positions=max_positions,
        memory_width=width,
    )
    vision = VisionConfig(width=width, layers=layers, heads=heads, mlp_width=4 * width, patch=16, grid=4)
    return BlipConfig(vision=vision, text_encoder=text, decoder=text, embed_dim=64, special_ids=special_ids)


def initialise(model: Blip, seed: int) -> None:
    """Normal(0, 0.02) weights, zero biases, and 2-D sine-cosine positions for the patches.

    The library's default would start the vision tower at practically zero, positions included, and questions about
    places would not be learned for thousands of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        grid = model.config.vision.grid
        model.vision.pos_embed[0, 1:] = POSITION_AMPLITUDE * sine_positions(grid, model.config.vision.width)


def sine_positions(grid: int, width: int) -> Tensor:
    """2-D sine-cosine positions [grid * grid, width]: a quarter of the width each for sine and cosine of each axis."""
    axis = sines(grid, width // 2)
    rows = axis[:, None].expand(-1, grid, -1)
    columns = axis[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def sines(length: int, width: int) -> Tensor:
    """Sine-cosine positions on a line, [length, width]: half of the width each for sine and cosine."""
    frequencies = torch.exp(-math.log(100.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length).float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Pretraining:
    """Contrastive, matching, answer and caption losses on plain scenes, of one object first, then two, then three."""

    def __init__(self, model: Blip, texts: Texts, options: PretrainOptions) -> None:
        self.model = model
        self.texts = texts
        self.options = options
        self.settings = RetrievalSettings(alpha=0.0)

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        options = self.options
        rng = Random(f"pretrain/{options.seed}/{step}")
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        items = draw_items("plain", options.seed, step, options.batch_size, self._max_objects(step))
        pairs = retrieval_batch(items, self.texts)
        encoded = encode_pairs(self.model, pairs, None)
        features = ContrastiveFeatures(encoded.clips, encoded.texts)
        temperature = self.settings.temperature
        itc = contrastive_loss(features, features, pairs.pair_ids, None, None, temperature=temperature, alpha=0.0)

        itm = matching_loss_of(self.model, pairs, None, encoded, self.settings, generator)
        asked = answer_batch(items, self.texts, options.num_questions, rng)
        described = description_batch(items[: options.num_described], self.texts)
        return {
            "itc": itc,
            "itm": itm,
            "answer": self._answer_loss(encoded.states, asked),
            "caption": self._answer_loss(encoded.states, described),
        }

    def _answer_loss(self, states: Tensor, batch: AnswerBatch) -> Tensor:
        """Weighted loss of answers to questions about pictures that were encoded already: states [B, 1, P, D]."""
        y = states.flatten(1, 2)[batch.clip_of_question]
        seen = torch.ones(y.shape[:2], dtype=torch.bool)
        questions = self.model.encode_multimodal(batch.question_ids, batch.question_mask, y, seen, None)
        logits = self.model.score_answers(
            questions, batch.question_mask, batch.answer_ids, batch.answer_mask, batch.question_of_answer, None
        )
        return answer_loss(
            shifted_nll(logits, batch.answer_ids, batch.answer_mask), batch.answer_weights, len(batch.pixels)
        )

    def _max_objects(self, step: int) -> int:
        return 1 + (step >= self.options.second_object_at) + (step >= self.options.third_object_at)

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a model, set to be trained."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
