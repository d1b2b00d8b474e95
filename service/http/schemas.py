"""The public contract: what requests may say and what answers look like. An unknown field of a request is an error.

Answers are made from the types of the layers below by their `of` methods; nothing below knows these classes.
"""

import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters.registry import GalleryRecord, Snapshot, VersionRecord
from service.gallery.manifest import GalleryManifest
from service.types import (
    AdapterInfo,
    CaptionQuery,
    GalleryMedia,
    GenerateDecode,
    Hit,
    MediaBytes,
    MediaKind,
    MediaSource,
    RankDecode,
    RetrievalInput,
    RetrieveAnswer,
    RetrieveQuery,
    VqaAnswer,
    VqaQuery,
)

MAX_QUESTION_CHARS = 100_000  # a guard only: how many tokens a question may have is the adapter's to say
MAX_CANDIDATE_CHARS = 10_000
MAX_REFERENCE_CHARS = 256
DEFAULT_K = 10
_BASE64_CHARS_AT_ONCE = 2**18  # the interpreter lock is given back between pieces

_EXAMPLE_DIGEST = "sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
_EXAMPLE_ADAPTER: dict[str, JsonValue] = {"name": "vqa", "version": 3, "digest": _EXAMPLE_DIGEST, "alias": "prod"}
_EXAMPLE_PICTURE: dict[str, JsonValue] = {"base64": "/9j/4AAQSkZJRgABAQ..."}
_EXAMPLE_PART: dict[str, JsonValue] = {"gallery": "clips", "item": "beach/017.mp4"}

Reference = Annotated[str, StringConstraints(min_length=1, max_length=MAX_REFERENCE_CHARS)]
Question = Annotated[str, StringConstraints(max_length=MAX_QUESTION_CHARS)]
Candidate = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CANDIDATE_CHARS)]


def examples(*shown: dict[str, JsonValue]) -> ConfigDict:
    """The part of a model's config that shows examples in the API's documentation."""
    return ConfigDict(json_schema_extra={"examples": list(shown)})


class Model(BaseModel):
    """Base of all: frozen, no NaN. Replies may gain fields, so a client must not mind ones it does not know."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class RequestModel(Model):
    """Base of what clients send: no unknown fields; 5 is a number and "5" is not."""

    model_config = ConfigDict(extra="forbid", strict=True)


# --- Media ------------------------------------------------------------------------------------------------------


class UploadedMedia(RequestModel):
    """A picture, clip or sound inside the JSON text."""

    model_config = examples(_EXAMPLE_PICTURE)

    base64: str = Field(min_length=1, description="The file's bytes: standard alphabet, padded, no line breaks.")


class GalleryMediaRef(RequestModel):
    """An item of a gallery."""

    model_config = examples(_EXAMPLE_PART)

    gallery: Reference
    item: Reference


_UPLOADED_TAG, _GALLERY_TAG = "uploaded media", "gallery item"
UNION_TAGS = frozenset({_UPLOADED_TAG, _GALLERY_TAG, "generate", "rank"})
"""Parts of an error's location that name the variant of a union, not a field."""


MEDIA_URL = "media_url"
"""The type of the error about an address in place of media."""


def _media_tag(value: Any) -> str:
    by_gallery = isinstance(value, GalleryMediaRef) or (isinstance(value, dict) and value.keys() & {"gallery", "item"})
    return _GALLERY_TAG if by_gallery else _UPLOADED_TAG


def _refuse_addresses(value: Any) -> Any:
    if (isinstance(value, dict) and "url" in value) or (isinstance(value, str) and "://" in value[:32]):
        raise PydanticCustomError(
            MEDIA_URL, "media is not fetched from addresses: send its bytes, or name a gallery item"
        )
    return value


Media = Annotated[
    Annotated[UploadedMedia, Tag(_UPLOADED_TAG)] | Annotated[GalleryMediaRef, Tag(_GALLERY_TAG)],
    Discriminator(_media_tag),
    BeforeValidator(_refuse_addresses),
]


def media_source(kind: MediaKind, media: UploadedMedia | GalleryMediaRef) -> MediaSource:
    """Decode an upload, or pass a reference on. Raises: ValueError for bytes that are not base64."""
    if isinstance(media, GalleryMediaRef):
        return GalleryMedia(media.gallery, media.item)
    return MediaBytes(kind, decode_base64(media.base64))


