"""A home with a tiny random backbone, two adapters and three galleries: real parts all the way, small enough to build in a second."""

import asyncio
import time
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing, Task
from adapters.families.uniadapter import init_tensors
from adapters.package import write_package
from service.backbone.base import load_tokenizer
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, TextConfig, VisionConfig
from service.backbone.convert import with_blip_tokens
from service.backbone.folder import load_backbone, write_backbone
from service.config import Settings
from service.demo.vocabulary import build_tokenizer
from service.gallery import Source
from service.home import push_package
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime
from service.types import RequestContext
from tests.service.media.clips import make_clip

WIDTH = 16
RANK = 4
NUM_PICTURES = 5
ANSWERS = ("red", "green", "blue")
ODD_ID = "röd & grön/№ 1?.png"  # an item id that only survives properly quoted
SUFFIX_ID = "folder/media"  # and one that looks like a route


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: int = 48) -> bytes:
    """PNG bytes of one colour."""
    file = BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def build_home(home: Path) -> Settings:
    """Everything a server needs, under `home`."""
    settings = Settings(
        home=home,
        device="cpu",
        media_workers=1,
        slots="4:3",
        threads=1,
        max_k=50,
        max_rerank_depth=8,
        max_candidates=20,
    )
    _write_backbone(settings, home / "tokenizer")
    backbone = load_backbone(settings.backbone_folder)
    tasks: tuple[Task, ...] = ("vqa", "retrieval")
    for task in tasks:
        config = AdapterConfig(
            family="uniadapter",
            task=task,
            rank=RANK,
            backbone=BackboneRef(architecture="blip", width=WIDTH, layers=2, parts=dict(backbone.parts)),
            preprocessing=Preprocessing(resolution=32, num_frames=4),
            decoding=AnswerDecoding(num_beams=2, max_length=4, answers=ANSWERS) if task == "vqa" else None,
        )
        tensors = init_tensors(config, backbone.dims(), torch.Generator().manual_seed(1))
        write_package(home / "packages" / task, config, tensors, f"# {task}\n", None)
        push_package(settings, home / "packages" / task, task)
    asyncio.run(_build_galleries(settings, home / "media"))
    return settings


def _write_backbone(settings: Settings, tokenizer_folder: Path) -> None:
    build_tokenizer(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = with_blip_tokens(tokenizer)
    text = TextConfig(
        width=WIDTH, layers=2, heads=2, mlp_width=32, vocab_size=len(tokenizer), max_positions=32, memory_width=WIDTH
    )
    vision = VisionConfig(width=WIDTH, layers=2, heads=2, mlp_width=32, patch=16, grid=2)
    config = BlipConfig(vision=vision, text_encoder=text, decoder=text, embed_dim=8, special_ids=ids)
    torch.manual_seed(0)
    model = Blip(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2)
            elif "norm" not in name:
                parameter.zero_()
    write_backbone(settings.backbone_folder, model, tokenizer, {})


async def _build_galleries(settings: Settings, media: Path) -> None:
    media.mkdir()
    pictures = [
        _source(media, f"{i}.png", picture((40 * i, 200 - 40 * i, 90)), {"number": i}) for i in range(NUM_PICTURES)
    ]
    pictures += [_source(media, ODD_ID, picture((9, 9, 9))), _source(media, SUFFIX_ID, picture((250, 250, 250)))]
    clips = [
        Source(f"clip-{i}", "video", _file(media, f"clip-{i}.mp4", make_clip(num_frames=10 + i))) for i in range(2)
    ]
    texts = [Source(f"text-{i}", "text", text=f"a {colour} circle") for i, colour in enumerate(ANSWERS)]
    runtime = Runtime(settings)
    await runtime.start()
    try:
        context = RequestContext(deadline=time.monotonic() + 60)
        for name, sources in (("pictures", pictures), ("clips", clips), ("texts", texts)):
            options = BuildOptions(kind=sources[0].kind)
            await runtime.galleries.build(name, "retrieval", sources, options, context)
    finally:
        await runtime.close()


def _source(media: Path, item_id: str, data: bytes, metadata: dict[str, int] | None = None) -> Source:
    file = _file(media, f"{item_id.replace('/', '_')}", data)
    return Source(item_id, "image", file, metadata=dict(metadata or {}))


def _file(media: Path, name: str, data: bytes) -> Path:
    path = media / name
    path.write_bytes(data)
    return path
