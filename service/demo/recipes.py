"""How each demo adapter is trained: sizes, steps, rates. Everything a rebuild needs beside the seeds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue

from adapters.config import AdapterConfig, AnswerDecoding, AudioPreprocessing, Preprocessing
from adapters.families.base import backbone_ref
from adapters.families.epalm import EncoderName, EPalmOptions
from adapters.families.uniadapter import UniAdapterOptions
from service.backbone.base import TOKENIZER
from service.backbone.blip_backbone import TASK_PARTS, BlipBackbone
from service.backbone.opt_backbone import OptBackbone
from service.demo.corpus import ANSWER
from service.demo.language import REGISTERS
from service.demo.perception import RESOLUTION, SPECTROGRAM
from service.demo.world import TASKS

ASSETS = Path(__file__).parent / "assets"
MAX_QUERY_TOKENS = 48
NUM_FRAMES = 8
STORED_DTYPE = torch.float16  # what ships; everything after pre-training sees these values
FULL_LEARNING_RATE = 3e-4

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
    "demo-epalm-vqa": ("full-fine-tuning",),
    "demo-epalm-video-qa": ("full-fine-tuning",),
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
        backbone=backbone_ref(dims, backbone.parts, TASK_PARTS[task]),
        preprocessing=Preprocessing(resolution=backbone.manifest.resolution, num_frames=NUM_FRAMES),
        max_text_tokens=MAX_QUERY_TOKENS,
        decoding=None if recipe.is_retrieval else AnswerDecoding(answers=answers, rank_k=len(answers), max_length=6),
        provenance=provenance,
    )


@dataclass(frozen=True)
class EpalmRecipe:
    """One task's training on the language model. Only `prompt_rate` of the learning rate goes to the soft prompt."""

    task: str
    encoder: EncoderName
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    prompt_rate: float = 0.3
    start_layer: int = 0
    end_layer: int = 4  # the last: a token that goes on by itself sees, while it learns, the answer it is to tell
    injected_hidden_states: int = 3
    num_questions: int = 4
    num_aligned: int = 3000  # contents that the connectors start from a fit to
    seed: int = 11

    @property
    def is_caption(self) -> bool:
        """Whether the task tells, rather than answers."""
        return TASKS[self.task].goal == "caption"


EPALM_RECIPES = {
    recipe.task: recipe
    for recipe in (
        EpalmRecipe("demo-epalm-vqa", "vit", steps=1000, batch_size=32),
        EpalmRecipe("demo-epalm-video-qa", "timesformer", steps=800, batch_size=32),
        EpalmRecipe("demo-epalm-caption", "vit", steps=1000, batch_size=64),
        EpalmRecipe("demo-epalm-audio-caption", "ast", steps=700, batch_size=64),
    )
}
MAX_TOLD_TOKENS = 32  # of a question with its answer, or of a caption


def epalm_config(recipe: EpalmRecipe, backbone: OptBackbone) -> AdapterConfig:
    """The package config of a task's adapter."""
    dims = backbone.dims()
    options = EPalmOptions(
        encoder=recipe.encoder,
        start_layer_idx=recipe.start_layer,
        end_layer_idx=recipe.end_layer,
        injected_hidden_states=recipe.injected_hidden_states,
        prompt_len=len(REGISTERS),
        prompt_mlp=False,
        answer_token_id=None if recipe.is_caption else backbone.answer_token(ANSWER),
    )
    provenance: dict[str, JsonValue] = {"demo_task": recipe.task, "seed": recipe.seed, "steps": recipe.steps}
    parts = ("language_model", recipe.encoder, TOKENIZER)
    hears = recipe.encoder == "ast"
    return AdapterConfig(
        family="epalm",
        task="caption" if recipe.is_caption else "vqa",
        rank=options.num_connectors,
        options=options.model_dump(mode="json"),
        backbone=backbone_ref(dims, backbone.parts, parts),
        preprocessing=AudioPreprocessing(num_mel_bins=SPECTROGRAM.num_mel_bins, max_steps=SPECTROGRAM.max_steps)
        if hears
        else Preprocessing(resolution=RESOLUTION, num_frames=NUM_FRAMES),
        max_text_tokens=MAX_TOLD_TOKENS,
        decoding=AnswerDecoding(answers=TASKS[recipe.task].answers, max_length=MAX_TOLD_TOKENS),
        provenance=provenance,
    )


def shortened(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with fewer steps, for tests of the whole way."""
    return replace(recipe, steps=max(1, int(recipe.steps * factor)))
