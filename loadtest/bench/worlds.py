"""Homes with a random backbone and random adapters: what a service is given before it is measured.

Packages may share their weights: as many files as `num_weights` says are drawn, and further packages link to them. They
still differ in a field that their digest covers and that changes no speed (how many answers are ranked by default), so
that each is checked, folded, kept and put into a slot by itself. What sharing saves is disk, and time to draw.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertTokenizer

from adapters.artifacts.base import hex_of
from adapters.artifacts.local import LocalArtifactStore
from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing, Task
from adapters.families.base import BackboneDims
from adapters.families.uniadapter import init_tensors
from adapters.package import CONFIG_FILE, WEIGHTS_FILE, files_digest, package_files, weights_digest
from adapters.registry import DEFAULT_ALIAS, PackageInfo
from loadtest.bench.models import make_blip
from service.backbone.base import Backbone
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.config import BlipConfig
from service.backbone.convert import with_blip_tokens
from service.backbone.folder import load_backbone, write_backbone
from service.config import Settings
from service.folders import HomeFolders, open_registry

MAX_TEXT_TOKENS = 35
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] ? a and at big blue centre circle colour in is left red star the top what"


@dataclass(frozen=True)
class World:
    """A home that holds a backbone; adapters are added to it."""

    settings: Settings
    dims: BackboneDims
    parts: Mapping[str, str]
    resolution: int

    def add_adapters(
        self, names: Sequence[str], rank: int, *, task: Task = "vqa", num_weights: int | None = None, seed: int = 0
    ) -> None:
        """Put random UniAdapters of a rank into the home, ready; `num_weights` of them have weights of their own, or all.

        The packages carry no probe, which only a push through a server would ask for.
        """
        store = LocalArtifactStore(HomeFolders(self.settings.home).artifacts)
        registry = open_registry(self.settings)
        step = len(names) if num_weights is None else min(num_weights, len(names))
        try:
            for first in range(step):
                tensors = init_tensors(
                    self._config(rank, task, first), self.dims, torch.Generator().manual_seed(seed + first)
                )
                shared: Path | None = None
                files: dict[str, bytes] = {}
                for number in range(first, len(names), step):
                    config = self._config(rank, task, number)
                    if shared is None:
                        files = package_files(config, tensors, f"# Random adapter {first}\n")
                        digest = files_digest(files)
                        store.keep(digest, files)
                        shared = store.path(digest)
                    else:
                        files[CONFIG_FILE] = config.model_dump_json().encode()
                        digest = files_digest(files)
                        _keep_linked(store, digest, files, shared)
                    info = PackageInfo(digest, weights_digest(config, tensors), config.family, config.task, config.rank)
                    record = registry.add_version(names[number], info)
                    registry.set_alias(names[number], DEFAULT_ALIAS, record.version)
        finally:
            registry.close()

    def _config(self, rank: int, task: Task, number: int) -> AdapterConfig:
        return AdapterConfig(
            family="uniadapter",
            task=task,
            rank=rank,
            backbone=BackboneRef(
                architecture="blip", width=self.dims.width, layers=self.dims.layers, parts=dict(self.parts)
            ),
            preprocessing=Preprocessing(resolution=self.resolution),
            max_text_tokens=MAX_TEXT_TOKENS,
            decoding=AnswerDecoding(num_beams=1, max_length=5, rank_k=1 + number),
        )

    def load_backbone(self) -> Backbone:
        """The backbone, on the device and in the precision of the settings."""
        return load_backbone(self.settings.backbone_folder, device=self.settings.device, dtype=self.settings.dtype)

    def disk_bytes(self) -> int:
        """What the packages take on the disk; files that share their bytes count once."""
        files = [path.stat() for path in HomeFolders(self.settings.home).artifacts.rglob("*") if path.is_file()]
        return sum({file.st_ino: 512 * file.st_blocks for file in files}.values())


def _keep_linked(store: LocalArtifactStore, digest: str, files: Mapping[str, bytes], like: Path) -> None:
    """Keep a package whose weights are those in the folder `like`, by a link."""
    folder = store.folder / hex_of(digest)
    folder.mkdir()
    for name, data in files.items():
        if name == WEIGHTS_FILE:
            os.link(like / name, folder / name)
        else:
            (folder / name).write_bytes(data)


@contextmanager
def random_world(config: BlipConfig, **settings: Any) -> Iterator[World]:
    """A home in a temporary folder, with a random backbone of these sizes that knows WORDS, and these settings."""
    with TemporaryDirectory(prefix="bench-") as folder:
        given = Settings.model_validate({"home": Path(folder) / "home", **settings})
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS.split())})
        config = config.model_copy(update={"special_ids": with_blip_tokens(tokenizer)})
        model = make_blip(config, torch.device("cpu"), torch.float32)
        manifest = write_backbone(given.backbone_folder, model, tokenizer, {}, max_text_tokens=MAX_TEXT_TOKENS)
        backbone = BlipBackbone(model, manifest, tokenizer)
        world = World(given, backbone.dims(), manifest.parts, backbone.resolution)
        del model, backbone
        yield world
