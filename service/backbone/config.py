"""The architecture of a backbone: everything about it that its weights' values do not say."""

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from adapters.config import Strict, describe
from adapters.errors import ConversionError


class TransformerConfig(Strict):
    """The sizes that every stack of layers has."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)


class VisionConfig(TransformerConfig):
    """The vision tower: a pre-norm ViT. `grid` is the native position grid (patches per side)."""

    patch: int = Field(gt=0)
    grid: int = Field(gt=0)
    norm_eps: float = 1e-6


class TextConfig(TransformerConfig):
    """A BERT stack: the text encoder or the text decoder."""

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


class TimesformerConfig(TransformerConfig):
    """A TimeSformer with divided space-time attention. `num_frames` is what its time embeddings are for."""

    kind: Literal["timesformer"] = "timesformer"
    patch: int = Field(gt=0)
    grid: int = Field(gt=0)
    num_frames: int = Field(gt=0)
    norm_eps: float = 1e-6


class AstConfig(TransformerConfig):
    """An audio spectrogram transformer, for spectrograms of `max_steps` steps and `num_mel_bins` bins."""

    kind: Literal["ast"] = "ast"
    patch: int = Field(gt=0)
    frequency_stride: int = Field(gt=0)
    time_stride: int = Field(gt=0)
    num_mel_bins: int = Field(gt=0)
    max_steps: int = Field(gt=0)
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """Patches of a whole spectrogram."""
        frequencies = (self.num_mel_bins - self.patch) // self.frequency_stride + 1
        return frequencies * ((self.max_steps - self.patch) // self.time_stride + 1)

    def as_vision(self) -> VisionConfig:
        """The sizes of its blocks, which are a vision transformer's."""
        return VisionConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_width=self.mlp_width,
            patch=self.patch,
            grid=1,
            norm_eps=self.norm_eps,
        )


class LanguageModelConfig(TransformerConfig):
    """An OPT. `word_width` is that of its word embeddings; `pre_norm` false: LayerNorms follow what they belong to."""

    vocab_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    word_width: int = Field(gt=0)
    pre_norm: bool = True
    final_norm: bool = True
    norm_eps: float = 1e-5

    @property
    def has_word_projection(self) -> bool:
        """Whether words are embedded in another width and projected."""
        return self.word_width != self.width


class OptSpecialIds(Strict):
    """Token ids the language model gives a meaning of its own. Every text starts with `bos` and ends with `eos`."""

    pad: int = Field(ge=0)
    bos: int = Field(ge=0)
    eos: int = Field(ge=0)


class OptConfig(Strict):
    """One frozen OPT with the encoders it is given; one that is absent is None."""

    architecture: Literal["opt"] = "opt"
    language_model: LanguageModelConfig
    vit: VisionConfig | None = None
    timesformer: TimesformerConfig | None = None
    ast: AstConfig | None = None
    special_ids: OptSpecialIds

    @model_validator(mode="after")
    def _heads_divide_widths(self) -> "OptConfig":
        parts = {"language_model": self.language_model, **self.encoders}
        for name, part in parts.items():
            if part.width % part.heads:
                raise ValueError(f"{name}: {part.heads} heads do not divide width {part.width}")
        return self

    @property
    def encoders(self) -> dict[str, VisionConfig | TimesformerConfig | AstConfig]:
        """Those there are, by name."""
        named = {"vit": self.vit, "timesformer": self.timesformer, "ast": self.ast}
        return {name: config for name, config in named.items() if config is not None}
