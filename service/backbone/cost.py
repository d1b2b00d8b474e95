"""Estimated operations of a stage, from shapes alone: what admission, fairness and benchmarks count in.

A multiply-add is 2 operations. Elementwise work is left out: it follows the matrix products closely enough.
"""

from service.backbone.config import (
    AstConfig,
    BlipConfig,
    LanguageModelConfig,
    TextConfig,
    TimesformerConfig,
    VisionConfig,
)


def vision_cost(config: BlipConfig, resolution: int, num_frames: int) -> float:
    """The vision tower over frames of a resolution."""
    vision = config.vision
    tokens, width = tokens_per_frame(config, resolution), vision.width
    per_token = 2 * width * (4 * width + 2 * vision.mlp_width) + 4 * tokens * width
    patches = 2 * 3 * vision.patch**2 * width
    return float(num_frames * tokens * (vision.layers * per_token + patches))


def text_cost(stack: TextConfig, rows: int, length: int, memory: int = 0) -> float:
    """A text stack over rows of a length; with `memory` tokens read by cross-attention, whose projections count too."""
    width = stack.width
    per_token = 2 * width * (4 * width + 2 * stack.mlp_width) + 4 * length * width
    if memory:
        per_token += 2 * width * 2 * width + 4 * memory * width
    reading = 2 * memory * stack.memory_width * 2 * width
    return float(rows * stack.layers * (length * per_token + reading))


def decode_cost(stack: TextConfig, rows: int, steps: int, question_length: int) -> float:
    """So many decoding steps of rows that share their questions' memories, word head included."""
    head = 2 * stack.width * (stack.width + stack.vocab_size)
    return text_cost(stack, rows, steps, question_length) + float(rows * steps * head)


def tokens_per_frame(config: BlipConfig, resolution: int) -> int:
    """Patches and CLS of a picture of that resolution."""
    return (resolution // config.vision.patch) ** 2 + 1


def encoder_cost(config: VisionConfig | TimesformerConfig | AstConfig, shape: tuple[int, ...]) -> tuple[float, int]:
    """A perceptual encoder over one medium whose values have this shape: operations, and tokens."""
    if isinstance(config, AstConfig):
        tokens, frames = config.num_patches + 2, 1
    else:
        frames = shape[0] if len(shape) == 4 else 1
        tokens = frames * (shape[-1] // config.patch) ** 2 + 1
    width, seen = config.width, tokens // frames
    attentions = 2 if isinstance(config, TimesformerConfig) else 1
    per_token = 2 * width * (4 * attentions * width + 2 * config.mlp_width) + 4 * seen * width
    return float(tokens * config.layers * per_token), tokens


def language_cost(config: LanguageModelConfig, rows: int, length: int) -> float:
    """A language model over rows of a length, word head included."""
    width = config.width
    per_token = config.layers * (2 * width * (4 * width + 2 * config.mlp_width) + 4 * length * width)
    return float(rows * length * (per_token + 2 * config.word_width * config.vocab_size))