def decode_base64(text: str) -> bytes:
    """Strict base64, piece by piece, so that a large upload does not keep other threads from running. Raises: ValueError."""
    padding = text.find("=")
    if padding != -1 and padding < len(text) - 2:
        raise binascii.Error("padding inside")
    data = bytearray()
    for start in range(0, len(text), _BASE64_CHARS_AT_ONCE):
        data += binascii.a2b_base64(text[start : start + _BASE64_CHARS_AT_ONCE], strict_mode=True)
    return bytes(data)


class _OneMedium(RequestModel):
    """Exactly one of the media fields is given: something to look at."""

    image: Media | None = None
    video: Media | None = None

    @property
    def medium(self) -> tuple[MediaKind, UploadedMedia | GalleryMediaRef] | None:
        """The one that was given."""
        if self.image is not None:
            return "image", self.image
        return None if self.video is None else ("video", self.video)


class _AnyMedium(_OneMedium):
    """Exactly one of the media fields is given: something to look at, or to listen to."""

    audio: Media | None = None

    @property
    def medium(self) -> tuple[MediaKind, UploadedMedia | GalleryMediaRef] | None:
        """The one that was given."""
        return ("audio", self.audio) if self.audio is not None else super().medium

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(given is not None for given in (self.image, self.video, self.audio)) != 1:
            raise PydanticCustomError("one_medium", "give exactly one of image, video and audio")
        return self


# --- POST /vqa --------------------------------------------------------------------------------------------------


