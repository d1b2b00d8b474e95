"""Small real worlds: a random BLIP with the demo's tokenizer, random UniAdapters in a home, and a service that runs in a thread.

Weights are random but far from zero everywhere, so that every site, head and option of an adapter changes the numbers.
"""

import asyncio
import shutil
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing, Task
from adapters.families import FAMILIES
from adapters.families.base import BackboneDims
from adapters.package import Package, write_package
from adapters.registry import VersionRecord
from service.backbone.base import Backbone, load_tokenizer
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, TextConfig, VisionConfig
from service.backbone.convert import with_blip_tokens
from service.backbone.folder import load_backbone, write_backbone
from service.bank import AdapterBank, Buckets
from service.config import Settings
from service.demo.vocabulary import build_tokenizer
from service.home import push_package
from service.metrics import Metrics
from service.runtime import Runtime
from service.types import RequestContext

T = TypeVar("T")

WIDTH, LAYERS, HEADS, EMBED_DIM = 16, 2, 2, 8
PATCH, GRID = 8, 2  # native resolution 16
ANSWERS = ("red", "green", "blue", "a big circle")
TIMEOUT_S = 60.0


def random_blip(config: BlipConfig, seed: int = 0) -> Blip:
    """A model whose every tensor is random: gains around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    model = Blip(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.1 if is_gain else 0.3, generator=generator)
    return model


def write_tiny_backbone(
    folder: Path, *, with_decoder: bool = True, with_heads: bool = True, text_layers: int = LAYERS
) -> None:
    """A backbone folder; `text_layers` other than LAYERS makes one that no adapter fits."""
    build_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer = load_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    ids = with_blip_tokens(tokenizer)
    text = TextConfig(
        width=WIDTH,
        layers=text_layers,
        heads=HEADS,
        mlp_width=32,
        vocab_size=len(tokenizer),
        max_positions=24,
        memory_width=WIDTH,
    )
    config = BlipConfig(
        vision=VisionConfig(width=WIDTH, layers=LAYERS, heads=HEADS, mlp_width=32, patch=PATCH, grid=GRID),
        text_encoder=text,
        decoder=text if with_decoder else None,
        embed_dim=EMBED_DIM if with_heads else None,
        special_ids=ids,
    )
    write_backbone(folder, random_blip(config), tokenizer, {}, max_text_tokens=16)


def adapter_config(
    backbone: Backbone,
    task: Task = "vqa",
    *,
    rank: int = 4,
    options: Mapping[str, JsonValue] | None = None,
    heads: tuple[str, ...] = (),
    resolution: int = 16,
    num_frames: int = 3,
    decoding: AnswerDecoding | None = None,
) -> AdapterConfig:
    """The config of an adapter for this backbone."""
    if decoding is None and task == "vqa":
        decoding = AnswerDecoding(num_beams=2, max_length=5, answers=ANSWERS, rank_k=3)
    return AdapterConfig(
        family="uniadapter",
        task=task,
        rank=rank,
        options=dict(options or {}),
        heads=heads,
        backbone=BackboneRef(architecture="blip", width=WIDTH, layers=LAYERS, parts=dict(backbone.parts)),
        preprocessing=Preprocessing(resolution=resolution, num_frames=num_frames),
        max_text_tokens=16,
        decoding=decoding,
    )


def random_tensors(config: AdapterConfig, dims: BackboneDims, seed: int) -> dict[str, Tensor]:
    """Every tensor the config demands, heads included: gains and scales around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = FAMILIES[config.family].tensor_shapes(config, dims)
    shapes |= {name: shape for name, shape in dims.head_shapes().items() if name.partition(".")[0] in config.heads}
    return {
        name: torch.empty(shape).normal_(float(_is_gain(name)), 0.3, generator=generator)
        for name, shape in shapes.items()
    }


def _is_gain(name: str) -> bool:
    return name.endswith(".scale") or ("layer_norm" in name and name.endswith(".weight"))


