"""What a training run is told, checked once at the edge."""

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, JsonValue, ValidationError, model_validator

from adapters.config import Strict, describe
from service.config import InvalidSettings


class TrainOptions(Strict):
    """One run. None stands for what is usual: `checkpoint` OUT.ckpt beside the package, `resolution` the backbone's own,
    `learning_rate` and `num_frames` the family's.

    `heads` (retrieval): tune a copy of the projection and matching heads too. `queue_size` (retrieval): earlier pairs kept
    as negatives. `cache_mib`: memory for decoded media. `checkpoint_every` is in steps.
    """

    backbone: Path
    task: Literal["retrieval", "vqa"]
    data: Path
    out: Path
    rank: int = Field(default=128, gt=0, le=8192)
    kv_rank: int | None = Field(default=None, gt=0, le=8192)
    frame_aware: bool = False
    heads: bool = True
    steps: int = Field(default=1000, gt=0)
    batch_size: int = Field(default=16, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    num_frames: int | None = Field(default=None, gt=0, le=256)
    resolution: int | None = Field(default=None, gt=0, le=2048)
    queue_size: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    checkpoint: Path | None = None
    checkpoint_every: int = Field(default=100, gt=0)
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    media_workers: int = Field(default=2, gt=0, le=64)
    cache_mib: int = Field(default=2048, ge=0)

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """From command line flags; None means not given. Raises: InvalidSettings naming each flag that is wrong."""
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise InvalidSettings(describe(error)) from error

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        if self.task == "vqa" and (self.frame_aware or self.queue_size):
            raise ValueError("frame_aware and queue_size belong to retrieval")
        if self.task == "retrieval" and self.batch_size < 2:
            raise ValueError("retrieval learns from the other pairs of a batch: batch_size must be at least 2")
        return self

    @property
    def is_retrieval(self) -> bool:
        """Whether the adapter will retrieve, rather than answer."""
        return self.task == "retrieval"

    @property
    def checkpoint_file(self) -> Path:
        """Where the run's state is kept."""
        return self.checkpoint or self.out.with_name(f"{self.out.name}.ckpt")

    @property
    def quarantine_file(self) -> Path:
        """Where media that cannot be used are listed."""
        return self.checkpoint_file.with_name(f"{self.checkpoint_file.name}.quarantine.json")

    def numeric(self) -> dict[str, JsonValue]:
        """The options of every family that decide the numbers, beside those `fit` records itself and the package's config."""
        return self.model_dump(mode="json", include={"task", "batch_size", "seed", "precision"})


def pick_device(name: str) -> torch.device:
    """The device of an option; `auto` is cuda where there is one. Raises: InvalidSettings."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidSettings(f"{name!r} is no device", param="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("there is no CUDA device here", param="device")
    return device
