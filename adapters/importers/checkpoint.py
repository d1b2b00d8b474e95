"""What the importers of trainers' checkpoints share: reading them as data alone, and what they become."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import ConversionError


@dataclass(frozen=True)
class ImportedAdapter:
    """A package's config and tensors, not yet written."""

    config: AdapterConfig
    tensors: dict[str, Tensor]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's document, `model` and `config` at least.

    Raises: ConversionError for a file that cannot be read as data alone, or holds something else.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a dozen kinds of bad file
        raise ConversionError(f"cannot read {path.name}: {str(error).splitlines()[0]}", param="checkpoint") from error
    if not isinstance(document, dict) or not {"model", "config"} <= document.keys():
        raise ConversionError(
            f"{path.name} is no trainer's checkpoint: it lacks 'model' or 'config'", param="checkpoint"
        )
    model, config = document["model"], document["config"]
    if not (
        isinstance(config, dict) and isinstance(model, dict) and all(isinstance(t, Tensor) for t in model.values())
    ):
        raise ConversionError(
            f"{path.name} is no trainer's checkpoint: 'model' must hold tensors and 'config' options",
            param="checkpoint",
        )
    return document


def as_json(value: Any) -> JsonValue:
    """A trainer's YAML settings as JSON data; anything exotic as text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