class GenerateOptions(RequestModel):
    """Answer in free words, by beam search. What is left out is the adapter's default."""

    model_config = examples({"mode": "generate", "num_beams": 3, "max_new_tokens": 9})

    mode: Literal["generate"] = "generate"
    num_beams: int | None = Field(default=None, ge=1, le=16, description="1 is greedy.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=511)

    def chosen(self) -> GenerateDecode:
        """For the pipeline."""
        return GenerateDecode(self.num_beams, self.max_new_tokens)


class RankOptions(RequestModel):
    """Answer by choosing the most likely candidate. What is left out is the adapter's default."""

    model_config = examples({"mode": "rank", "candidates": ["yes", "no"]}, {"mode": "rank", "k": 128})

    mode: Literal["rank"]
    candidates: tuple[Candidate, ...] | None = Field(
        default=None, min_length=1, description="Default: the adapter's answer list."
    )
    k: int | None = Field(default=None, ge=1, description="How many candidates pass the test of their first token.")


class VqaFields(RequestModel):
    """A question without its medium: the field `request` of a multipart form, whose file part is `image`, `video` or `audio`."""

    model_config = examples({"adapter": "vqa@prod", "question": "what colour is the ball?"})

    adapter: Reference = Field(description="`name`, `name@alias`, `name@7`, `sha256:...`, or `__base__` for none.")
    question: Question
    decode: Annotated[GenerateOptions | RankOptions, Field(discriminator="mode")] = GenerateOptions()

    def with_media(self, media: MediaSource) -> VqaQuery:
        """The query for the pipeline."""
        options = self.decode
        if isinstance(options, RankOptions):
            return VqaQuery(self.adapter, self.question, media, RankDecode(options.candidates, options.k))
        return VqaQuery(self.adapter, self.question, media, options.chosen())


class VqaRequest(_AnyMedium, VqaFields):
    """A question about one picture, clip or sound."""

    model_config = examples(
        {"adapter": "vqa@prod", "question": "what colour is the ball?", "image": _EXAMPLE_PICTURE},
        {
            "adapter": "vqa",
            "question": "is it raining?",
            "video": _EXAMPLE_PART,
            "decode": {"mode": "rank", "candidates": ["yes", "no"]},
        },
    )


class AdapterReply(Model):
    """The adapter that answered."""

    model_config = examples(_EXAMPLE_ADAPTER)

    name: str
    version: int | None = Field(description="null for `__base__`.")
    digest: str
    alias: str | None = Field(description="The alias it was asked for by, if any.")

    @classmethod
    def of(cls, info: AdapterInfo) -> "AdapterReply":
        """From the pipeline's type."""
        return cls(name=info.name, version=info.version, digest=info.digest, alias=info.alias)


class AlternativeReply(Model):
    """Another answer that was considered."""

    model_config = examples({"answer": "green", "score": -1.92, "index": None})

    answer: str
    score: float
    index: int | None = Field(description="Its place in the candidates, when answers were ranked.")


class VqaReply(Model):
    """The answer."""

    model_config = examples(
        {
            "answer": "red",
            "score": -0.31,
            "index": None,
            "alternatives": [{"answer": "green", "score": -1.92, "index": None}],
            "adapter": _EXAMPLE_ADAPTER,
            "warnings": [],
        }
    )

    answer: str
    score: float = Field(description="Log-probability, by the length rule of the decoding mode.")
    index: int | None = Field(description="The answer's place in the candidates, when answers were ranked.")
    alternatives: list[AlternativeReply] = Field(description="Others that were considered, best first.")
    adapter: AdapterReply
    warnings: list[str] = Field(description="What the answer may suffer from, such as words unknown to the tokenizer.")

    @classmethod
    def of(cls, answer: VqaAnswer) -> "VqaReply":
        """From the pipeline's type."""
        return cls(
            answer=answer.answer,
            score=answer.score,
            index=answer.index,
            alternatives=[
                AlternativeReply(answer=other.answer, score=other.score, index=other.index)
                for other in answer.alternatives
            ],
            adapter=AdapterReply.of(answer.adapter),
            warnings=list(answer.warnings),
        )


# --- POST /caption ----------------------------------------------------------------------------------------------


class CaptionFields(RequestModel):
    """A caption's adapter: the field `request` of a multipart form, whose file part is `image`, `video` or `audio`."""

    model_config = examples({"adapter": "caption@prod"})

    adapter: Reference = Field(description="As for a question.")
    decode: GenerateOptions = GenerateOptions()

    def with_media(self, media: MediaSource) -> CaptionQuery:
        """The query for the pipeline."""
        return CaptionQuery(self.adapter, media, self.decode.chosen())


class CaptionRequest(_AnyMedium, CaptionFields):
    """A picture, clip or sound to be put into words."""

    model_config = examples({"adapter": "caption@prod", "image": _EXAMPLE_PICTURE})


class CaptionAlternative(Model):
    """Another caption that was considered."""

    model_config = examples({"caption": "a ball in the grass", "score": -0.94})

    caption: str
    score: float


class CaptionReply(Model):
    """The caption."""

    model_config = examples(
        {
            "caption": "a dog catches a ball",
            "score": -0.71,
            "alternatives": [{"caption": "a dog and a ball", "score": -0.94}],
            "adapter": _EXAMPLE_ADAPTER,
            "warnings": [],
        }
    )

    caption: str
    score: float = Field(description="Log-probability, divided by the length.")
    alternatives: list[CaptionAlternative] = Field(description="Others that were considered, best first.")
    adapter: AdapterReply
    warnings: list[str] = Field(description="What the caption may suffer from.")

    @classmethod
    def of(cls, answer: VqaAnswer) -> "CaptionReply":
        """From the pipeline's type."""
        others = [CaptionAlternative(caption=other.answer, score=other.score) for other in answer.alternatives]
        return cls(
            caption=answer.answer,
            score=answer.score,
            alternatives=others,
            adapter=AdapterReply.of(answer.adapter),
            warnings=list(answer.warnings),
        )


# --- POST /retrieve ---------------------------------------------------------------------------------------------


class QueryInput(_OneMedium):
    """What to search for: exactly one of the three."""

    model_config = examples({"text": "a dog catches a ball"}, {"image": _EXAMPLE_PICTURE}, {"video": _EXAMPLE_PART})

    text: Question | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.text, self.image, self.video)) != 1:
            raise PydanticCustomError("one_input", "give exactly one of text, image and video")
        return self


class RetrieveFields(RequestModel):
    """A search without its query: the field `request` of a multipart form, whose file part is `image` or `video`."""

    model_config = examples({"gallery": "clips", "k": 5})

    gallery: Reference
    k: int = Field(default=DEFAULT_K, ge=1, description="How many hits; above the gallery's size, all of it.")
    rerank: Literal["none", "frames", "match"] = Field(
        default="none", description="Look at the best again: frame by frame, or text against clip (slow, most precise)."
    )
    rerank_depth: int | None = Field(default=None, ge=1, description="How many are looked at again.")
    adapter: Reference | None = Field(default=None, description="Default: the adapter the gallery was embedded with.")

    @model_validator(mode="after")
    def _depth_of_something(self) -> Self:
        if self.rerank_depth is not None and self.rerank == "none":
            raise PydanticCustomError("no_rerank", "rerank_depth needs rerank: frames or match")
        return self

    def with_query(self, query: RetrievalInput) -> RetrieveQuery:
        """The query for the pipeline."""
        return RetrieveQuery(self.gallery, query, self.k, self.rerank, self.rerank_depth, self.adapter)


