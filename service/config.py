"""Settings: one frozen object, built once at the edge from BANK_* variables and command line flags, and passed down."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.config import NAME_PATTERN, Architecture, describe
from adapters.errors import AdapterBankError

MIB = 1024 * 1024
CLIENT_KEY_VARIABLE = "BANK_API_KEY"  # no setting: the key that a client of ours sends


class InvalidSettings(AdapterBankError):
    """A setting has a value that cannot be used; the message names it."""


class Settings(BaseSettings):
    """Every knob of the service. The variable of a field is `BANK_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="BANK_", frozen=True, extra="forbid", env_ignore_empty=True)

    home: Path = Field(default=Path("~/.adapter-bank"), description="State: registry, artifacts, galleries, backbones.")
    backbone: Path | None = Field(default=None, description="Backbone folder. Default: HOME/backbone.")
    backbones: str | None = Field(
        default=None,
        description='Several backbones side by side, the default first: "blip=/data/blip,opt=/data/opt".',
    )
    registry_url: str | None = Field(
        default=None, description="Registry shared by replicas, redis://host:6379/0. Default: HOME/registry.sqlite."
    )
    artifacts_url: str | None = Field(
        default=None,
        description="Where packages, and galleries for other hosts, are kept: a folder or URL. Default: at home.",
    )
    artifact_cache_mib: int = Field(
        default=4096, ge=0, description="Disk for packages read from a URL; 0 fetches each of them at every load."
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1 or auto (cuda if there is one).")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Serving precision. bfloat16 halves memory and changes scores slightly."
    )
    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to bind; 0 picks a free one.")
    allow_public: bool = Field(default=False, description="Bind to a public address although there are no API keys.")
    api_keys_file: Path | None = Field(
        default=None,
        description="JSON list of API keys, hashed; read again when it changes. With it, requests need a key.",
    )
    api_keys: str | None = Field(default=None, repr=False, description="The same list itself, in place of a file.")
    slots: str | None = Field(
        default=None,
        description='Adapter slots on the device by rank, e.g. "64:24,128:6,512:2", of a BLIP; "opt=1:16,8:16" of an '
        'OPT, by connectors; joined by ";". Default: from free memory.',
    )
    adapter_memory_fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.9,
        description="Size the default slots to this part of the device's free memory. Default: a usual number, fewer beyond 0.15.",
    )
    host_cache_mib: int = Field(default=2048, gt=0, description="Host memory for adapters that hold no slot.")
    feature_cache_mib: int = Field(
        default=512,
        ge=0,
        description="Device memory, for each backbone, for what encoders made of media that may be asked about again; 0 keeps and shares nothing.",
    )
    cuda_graph_mib: int = Field(
        default=1024,
        ge=0,
        description="Device memory, for each backbone, of recorded words and small batches (CUDA graphs), which are launched as one; 0 records nothing.",
    )
    max_batch_rows: int = Field(default=64, gt=0, description="Rows of a batch: frames, texts, pairs or beams.")
    max_batch_tokens: int = Field(default=32768, gt=0, description="Tokens of a batch's largest forward.")
    max_batch_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="How long a job may wait for others to share its batch while the device is idle.",
    )
    max_batch_ms: float = Field(
        default=500.0, gt=0, description="Device time of a batch of several jobs, by their cost and the speed so far."
    )
    max_queue_seconds: float = Field(
        default=20.0, gt=0, description="Admitted work, in seconds of measured device time; above it requests get 429."
    )
    max_request_mib: int = Field(default=64, gt=0, description="Largest request body.")
    max_package_mib: int = Field(default=1024, gt=0, description="Largest package that may be pushed.")
    package_sources: str | None = Field(
        default=None, description='Kinds of URL that packages may be fetched from, e.g. "hf,s3". Default: none.'
    )
    admission_mib: int = Field(default=1024, gt=0, description="Bytes of media admitted at once.")
    default_timeout_ms: int = Field(default=30_000, gt=0, description="Deadline of a request that names none.")
    max_timeout_ms: int = Field(default=300_000, gt=0, description="Longest deadline a request may ask for.")
    media_workers: int = Field(default=2, gt=0, le=64, description="Processes that decode media.")
    max_pixels: int = Field(default=40_000_000, gt=0, description="Pixels of one picture or frame.")
    max_duration_s: float = Field(default=600.0, gt=0, description="Length of one clip.")
    decode_timeout_s: float = Field(
        default=20.0, gt=0, description="Time to decode one medium; then its worker is killed."
    )
    max_k: int = Field(default=1000, gt=0, description="Most hits of one /retrieve.")
    max_rerank_depth: int = Field(
        default=256, gt=0, description="Most candidates of one /retrieve that are looked at again."
    )
    max_candidates: int = Field(default=20_000, gt=0, le=50_000, description="Most candidate answers of one /vqa.")
    rollback_window_s: float = Field(
        default=86_400.0, ge=0, description="How long after a rollout its galleries are kept ready for a rollback."
    )
    gallery_sources: str | None = Field(
        default=None,
        description='Folders that galleries may be built from over HTTP, "/data/media:/data/clips". Default: none.',
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads of the device thread; 0 takes all processors but one."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="A server's log: lines for people, or one JSON object a line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that a server logs."
    )

    @field_validator("slots")
    @classmethod
    def _slots_parse(cls, value: str | None) -> str | None:
        if value is not None:
            parse_slots(value)
        return value

    @field_validator("backbones")
    @classmethod
    def _backbones_parse(cls, value: str | None) -> str | None:
        if value is not None:
            parse_backbones(value)
        return value

    @field_validator("gallery_sources")
    @classmethod
    def _gallery_sources_are_absolute(cls, value: str | None) -> str | None:
        for folder in split_folders(value):
            if not folder.is_absolute():
                raise ValueError(f"{str(folder)!r} is no absolute path")
        return value

    @model_validator(mode="after")
    def _one_choice_of_backbones(self) -> Self:
        if self.backbone is not None and self.backbones is not None:
            raise ValueError("give backbone or backbones, not both")
        return self

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if self.api_keys is not None and self.api_keys_file is not None:
            raise ValueError("give api_keys or api_keys_file, not both")
        return self

    @classmethod
    def load(cls, **flags: Any) -> "Settings":
        """From the environment and command line flags (which win; None means not given).

        Raises: InvalidSettings naming the key and what is wrong; unknown BANK_* variables too.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        unknown = unknown_variables(os.environ)
        if unknown:
            raise InvalidSettings(f"unknown settings: {', '.join(unknown)}")
        _check_key_variables(os.environ)
        try:
            settings = cls(**given)
        except ValidationError as error:
            raise InvalidSettings(describe(error)) from error
        paths = {"home": settings.home, "api_keys_file": settings.api_keys_file}
        return settings.model_copy(update={name: path and path.expanduser() for name, path in paths.items()})

    @property
    def backbone_folder(self) -> Path:
        """Where the default backbone is."""
        return next(iter(self.backbone_folders.values()))

    @property
    def backbone_folders(self) -> dict[str, Path]:
        """Where the backbones are, by name, the default first."""
        if self.backbones is not None:
            return parse_backbones(self.backbones)
        return {"backbone": self.backbone or self.home / "backbone"}

    @property
    def source_folders(self) -> tuple[Path, ...]:
        """The folders that galleries may be built from over HTTP."""
        return split_folders(self.gallery_sources)

    def package_schemes(self) -> tuple[str, ...]:
        """Schemes of URLs that packages may be fetched from."""
        return tuple(scheme.strip().lower() for scheme in (self.package_sources or "").split(",") if scheme.strip())

    def slot_buckets(self, kind: str = "blip") -> tuple[tuple[int, int], ...] | None:
        """(rank, slots) by rising rank for backbones of a kind, or None for the default from free memory."""
        return None if self.slots is None else parse_slots(self.slots).get(kind)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """BANK_* variables that no setting has; a misspelt one must not be ignored in silence."""
    known = {f"BANK_{name.upper()}" for name in Settings.model_fields} | {CLIENT_KEY_VARIABLE}
    return sorted(name for name in environment if name.startswith("BANK_") and name not in known)


def _check_key_variables(environment: Mapping[str, str]) -> None:
    """Doubt about keys must not open the door. Raises: InvalidSettings."""
    for name in ("BANK_API_KEYS", "BANK_API_KEYS_FILE"):
        if name in environment and not environment[name].strip():
            raise InvalidSettings(f"{name} is empty: give keys, or take the variable away to have none")
    if environment.get(CLIENT_KEY_VARIABLE, "").lstrip().startswith(("[", "{")):
        raise InvalidSettings(f"{CLIENT_KEY_VARIABLE} is the one key a client sends; a server's list is BANK_API_KEYS")


def split_folders(text: str | None) -> tuple[Path, ...]:
    """'/a:/b' -> (/a, /b)."""
    return tuple(Path(part).expanduser() for part in (text or "").split(":") if part)


def parse_slots(text: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """'64:24,128:6' -> {"blip": ((64, 24), (128, 6))}, by rising rank; 'blip=64:24;opt=8:16' has one for each kind.

    Raises: ValueError.
    """
    slots: dict[str, tuple[tuple[int, int], ...]] = {}
    for part in text.split(";"):
        kind, _, pairs = part.rpartition("=")
        kind = kind.strip() or "blip"
        if kind not in get_args(Architecture) or kind in slots:
            raise ValueError(
                f'{text!r} is not of the form "blip=...;opt=...": {kind!r} is given twice, or is no kind of backbone ({", ".join(get_args(Architecture))})'
            )
        slots[kind] = _parse_pairs(pairs.strip())
    return slots


def _parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        raise ValueError(f'{text!r} is not of the form "rank:slots,rank:slots"')
    pairs = [(int(rank), int(slots)) for rank, slots in (part.split(":") for part in text.split(","))]
    if any(rank < 1 or slots < 1 for rank, slots in pairs) or len({rank for rank, _ in pairs}) != len(pairs):
        raise ValueError(f"{text!r}: ranks must differ, and ranks and slots be at least 1")
    return tuple(sorted(pairs))


def parse_backbones(text: str) -> dict[str, Path]:
    """'blip=/a,opt=/b' -> {"blip": /a, "opt": /b}, in this order. Raises: ValueError."""
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, is_named, folder = (piece.strip() for piece in part.partition("="))
        if not is_named or not folder or not re.fullmatch(NAME_PATTERN, name) or name in found:
            raise ValueError(f'{part!r} is not of the form "name=folder", or its name is given twice')
        found[name] = Path(folder).expanduser()
    return found