def make_package(folder: Path, backbone: Backbone, task: Task = "vqa", *, seed: int, **wanted: Any) -> Package:
    """A random package on disk. `wanted` is what `adapter_config` takes."""
    config = adapter_config(backbone, task, **wanted)
    return write_package(folder, config, random_tensors(config, backbone.dims(), seed), f"# {folder.name}\n", None)


def make_bank(backbone: Backbone, buckets: Buckets = ((4, 2), (8, 1)), host_bytes: int = 1 << 30) -> AdapterBank:
    """A bank for the backbone."""
    return AdapterBank(
        backbone.dims(),
        backbone.head_tensors(),
        device=backbone.device,
        dtype=backbone.dtype,
        buckets=buckets,
        host_bytes=host_bytes,
        metrics=Metrics(),
    )


@dataclass(frozen=True)
class World:
    """A home that tests only read: they copy it before they change anything."""

    settings: Settings
    backbone: Backbone
    packages: Path

    def copy(self, folder: Path, **changes: Any) -> "World":
        """The same world in another folder, with other settings where given."""
        home = folder / "home"
        shutil.copytree(self.settings.home, home)
        settings = Settings.model_validate({**self.settings.model_dump(), "home": home, **changes})
        return World(settings, self.backbone, self.packages)

    def push(self, name: str, task: Task = "vqa", *, seed: int, **wanted: Any) -> VersionRecord:
        """Make a package and push it to the home under `name`."""
        folder = self.packages / f"{name}-{seed}-{len(list(self.packages.iterdir()))}"
        make_package(folder, self.backbone, task, seed=seed, **wanted)
        return push_package(self.settings, folder, name)


def make_world(folder: Path) -> World:
    """A backbone; `ask`, `tell` and `look` answer questions; `find`, `frames` and `heads` retrieve."""
    settings = Settings(
        home=folder / "home",
        device="cpu",
        media_workers=1,
        threads=1,
        slots="4:3,8:2",
        max_k=20,
        max_rerank_depth=6,
        max_candidates=30,
    )
    write_tiny_backbone(settings.backbone_folder)
    (folder / "packages").mkdir()
    world = World(settings, load_backbone(settings.backbone_folder), folder / "packages")
    world.push("ask", seed=1)
    world.push("tell", seed=2, rank=2, options={"kv_rank": 3}, resolution=24)
    world.push("look", seed=3, rank=8, options={"textual": False, "query_residual": False})
    world.push("find", "retrieval", seed=4)
    world.push("frames", "retrieval", seed=5, rank=3, options={"frame_aware_attention": True, "kv_rank": 2})
    world.push("heads", "retrieval", seed=6, heads=("vision_proj", "text_proj", "itm_head"))
    return world


class Service:
    """A runtime whose event loop runs in a thread of its own; tests call it from theirs."""

    def __init__(self, runtime: Runtime, loop: asyncio.AbstractEventLoop) -> None:
        self.runtime = runtime
        self.loop = loop

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives when it runs on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)


@contextmanager
def running(settings: Settings) -> Iterator[Service]:
    """A started service that ends with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="service-loop")
    thread.start()
    try:
        runtime = Runtime(settings)
        service = Service(runtime, loop)
        service.call(runtime.start())
        try:
            yield service
        finally:
            service.call(runtime.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def context(timeout_s: float = TIMEOUT_S, **fields: Any) -> RequestContext:
    """A request that has so long."""
    return RequestContext(deadline=time.monotonic() + timeout_s, **fields)


def picture(number: int = 0, size: int = 24, file_format: str = "PNG") -> bytes:
    """An encoded picture, another for each number: two diagonal halves in two colours."""
    file = BytesIO()
    image = Image.new("RGB", (size, size), ((37 * number) % 256, (91 * number + 60) % 256, 90))
    corner = ((160 * number + 40) % 256, 200, (53 * number) % 256)
    image.paste(Image.new("RGB", (size // 2, size // (2 + number % 3)), corner), (0, 0))
    image.save(file, file_format)
    return file.getvalue()