class RetrieveRequest(RetrieveFields):
    """Search a gallery by a sentence, a picture or a clip."""

    model_config = examples(
        {"gallery": "clips", "query": {"text": "a dog catches a ball"}, "k": 5, "rerank": "frames"},
        {"gallery": "clips", "query": {"image": _EXAMPLE_PICTURE}, "k": 5},
    )

    query: QueryInput


class FrameWeightReply(Model):
    """How much a frame counted for this query."""

    model_config = examples({"time_s": 1.5, "weight": 0.62})

    time_s: float = Field(description="When it is shown, from the clip's start.")
    weight: float = Field(description="The weights of a clip's frames sum to 1.")


class HitReply(Model):
    """One item found."""

    model_config = examples(
        {
            "id": "beach/017.mp4",
            "score": 0.47,
            "scores": {"search": 0.41, "frames": 0.47},
            "metadata": {"place": "beach"},
            "text": "a dog catches a ball",
            "frames": [{"time_s": 0.5, "weight": 0.38}, {"time_s": 1.5, "weight": 0.62}],
            "thumbnail": "/v1/galleries/clips/items/beach%2F017.mp4/thumbnail?version=3",
            "media": "/v1/galleries/clips/items/beach%2F017.mp4/media?version=3",
        }
    )

    id: str
    score: float = Field(description="Of the last stage that looked at it; hits are in this order.")
    scores: dict[str, float] = Field(description="Of every stage that looked at it: search, frames, match.")
    metadata: dict[str, JsonValue]
    text: str | None
    frames: list[FrameWeightReply]
    thumbnail: str | None = Field(description="Path of a small JPEG on this server.")
    media: str | None = Field(description="Path of the picture or clip on this server.")

    @classmethod
    def of(cls, hit: Hit, gallery: str, version: int) -> "HitReply":
        """From the pipeline's type."""
        return cls(
            id=hit.id,
            score=hit.score,
            scores=dict(hit.scores),
            metadata=dict(hit.metadata),
            text=hit.text,
            frames=[FrameWeightReply(time_s=frame.time_s, weight=frame.weight) for frame in hit.frames],
            thumbnail=item_path(gallery, hit.id, "thumbnail", version) if hit.has_thumbnail else None,
            media=item_path(gallery, hit.id, "media", version) if hit.has_media else None,
        )


def item_path(gallery: str, item: str, what: Literal["thumbnail", "media"], version: int) -> str:
    """Path and query of an item's file. Ids may hold any character, so they are quoted whole."""
    return f"/v1/galleries/{gallery}/items/{quote(item, safe='')}/{what}?version={version}"


class RetrieveReply(Model):
    """What was found, best first."""

    model_config = examples(
        {
            "gallery": "clips",
            "gallery_version": 3,
            "num_items": 96,
            "hits": [],
            "adapter": {"name": "retrieval", "version": 2, "digest": _EXAMPLE_DIGEST, "alias": None},
            "rerank": "frames",
            "rerank_depth": 32,
            "warnings": [],
        }
    )

    gallery: str
    gallery_version: int
    num_items: int = Field(description="Size of the gallery version that was searched.")
    hits: list[HitReply]
    adapter: AdapterReply
    rerank: Literal["none", "frames", "match"]
    rerank_depth: int = Field(description="How many were looked at again.")
    warnings: list[str]

    @classmethod
    def of(cls, answer: RetrieveAnswer) -> "RetrieveReply":
        """From the pipeline's type."""
        return cls(
            gallery=answer.gallery,
            gallery_version=answer.gallery_version,
            num_items=answer.num_items,
            hits=[HitReply.of(hit, answer.gallery, answer.gallery_version) for hit in answer.hits],
            adapter=AdapterReply.of(answer.adapter),
            rerank=answer.rerank,
            rerank_depth=answer.rerank_depth,
            warnings=list(answer.warnings),
        )


# --- Adapters ---------------------------------------------------------------------------------------------------


Tier = Literal["device", "host", "disk"]


