"""Small galleries of made-up clips: real files, features without a model."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from adapters.config import Preprocessing
from service.gallery import EmbeddedBy, EmbeddedItem, GalleryBuild, GalleryPlan, read_sources

KEY = f"sha256:{'1' * 64}"
OTHER_KEY = f"sha256:{'2' * 64}"


def a_plan(kind="video", **changes):
    fields = {
        "name": "clips",
        "kind": kind,
        "embedding_key": KEY,
        "adapter": EmbeddedBy(name="msrvtt", version=3, weights_digest=f"sha256:{'a' * 64}"),
        "preprocessing": Preprocessing(resolution=32, num_frames=4),
    }
    return GalleryPlan(**{**fields, **changes})


def some_media(folder, count=8, suffix=".mp4"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"clip{number}{suffix}").write_bytes(b"media %d" % number * (number + 1))
    return read_sources(folder)


def write_strangely_named(folder, raw_name, content=b"media"):
    """A file whose name is these bytes, where the file system takes them."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), raw_name)))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(content)
    except OSError:
        pytest.skip("this file system refuses the name")
    return path


def write_manifest(tmp_path, *lines):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def embedded(source, dimension=8):
    """Reproducible features of 1 to 4 frames for a clip."""
    seed = sum(source.id.encode())
    frames = np.random.default_rng(seed).standard_normal((1 + seed % 4, dimension)).astype(np.float32) * 4
    times = [0.5 * step for step in range(len(frames))]
    thumbnail = None if seed % 3 == 0 else b"\xff\xd8" + source.id.encode()
    return EmbeddedItem(source.id, frames, frame_times_s=times, duration_s=2.5, thumbnail=thumbnail)


def build_all(root, plan, sources, version=None, **options):
    with GalleryBuild(root, plan, sources, **options) as build:
        for source in build.pending():
            build.add(embedded(source))
        return build.finish(version)


def contents(path):
    """Every file of a version except what says when it was made."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()} | {
        "manifest.json": b""
    }
