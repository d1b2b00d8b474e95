"""Random models and adapters of the sizes that are served; speed does not know what weights say."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.config import AdapterConfig, BackboneRef, Preprocessing
from adapters.families import family_of
from adapters.families.base import BlipDims, SlotView
from adapters.families.uniadapter import init_tensors
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, SpecialIds, TextConfig, VisionConfig
from service.bank import AdapterBank, HostAdapter
from service.metrics import Metrics

FAMILY = family_of("uniadapter")
IDS = SpecialIds(pad=0, cls=1, sep=2, bos=3, enc=4)


def _blip(width: int, layers: int, heads: int, grid: int, vocab_size: int, embed_dim: int) -> BlipConfig:
    sizes = {"width": width, "layers": layers, "heads": heads, "mlp_width": 4 * width}
    text = TextConfig(**sizes, vocab_size=vocab_size, max_positions=512, memory_width=width)
    vision = VisionConfig(**sizes, patch=16, grid=grid)
    return BlipConfig(vision=vision, text_encoder=text, decoder=text, embed_dim=embed_dim, special_ids=IDS)


BLIP_SIZES = {
    "tiny": _blip(width=128, layers=4, heads=4, grid=4, vocab_size=1000, embed_dim=32),
    "base": _blip(width=768, layers=12, heads=12, grid=24, vocab_size=30524, embed_dim=256),
}


def randomize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gains of 1, everything else small, so that nothing overflows."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02, generator=generator)
    model.to(dtype).eval().requires_grad_(False)


def make_blip(config: BlipConfig, device: torch.device, dtype: torch.dtype) -> Blip:
    """A random BLIP, ready to serve."""
    with torch.device(device):
        model = Blip(config)
    randomize(model, device, dtype)
    model.pack()
    return model


def adapter_config(config: BlipConfig, rank: int) -> AdapterConfig:
    """The config of a UniAdapter of a rank."""
    vision = config.vision
    return AdapterConfig(
        family="uniadapter",
        task="vqa",
        rank=rank,
        backbone=BackboneRef(architecture="blip", width=vision.width, layers=vision.layers, parts={}),
        preprocessing=Preprocessing(resolution=vision.grid * vision.patch),
    )


def adapter_dims(config: BlipConfig) -> BlipDims:
    """The sizes it must fit."""
    return BlipDims(config.vision.width, config.vision.layers, config.embed_dim or 1)


def fold_adapters(config: BlipConfig, rank: int, count: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The folded tensors of `count` different UniAdapters, on the host."""
    adapter, dims = adapter_config(config, rank), adapter_dims(config)
    folded = []
    for seed in range(count):
        tensors = init_tensors(adapter, dims, torch.Generator().manual_seed(seed))
        folded.append({name: tensor.to(dtype) for name, tensor in FAMILY.fold(adapter, tensors, dims).items()})
    return folded


def make_slots(
    config: BlipConfig, rank: int, count: int, device: torch.device, dtype: torch.dtype, *, slot_rank: int = 0
) -> Sequence[SlotView]:
    """`count` different UniAdapters of a rank in the slots of a bank, which may be wider."""
    bank = AdapterBank(
        adapter_dims(config),
        {},
        device=device,
        dtype=dtype,
        buckets=((slot_rank or rank, count),),
        host_bytes=1 << 40,
        metrics=Metrics(),
    )
    views = []
    for number, folded in enumerate(fold_adapters(config, rank, count, dtype)):
        adapter = HostAdapter(str(number), adapter_config(config, rank), FAMILY, rank, folded)
        bank.put(adapter)
        views.append(bank.lease(adapter.digest).view)
    return views
