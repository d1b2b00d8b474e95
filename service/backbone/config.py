"""The architecture of a BLIP: everything about it that its weights' values do not say."""

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from adapters.config import Strict, describe
from adapters.errors import ConversionError


class VisionConfig(Strict):
    """The vision tower: a pre-norm ViT. `grid` is the native position grid (patches per side)."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    patch: int = Field(gt=0)
    grid: int = Field(gt=0)
    norm_eps: float = 1e-6


class TextConfig(Strict):
    """A BERT stack: the text encoder or the text decoder."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    memory_width: int = Field(gt=0)
    norm_eps: float = 1e-12


class SpecialIds(Strict):
    """Token ids the model gives a meaning of its own. `bos` is [DEC], `enc` is [ENC]."""

    pad: int = Field(ge=0)
    cls: int = Field(ge=0)
    sep: int = Field(ge=0)
    bos: int = Field(ge=0)
    enc: int = Field(ge=0)


class BlipConfig(Strict):
    """One frozen BLIP. A stack that is absent is None, and so is `embed_dim` without projections."""

    architecture: Literal["blip"] = "blip"
    vision: VisionConfig
    text_encoder: TextConfig | None = None
    decoder: TextConfig | None = None
    embed_dim: int | None = None
    special_ids: SpecialIds

    @model_validator(mode="after")
    def _heads_divide_widths(self) -> "BlipConfig":
        for name, stack in (("vision", self.vision), ("text_encoder", self.text_encoder), ("decoder", self.decoder)):
            if stack is not None and stack.width % stack.heads:
                raise ValueError(f"{name}: {stack.heads} heads do not divide width {stack.width}")
        return self

    @classmethod
    def parse(cls, text: str | bytes) -> "BlipConfig":
        """Read JSON text. Raises: ConversionError naming every wrong field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConversionError(f"backbone config: {describe(error)}") from error

    @property
    def uneven_towers(self) -> str | None:
        """Why the towers cannot share adapters, or None when their widths and depths are equal."""
        sizes = {"vision": (self.vision.width, self.vision.layers)}
        for name, stack in (("text_encoder", self.text_encoder), ("decoder", self.decoder)):
            if stack is not None:
                sizes[name] = (stack.width, stack.layers)
        if len(set(sizes.values())) == 1:
            return None
        listed = ", ".join(f"{name} {width} x {layers} layers" for name, (width, layers) in sizes.items())
        return f"a UniAdapter is shared by all towers, which here differ in size: {listed}"
