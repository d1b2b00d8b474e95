"""A tiny backbone with the demo's words, one media worker, and folders of media with a manifest."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from service.backbone.base import load_tokenizer
from service.backbone.blip import Blip
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.config import BlipConfig, TextConfig, VisionConfig
from service.backbone.convert import with_blip_tokens
from service.backbone.folder import load_blip, write_backbone
from service.demo.vocabulary import build_tokenizer
from service.media import MediaWorkers
from tests.service.media.clips import make_clip, make_plain_clip
from tests.service.media.sounds import make_sound_file, tone

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
TONES = (220, 440, 1500)
PATCH, RESOLUTION = 16, 32


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are only slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 32 px, at most 12 tokens."""
    folder = tmp_path_factory.mktemp("backbone")
    build_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32}
    text = TextConfig(**sizes, vocab_size=len(tokenizer), max_positions=16, memory_width=16)
    vision = VisionConfig(**sizes, patch=PATCH, grid=RESOLUTION // PATCH)
    ids = with_blip_tokens(tokenizer)
    model = Blip(BlipConfig(vision=vision, text_encoder=text, decoder=text, embed_dim=8, special_ids=ids))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2, generator=generator)
            elif "norm" not in name:
                parameter.zero_()
    write_backbone(folder / "backbone", model, tokenizer, {}, max_text_tokens=12)
    return folder / "backbone"


@pytest.fixture(scope="session")
def backbone(backbone_folder: Path) -> BlipBackbone:
    """The tiny backbone, loaded."""
    return load_blip(backbone_folder)


@pytest.fixture(scope="session")
def workers() -> Iterator[MediaWorkers]:
    """One media worker for all tests."""
    with MediaWorkers(1) as running:
        yield running


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COLOUR.png and COLOUR.mp4 of every colour, 0.mp4 to 2.mp4, HZ.wav of every tone, broken.png, broken.mp4 and broken.wav."""
    folder = tmp_path_factory.mktemp("media")
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(colour))
        (folder / f"{name}.mp4").write_bytes(make_plain_clip(colour))
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(make_clip(num_frames=10 + 10 * number))
    for hz in TONES:
        (folder / f"{hz}.wav").write_bytes(make_sound_file(tone(hz, 0.5)))
    (folder / "broken.wav").write_bytes(b"RIFF\0\0\0\0WAVE" + bytes(40))
    (folder / "broken.png").write_bytes(png((1, 2, 3))[:40])
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    return folder


def png(colour: tuple[int, int, int]) -> bytes:
    """A picture with a gradient, so that resizing rounds."""
    picture = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    file = BytesIO()
    Image.blend(picture, Image.new("RGB", picture.size, colour), 0.8).save(file, "PNG")
    return file.getvalue()


def manifest(folder: Path, *lines: dict[str, Any], name: str = "train.jsonl") -> Path:
    """A manifest in the media's folder."""
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
