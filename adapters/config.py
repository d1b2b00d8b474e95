"""What `adapter_config.json` says about one adapter: strict, frozen, no unknown fields.

The config names everything that changes an adapter's numbers (family, rank, options, backbone parts, preprocessing,
decoding defaults) and, apart from that, where it came from (`provenance`).
"""

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from adapters.errors import InvalidPackage, InvalidReference

FORMAT_VERSION: Literal[1] = 1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BASE_ADAPTER = "__base__"

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
ALIAS_PATTERN = r"[a-z][a-z0-9_-]{0,31}"
DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"

Digest = Annotated[str, StringConstraints(pattern=f"^{DIGEST_PATTERN}$")]
Architecture = Literal["blip", "opt"]
Task = Literal["retrieval", "vqa", "caption"]


def check_name(name: str, *, param: str = "name") -> str:
    """Return `name` when it may name an adapter or a gallery.

    Raises: InvalidReference for anything that could leave a folder, a key or a metric label.
    """
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise InvalidReference(
            f"{name[:100]!r} is no valid name: 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit, "
            "without '..'",
            param=param,
        )
    return name


class Strict(BaseModel):
    """Base of every config object: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


StandardDeviation = Annotated[float, Field(ge=1e-3)]  # pixels are divided by it


class Preprocessing(Strict):
    """How pixels reach the vision tower. Source: the authors' evaluation transforms."""

    resolution: int = Field(gt=0, le=2048)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[StandardDeviation, StandardDeviation, StandardDeviation] = CLIP_STD
    resample: Literal["bicubic"] = "bicubic"
    num_frames: int = Field(default=8, gt=0, le=256)
    frame_sampling: Literal["uniform"] = "uniform"


class AudioPreprocessing(Strict):
    """How sound reaches the audio encoder: log mel filter banks of mono sound, padded or cut to `max_steps`.

    They are normalised as (x - mean) / (2 std). Source: eP-ALM's audio data sets, which are AST's; those do not resample.
    """

    sampling_rate: Literal[16000] = 16000
    num_mel_bins: int = Field(default=128, gt=0, le=512)
    max_steps: int = Field(default=1024, gt=0, le=16384)
    mean: float = -4.2677393
    std: StandardDeviation = 4.5689974


def _sense(value: object) -> str:
    """Which kind of preprocessing is meant: only that of sound has a sampling rate or filter banks."""
    if isinstance(value, dict):
        return "sound" if value.keys() & {"sampling_rate", "num_mel_bins", "max_steps"} else "pixels"
    return "sound" if isinstance(value, AudioPreprocessing) else "pixels"


AnyPreprocessing = Annotated[
    Annotated[Preprocessing, Tag("pixels")] | Annotated[AudioPreprocessing, Tag("sound")], Discriminator(_sense)
]


class BackboneRef(Strict):
    """The frozen parts an adapter was made for, by digest."""

    architecture: Architecture
    width: int = Field(gt=0, le=65536)
    layers: int = Field(gt=0, le=1024)
    parts: dict[str, Digest]


class AnswerDecoding(Strict):
    """Defaults of answering. Source: UniAdapter's VQA configuration (3 beams, length 10, 128 ranked answers).

    `max_length` counts the tokens of the text the decoder writes, its start included: for a language model, the question.
    """

    num_beams: int = Field(default=3, ge=1, le=16)
    max_length: int = Field(default=10, ge=2, le=512)
    rank_k: int = Field(default=128, ge=1)
    answers: tuple[str, ...] = ()
    answer_ids: tuple[tuple[int, ...], ...] = ()

    @model_validator(mode="after")
    def _one_kind_of_answers(self) -> "AnswerDecoding":
        if self.answers and self.answer_ids:
            raise ValueError("give candidate answers as text or as token ids, not both")
        return self


class AdapterConfig(Strict):
    """One adapter. `options` belongs to the family, which validates it."""

    format_version: Literal[1] = FORMAT_VERSION
    family: str
    task: Task
    rank: int = Field(gt=0, le=8192)
    options: dict[str, JsonValue] = {}
    heads: tuple[str, ...] = ()
    backbone: BackboneRef
    preprocessing: AnyPreprocessing
    max_text_tokens: int = Field(default=35, ge=3, le=4096)
    decoding: AnswerDecoding | None = None
    provenance: dict[str, JsonValue] = {}

    @property
    def pixels(self) -> Preprocessing:
        """The preprocessing of an adapter that looks at pictures or clips."""
        assert isinstance(self.preprocessing, Preprocessing), "the caller knows that it does not listen. This is a bug."
        return self.preprocessing

    @model_validator(mode="after")
    def _blip_sees(self) -> "AdapterConfig":
        if self.backbone.architecture == "blip" and not isinstance(self.preprocessing, Preprocessing):
            raise ValueError("a BLIP looks at pictures and clips, and has no use for audio preprocessing")
        return self

    @classmethod
    def parse(cls, text: str | bytes) -> "AdapterConfig":
        """Read JSON text. Raises: InvalidPackage naming every field that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidPackage(f"adapter_config.json: {describe(error)}", param="adapter_config.json") from error

    def numeric(self) -> dict[str, JsonValue]:
        """Every field that changes numbers, as JSON data: what the weights digest covers beside the tensors."""
        return self.model_dump(mode="json", exclude={"provenance"})


def describe(error: ValidationError) -> str:
    """One line: each wrong field and what is wrong with it."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
