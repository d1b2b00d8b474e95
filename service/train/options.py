"""What a training run is told, checked once at the edge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, JsonValue, ValidationError, model_validator

from adapters.config import Architecture, Strict, describe
from adapters.families.epalm import MAX_PROMPT_LENGTH
from service.config import InvalidSettings

KINDS: Mapping[Architecture, str] = {"blip": "a BLIP", "opt": "an OPT"}
OWN_OPTIONS: Mapping[Architecture, frozenset[str]] = {
    "blip": frozenset({"rank", "kv_rank", "frame_aware", "heads", "queue_size"}),
    "opt": frozenset(
        {
            "start_layer",
            "end_layer",
            "injected_hidden_states",
            "shared_connector",
            "text_step",
            "prompt_length",
            "prompt_mlp",
            "prompt_learning_rate",
            "answer_token",
        }
    ),
}


class TrainOptions(Strict):
    """One run. The family of its adapter is that of the backbone's kind; options of the other may not be given.

    None stands for what follows from the backbone (`resolution`, `num_frames`, the window of layers), for the family's usual
    (`learning_rate`, `prompt_learning_rate`), and for OUT.ckpt beside the package (`checkpoint`).

    heads, queue_size    retrieval: tune a copy of the projection and matching heads too; earlier pairs kept as negatives
    start_layer          the first layer of the language model that something enters, counted from 0
    end_layer            the layer behind the last one
    answer_token         the token between a question and its answer; "": the text's own end
    cache_mib            memory for decoded media, or for what an encoder made of them
    checkpoint_every     steps
    """

    backbone: Path
    task: Literal["retrieval", "vqa", "caption"]
    data: Path
    out: Path
    rank: int = Field(default=128, gt=0, le=8192)
    kv_rank: int | None = Field(default=None, gt=0, le=8192)
    frame_aware: bool = False
    heads: bool = True
    start_layer: int | None = Field(default=None, ge=0)
    end_layer: int | None = Field(default=None, gt=0)
    injected_hidden_states: int | None = Field(default=None, gt=0, le=1024)
    shared_connector: bool = False
    text_step: int = Field(default=1, gt=0)
    prompt_length: int = Field(default=10, ge=0, le=MAX_PROMPT_LENGTH)
    prompt_mlp: bool = True
    prompt_learning_rate: float | None = Field(default=None, gt=0)
    answer_token: str = "</a>"
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
        if self.task != "retrieval" and (self.frame_aware or self.queue_size):
            raise ValueError("frame_aware and queue_size belong to retrieval")
        if self.task == "retrieval" and self.batch_size < 2:
            raise ValueError("retrieval learns from the other pairs of a batch: batch_size must be at least 2")
        if self.task != "vqa" and self.is_given("answer_token"):
            raise ValueError("answer_token belongs to vqa")
        return self

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.start_layer is not None and self.end_layer is not None and self.start_layer >= self.end_layer:
            raise ValueError("start_layer must be below end_layer")
        if self.prompt_length == 0 and (self.is_given("prompt_mlp") or self.is_given("prompt_learning_rate")):
            raise ValueError("prompt_mlp and prompt_learning_rate have no use without a prompt")
        return self

    def check_fits(self, architecture: Architecture) -> None:
        """Raises: InvalidSettings naming what was given that has no use on a backbone of that kind."""
        for other, names in OWN_OPTIONS.items():
            useless = [name for name in type(self).model_fields if name in names and self.is_given(name)]
            if other != architecture and useless:
                raise InvalidSettings(
                    f"only for the adapters of {KINDS[other]}, and this backbone is {KINDS[architecture]}: "
                    f"{', '.join(useless)}",
                    param=useless[0],
                )

    def is_given(self, name: str) -> bool:
        """Whether an option was given, be it at its default."""
        return name in self.model_fields_set

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