class AdapterVersionReply(Model):
    """One version of an adapter. Versions never change; aliases move."""

    model_config = examples(
        {
            "version": 3,
            "status": "ready",
            "reason": None,
            "weights_digest": _EXAMPLE_DIGEST,
            "package_digest": _EXAMPLE_DIGEST,
            "family": "uniadapter",
            "task": "vqa",
            "rank": 64,
            "tier": "device",
            "created_at": 1764000000.0,
        }
    )

    version: int
    status: str
    reason: str | None
    weights_digest: str
    package_digest: str
    family: str
    task: str
    rank: int
    tier: Tier = Field(description="The fastest place of this server that holds it now.")
    created_at: float = Field(description="Seconds since 1970.")

    @classmethod
    def of(cls, record: VersionRecord, tier: Tier) -> "AdapterVersionReply":
        """From a registry record."""
        return cls(
            version=record.version,
            status=record.status,
            reason=record.reason,
            weights_digest=record.weights_digest,
            package_digest=record.package_digest,
            family=record.family,
            task=record.task,
            rank=record.rank,
            tier=tier,
            created_at=record.created_at,
        )


class CanaryReply(Model):
    """A version that gets a share of an alias's requests."""

    model_config = examples({"version": 4, "traffic": 0.05})

    version: int
    traffic: float


class AdapterDetails(Model):
    """A registered adapter: its versions, and which of them each alias means."""

    model_config = examples(
        {
            "name": "vqa",
            "tasks": ["vqa"],
            "aliases": {"prod": 3, "next": 4},
            "canaries": {"prod": {"version": 4, "traffic": 0.05}},
            "versions": [],
        }
    )

    name: str
    tasks: list[str] = Field(description="Tasks of the versions that have an alias; of all where none has.")
    aliases: dict[str, int]
    canaries: dict[str, CanaryReply] = Field(description="By alias, while one runs.")
    versions: list[AdapterVersionReply]

    @classmethod
    def of(cls, name: str, snapshot: Snapshot, tier: Callable[[str], Tier]) -> "AdapterDetails":
        """From the registry's snapshot, which has the name. `tier`: where the adapter of a weights digest is."""
        records = snapshot.adapters[name]
        aliases = snapshot.aliases_of(name)
        served = [record for record in records if record.version in aliases.values()] or records
        return cls(
            name=name,
            tasks=sorted({record.task for record in served}),
            aliases=aliases,
            canaries={
                record.alias: CanaryReply(**vars(record.canary))
                for record in snapshot.aliases
                if record.name == name and record.canary is not None
            },
            versions=[AdapterVersionReply.of(record, tier(record.weights_digest)) for record in records],
        )


class AdaptersReply(Model):
    """All registered adapters."""

    model_config = examples(
        {"adapters": [{"name": "vqa", "tasks": ["vqa"], "aliases": {"prod": 3}, "canaries": {}, "versions": []}]}
    )

    adapters: list[AdapterDetails]


# --- Galleries --------------------------------------------------------------------------------------------------


class GalleryVersion(Model):
    """One version of a gallery, whether it is searched or not."""

    model_config = examples(
        {"version": 3, "status": "ready", "live": True, "adapter": "retrieval", "adapter_version": 2}
    )

    version: int
    status: Literal["building", "ready", "retired", "failed", "deleted"]
    live: bool
    adapter: str = Field(description="The name of what embedded it, or a digest where no name is known.")
    adapter_version: int | None = Field(description="Which version of it, where that is known.")

    @classmethod
    def of(cls, record: GalleryRecord, live: int | None) -> "GalleryVersion":
        """From a registry record."""
        return cls(
            version=record.version,
            status=record.status,
            live=record.version == live,
            adapter=record.adapter_name or record.adapter,
            adapter_version=record.adapter_version,
        )


