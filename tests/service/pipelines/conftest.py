"""Galleries that the tests of this folder search."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from service.auth import LOCAL
from service.gallery.sources import Source
from service.gallery.store import Gallery
from service.pipelines.galleries import BuildOptions
from tests.service.media.clips import make_clip
from tests.service.worlds import Service, context, picture

TEXTS = ("a red circle", "a big blue square", "a green triangle and a circle", "red", "the circle is big")
NUM_PICTURES, NUM_CLIPS = 7, 4


@dataclass(frozen=True)
class Collection:
    """Galleries by name: `pictures`, `clips` and `texts` made by `find`; `weighted` and `matched` clips; and the files."""

    folder: Path
    galleries: dict[str, Gallery]

    def __getitem__(self, name: str) -> Gallery:
        return self.galleries[name]


def picture_sources(folder: Path, number: int = NUM_PICTURES) -> list[Source]:
    """Pictures on disk, with captions and metadata."""
    sources = []
    for i in range(number):
        file = folder / f"{i}.png"
        file.write_bytes(picture(i))
        sources.append(Source(f"picture-{i}", "image", file, text=f"caption {i}", metadata={"number": i}))
    return sources


def clip_sources(folder: Path) -> list[Source]:
    """Clips on disk, of different lengths."""
    sources = []
    for i in range(NUM_CLIPS):
        file = folder / f"{i}.mp4"
        file.write_bytes(make_clip(num_frames=8 + 12 * i, size=(32, 32)))
        sources.append(Source(f"clip-{i}", "video", file))
    return sources


def text_sources() -> list[Source]:
    """Sentences."""
    return [Source(f"text-{i}", "text", text=text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="session")
def collection(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Read-only: tests that change files make galleries of their own."""
    folder = tmp_path_factory.mktemp("collection")
    pictures, clips, texts = picture_sources(folder), clip_sources(folder), text_sources()
    galleries = {}
    for name, adapter, sources, options in (
        ("pictures", "find", pictures, BuildOptions("image")),
        ("clips", "find", clips, BuildOptions("video")),
        ("texts", "find", texts, BuildOptions("text")),
        ("weighted", "find", clips, BuildOptions("video", pooling="frame_attention", tau=0.07)),
        ("matched", "frames", clips, BuildOptions("video")),
        ("headed", "heads", pictures, BuildOptions("image", index="hnsw")),
        ("plain", "__base__", pictures, BuildOptions("image")),
    ):
        store = service.runtime.galleries
        record = service.call(store.build(name, adapter, sources, options, context()))
        galleries[name] = service.call(store.version(name, record.version, LOCAL))
    return Collection(folder, galleries)
