"""A backbone of 16 numbers a token, an adapter config for it, and batches of noise."""

import torch
from torch import Tensor

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing, Task
from adapters.families.base import BlipDims
from adapters.training.adapter import TrainableAdapter
from adapters.training.data import AnswerBatch, RetrievalBatch
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, SpecialIds, TextConfig, VisionConfig

WIDTH, LAYERS, EMBED, VOCABULARY, PATCH = 16, 2, 8, 40, 8
RESOLUTION = 2 * PATCH
DIMS = BlipDims(WIDTH, LAYERS, EMBED)
HEADS = ("vision_proj", "text_proj", "itm_head")
BOS, ENC, SEP = 30, 31, 3


def blip(seed: int = 0) -> Blip:
    """A frozen random model, larger in its weights than a fresh one so that inputs matter."""
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": 2, "mlp_width": 32}
    text = TextConfig(**sizes, vocab_size=VOCABULARY, max_positions=16, memory_width=WIDTH)
    vision = VisionConfig(**sizes, patch=PATCH, grid=2)
    ids = SpecialIds(pad=0, cls=2, sep=SEP, bos=BOS, enc=ENC)
    model = Blip(BlipConfig(vision=vision, text_encoder=text, decoder=text, embed_dim=EMBED, special_ids=ids))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2, generator=generator)
            elif "norm" not in name:
                parameter.zero_()
    return model.eval().requires_grad_(False)


def config(task: Task, *, rank: int = 4, kv_rank: int | None = 3, frame_aware: bool = False) -> AdapterConfig:
    """A retrieval adapter carries heads, a VQA adapter none."""
    return AdapterConfig(
        family="uniadapter",
        task=task,
        rank=rank,
        options={"kv_rank": kv_rank, "frame_aware_attention": frame_aware},
        heads=HEADS if task == "retrieval" else (),
        backbone=BackboneRef(architecture="blip", width=WIDTH, layers=LAYERS, parts={}),
        preprocessing=Preprocessing(resolution=RESOLUTION, num_frames=2),
        decoding=AnswerDecoding() if task == "vqa" else None,
    )


def heads_of(model: Blip) -> dict[str, Tensor]:
    """The model's own heads, by tensor name."""
    return {f"{head}.{kind}": getattr(model.head(head), kind).detach() for head in HEADS for kind in ("weight", "bias")}


def adapter(model: Blip, task: Task, *, seed: int = 0, frame_aware: bool = False) -> TrainableAdapter:
    """A fresh adapter for the model."""
    return TrainableAdapter(config(task, frame_aware=frame_aware), DIMS, heads_of(model), seed=seed)


def retrieval_batch(step: int, *, size: int = 4, frames: int = 2) -> RetrievalBatch:
    """Noise, a function of the step; every pair a clip of its own."""
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(size, frames, 3, RESOLUTION, RESOLUTION, generator=generator)
    ids, mask = _texts(size, 5, 2, generator)
    return RetrievalBatch(pixels, ids, mask, step * size + torch.arange(size))


def answer_batch(step: int, *, frames: int = 1) -> AnswerBatch:
    """Two clips, three questions, four answers."""
    generator = torch.Generator().manual_seed(200 + step)
    pixels = torch.randn(2, frames, 3, RESOLUTION, RESOLUTION, generator=generator)
    question_ids, question_mask = _texts(3, 6, 2, generator)
    answer_ids, answer_mask = _texts(4, 4, BOS, generator)
    return AnswerBatch(
        pixels,
        question_ids,
        question_mask,
        torch.tensor([0, 1, 1]),
        answer_ids,
        answer_mask,
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([1.0, 1.0, 0.5, 0.5]),
    )


def _texts(rows: int, length: int, first: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [rows, length] and mask; the last row is one token shorter."""
    ids = torch.randint(5, 30, (rows, length), generator=generator)
    ids[:, 0], ids[:, -1] = first, SEP
    mask = torch.ones(rows, length, dtype=torch.bool)
    ids[-1, -2:] = torch.tensor([SEP, 0])
    mask[-1, -1] = False
    return ids, mask