class GalleryDetails(Model):
    """A gallery and the version of it that is searched."""

    model_config = examples(
        {
            "name": "clips",
            "kind": "video",
            "version": 3,
            "versions": [2, 3],
            "num_items": 96,
            "num_quarantined": 1,
            "adapter": {"name": "retrieval", "version": 2, "digest": _EXAMPLE_DIGEST, "alias": None},
            "embedding_key": _EXAMPLE_DIGEST,
            "pooling": "frame_attention",
            "tau": 2.0,
            "index": "flat",
            "follows": "retrieval@prod",
            "created_at": "2025-11-20T12:00:00Z",
            "history": [{"version": 3, "status": "ready", "live": True, "adapter": "retrieval", "adapter_version": 2}],
        }
    )

    name: str
    kind: Literal["image", "video", "text"]
    version: int
    versions: list[int] = Field(description="All versions this server can open.")
    num_items: int
    num_quarantined: int = Field(description="Sources that could not be embedded and were left out.")
    adapter: AdapterReply = Field(description="What its vectors were made with.")
    embedding_key: str
    pooling: str
    tau: float
    index: str
    follows: str | None = Field(description="The alias it goes with, if any.")
    created_at: datetime
    history: list[GalleryVersion] = Field(description="All versions that were not deleted.")

    @classmethod
    def of(cls, manifest: GalleryManifest, view: Snapshot, versions: list[int]) -> "GalleryDetails":
        """From a version's manifest and a registry as whoever asks may see it; `versions` can be opened."""
        by, live, head = manifest.adapter, view.live_version(manifest.name), view.head(manifest.name)
        return cls(
            name=manifest.name,
            kind=manifest.kind,
            version=manifest.version,
            versions=versions,
            num_items=manifest.num_items,
            num_quarantined=manifest.num_quarantined,
            adapter=AdapterReply(name=by.name, version=by.version, digest=by.weights_digest or by.name, alias=None),
            embedding_key=manifest.embedding_key,
            pooling=manifest.pooling,
            tau=manifest.tau,
            index=manifest.index,
            follows=None if head is None else head.follows,
            created_at=manifest.created_at,
            history=[GalleryVersion.of(record, live) for record in view.gallery_versions.get(manifest.name, ())],
        )


class GalleriesReply(Model):
    """All galleries that can be searched."""

    model_config = examples({"galleries": []})

    galleries: list[GalleryDetails]


class ItemReply(Model):
    """One item of a gallery."""

    model_config = examples(
        {
            "id": "beach/017.mp4",
            "metadata": {"place": "beach"},
            "text": "a dog catches a ball",
            "frame_times_s": [0.5, 1.5],
            "duration_s": 2.0,
            "thumbnail": "/v1/galleries/clips/items/beach%2F017.mp4/thumbnail?version=3",
            "media": "/v1/galleries/clips/items/beach%2F017.mp4/media?version=3",
        }
    )

    id: str
    metadata: dict[str, JsonValue]
    text: str | None
    frame_times_s: list[float]
    duration_s: float | None
    thumbnail: str | None
    media: str | None


class ItemsReply(Model):
    """One page of a gallery's items."""

    model_config = examples({"gallery": "clips", "version": 3, "num_items": 96, "items": [], "next_page": "v3.50"})

    gallery: str
    version: int
    num_items: int
    items: list[ItemReply]
    next_page: str | None = Field(description="Send it as `page` for what follows; it stays with this version.")


# --- Health and errors ------------------------------------------------------------------------------------------


class LiveReply(Model):
    """The process answers."""

    model_config = examples({"status": "live"})

    status: Literal["live"] = "live"


class ReadyReply(BaseModel):
    """The server takes requests. Fields beside these tell operators what is loaded."""

    model_config = ConfigDict(extra="allow", **examples({"ready": True, "reasons": []}))

    ready: bool
    reasons: list[str]


class ErrorBody(Model):
    """What went wrong."""

    model_config = examples(
        {
            "code": "adapter_not_found",
            "message": "no adapter 'vqq'; did you mean 'vqa'?",
            "param": "adapter",
            "request_id": "5f0c6d0e9c5b4a54",
        }
    )

    code: str = Field(description="For programs: never changes its meaning.")
    message: str = Field(description="For people.")
    param: str | None = Field(description="The field or header at fault, where there is one.")
    request_id: str


class ErrorReply(Model):
    """The body of every error."""

    model_config = examples(
        {
            "error": {
                "code": "invalid_request",
                "message": "k: must be at least 1",
                "param": "k",
                "request_id": "5f0c6d0e9c5b4a54",
            }
        }
    )

    error: ErrorBody


REQUESTS: Sequence[type[BaseModel]] = (
    VqaRequest,
    VqaFields,
    CaptionRequest,
    CaptionFields,
    RetrieveRequest,
    RetrieveFields,
)
"""Bodies that handlers read themselves; OpenAPI is told of them by `service.http.openapi`."""
