"""How each demo adapter is trained: sizes, steps, rates. Everything a rebuild needs beside the seeds."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing
from adapters.families.uniadapter import UniAdapterOptions
from service.backbone.blip_backbone import TASK_PARTS, BlipBackbone
from service.demo.world import TASKS

ASSETS = Path(__file__).parent / "assets"
MAX_QUERY_TOKENS = 48
NUM_FRAMES = 8

Variant = Literal["adapter", "no-query-residual", "no-frame-aware-attention", "full-fine-tuning"]


@dataclass(frozen=True)
class Recipe:
    """One task's training."""

    task: str
    rank: int
    kv_rank: int | None
    steps: int
    batch_size: int
    learning_rate: float = 2e-3
    num_questions: int = 4
    seed: int = 11

    @property
    def is_retrieval(self) -> bool:
        """Whether the task retrieves, rather than answers."""
        return TASKS[self.task].goal == "retrieval"

    @property
    def is_video(self) -> bool:
        """Whether the task looks at clips."""
        return TASKS[self.task].kind == "video"


RECIPES = {
    recipe.task: recipe
    for recipe in (
        Recipe("demo-image-vqa", rank=96, kv_rank=32, steps=4000, batch_size=48),
        Recipe("demo-video-qa", rank=96, kv_rank=32, steps=4000, batch_size=24),
        Recipe("demo-video-retrieval", rank=64, kv_rank=32, steps=1500, batch_size=24),
        Recipe("demo-image-retrieval", rank=96, kv_rank=32, steps=6000, batch_size=48),
        Recipe("demo-chart-vqa", rank=32, kv_rank=16, steps=2000, batch_size=48),
        Recipe("demo-pattern-retrieval", rank=128, kv_rank=None, steps=1500, batch_size=48),
    )
}

ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "demo-image-retrieval": ("no-query-residual", "full-fine-tuning"),
    "demo-video-retrieval": ("no-query-residual", "full-fine-tuning", "no-frame-aware-attention"),
    "demo-image-vqa": ("no-query-residual", "full-fine-tuning"),
    "demo-video-qa": ("no-query-residual", "full-fine-tuning"),
}


def adapter_config(recipe: Recipe, backbone: BlipBackbone, variant: Variant = "adapter") -> AdapterConfig:
    """The package config of a task's adapter, or of an ablation of it."""
    dims = backbone.dims()
    options = UniAdapterOptions(
        frame_aware_attention=recipe.is_retrieval and recipe.is_video and variant != "no-frame-aware-attention",
        query_residual=variant != "no-query-residual",
        kv_rank=recipe.kv_rank,
    )
    task: Literal["retrieval", "vqa"] = "retrieval" if recipe.is_retrieval else "vqa"
    provenance: dict[str, JsonValue] = {
        "demo_task": recipe.task,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "variant": variant,
    }
    answers = TASKS[recipe.task].answers
    return AdapterConfig(
        family="uniadapter",
        task=task,
        rank=recipe.rank,
        options=options.model_dump(mode="json"),
        heads=("vision_proj", "text_proj", "itm_head") if recipe.is_retrieval else (),
        backbone=BackboneRef(
            architecture="blip",
            width=dims.width,
            layers=dims.layers,
            parts={part: backbone.parts[part] for part in TASK_PARTS[task]},
        ),
        preprocessing=Preprocessing(resolution=backbone.manifest.resolution, num_frames=NUM_FRAMES),
        max_text_tokens=MAX_QUERY_TOKENS,
        decoding=None if recipe.is_retrieval else AnswerDecoding(answers=answers, rank_k=len(answers), max_length=6),
        provenance=provenance,
    )


def shortened(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with fewer steps, for tests of the whole way."""
    return replace(recipe, steps=max(1, int(recipe.steps * factor)))


def training_context() -> AbstractContextManager[None]:
    """What surrounds a forward pass while training on the CPU: bfloat16 products, and attention by plain products.

    At these lengths (17 to 150 tokens) the fused kernel's backward pass takes most of a step; plain products do not.
    """
    return _training_context()


@contextmanager
def _training_context() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        yield
