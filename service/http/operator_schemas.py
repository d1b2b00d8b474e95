"""The public contract of operators: what deploying may say, and what operations, audit lines and replicas look like."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from adapters.registry import UNSET, AliasRecord, AuditRecord, Expect, Replica
from service.gallery.frames import Pooling
from service.gallery.index import IndexKind
from service.http.schemas import Model, Reference, RequestModel, examples
from service.lifecycle.deployments import DEFAULT_TIMEOUT_S, Operation

MAX_REASON_CHARS = 1_000
MAX_TIMEOUT_S = 7 * 24 * 3600.0

Reason = Annotated[str | None, Field(max_length=MAX_REASON_CHARS, description="Kept in the audit log.")]
ExpectedVersion = Annotated[
    int | None,
    Field(
        ge=1,
        description="The version that must be there now; null: none. Another one there: 409, and nothing is changed.",
    ),
]


class Expecting(RequestModel):
    """A compare-and-swap: `expect` counts where it is given."""

    expect: ExpectedVersion = None
    reason: Reason = None

    @property
    def expected(self) -> Expect:
        """The version that must be there; UNSET for whatever is."""
        return self.expect if "expect" in self.model_fields_set else UNSET


class PromoteRequest(Expecting):
    """Which version an alias shall serve, and how."""

    model_config = examples({"version": 7, "expect": 6, "reason": "better on colours"}, {"version": 7, "traffic": 0.05})

    version: int = Field(ge=1)
    traffic: float | None = Field(default=None, gt=0, lt=1, description="A share, as a canary. Left out: everything.")
    migrate: bool = Field(
        default=True, description="Embed galleries that follow the alias anew; false: they stay behind."
    )
    force: bool = Field(default=False, description="Do not wait for replicas; those that lag are listed.")
    timeout_s: float = Field(
        default=DEFAULT_TIMEOUT_S, gt=0, le=MAX_TIMEOUT_S, description="Aborted when it takes longer."
    )


class RollbackRequest(Expecting):
    """Leave the version an alias names for the one before."""

    model_config = examples({"expect": 7, "reason": "wrong answers about sizes"})


class ReasonRequest(RequestModel):
    """Why."""

    model_config = examples({"reason": "superseded"})

    reason: Reason = None


class BuildRequest(RequestModel):
    """What a gallery shall hold, and what embeds it."""

    model_config = examples(
        {"source": "/data/media/clips", "adapter": "my-retrieval"},
        {"source": "clips.jsonl", "adapter": "my-retrieval@3", "pooling": "frame_attention", "index": "hnsw"},
    )

    source: str = Field(
        min_length=1,
        max_length=4_096,
        description="A folder of media, or a manifest NAME.jsonl, on the server and in a folder that it may read from.",
    )
    adapter: Reference = Field(description="What embeds it.")
    pooling: Pooling = "mean"
    index: IndexKind = "flat"
    copy_media: bool = Field(default=False, description="Keep copies of the media in the gallery.")


class RebuildRequest(RequestModel):
    """With which adapter a gallery shall be embedded anew."""

    model_config = examples({}, {"adapter": "my-retrieval@4"})

    adapter: Reference | None = Field(default=None, description="Default: what the alias it follows names now.")


class DeletedGalleryReply(Model):
    """What was given up."""

    model_config = examples({"name": "clips", "versions": [1, 2]})

    name: str
    versions: list[int]


class PackageSource(RequestModel):
    """Where the server fetches a package from. The operator allows the schemes."""

    model_config = examples({"source": "s3://models/vqa-7"})

    source: str = Field(min_length=1, max_length=2_000)


class OperationReply(Model):
    """Long work, as it stands. It goes on without the connection that began it."""

    model_config = examples(
        {
            "id": "0f3a5c7e9b1d2f46",
            "kind": "rollout",
            "adapter": "vqa",
            "subject": "vqa@prod",
            "status": "running",
            "phase": "preparing",
            "actor": "ada",
            "reason": "better on colours",
            "error": None,
            "from_version": 6,
            "to_version": 7,
            "traffic": None,
            "started_at": 1764000000.0,
            "updated_at": 1764000001.0,
            "deadline": 1764000600.0,
            "waiting_for": ["gpu-1-77-1a2b3c4d"],
            "laggards": [],
            "progress": None,
            "galleries": ["clips"],
            "pinned_galleries": [],
        }
    )

    id: str
    kind: Literal["validation", "rollout", "canary", "rollback", "gallery"]
    adapter: str = Field(description="The name of the adapter it is about, or `__base__`.")
    subject: str = Field(description="name@alias, name@version, or the gallery that is built.")
    status: Literal["running", "succeeded", "failed"]
    phase: str
    actor: str
    reason: str | None
    error: str | None
    from_version: int | None
    to_version: int | None = Field(description="Of a gallery: null until it is made.")
    traffic: float | None
    started_at: float = Field(description="Seconds since 1970, as all times here.")
    updated_at: float
    deadline: float | None
    waiting_for: list[str] = Field(description="Living replicas that are not ready yet.")
    laggards: list[str] = Field(description="Living replicas that do not serve the outcome yet.")
    progress: tuple[int, int] | None = Field(description="Items embedded, and of how many.")
    galleries: list[str] = Field(description="Galleries that move with it.")
    pinned_galleries: list[str] = Field(description="Galleries that stay behind.")

    @classmethod
    def of(cls, operation: Operation) -> "OperationReply":
        """From the layers below."""
        fields: dict[str, Any] = dict(vars(operation))
        for name in ("waiting_for", "laggards", "galleries", "pinned_galleries"):
            fields[name] = list(fields[name])
        return cls(**fields)


class OperationsReply(Model):
    """Operations, the latest first."""

    model_config = examples({"operations": []})

    operations: list[OperationReply]


class AliasReply(Model):
    """What an alias serves."""

    model_config = examples(
        {"name": "vqa", "alias": "prod", "version": 6, "canary": {"version": 7, "traffic": 0.05}, "history": [4, 5]}
    )

    name: str
    alias: str
    version: int
    canary: dict[str, float] | None
    history: list[int] = Field(description="Versions it named before, the latest last.")
    updated_at: float

    @classmethod
    def of(cls, record: AliasRecord) -> "AliasReply":
        """From a registry record."""
        canary = None if record.canary is None else vars(record.canary)
        return cls(
            name=record.name,
            alias=record.alias,
            version=record.version,
            canary=canary,
            history=list(record.history),
            updated_at=record.updated_at,
        )


class UnloadReply(Model):
    """What became free on the replica that answered."""

    model_config = examples({"freed_bytes": {"device": 4718592, "host": 4718592}})

    freed_bytes: dict[str, int] = Field(
        description="Bytes by tier. Slots are allocated once: theirs are free for another adapter."
    )


class AuditLine(Model):
    """One change of the registry."""

    model_config = examples(
        {
            "generation": 41,
            "at": 1764000000.0,
            "actor": "ada",
            "action": "set_alias",
            "subject": "vqa@prod",
            "before": "6",
            "after": "7",
            "reason": "better on colours",
        }
    )

    generation: int
    at: float
    actor: str
    action: str
    subject: str
    before: str | None
    after: str | None
    reason: str | None

    @classmethod
    def of(cls, record: AuditRecord) -> "AuditLine":
        """From a registry record."""
        return cls(**vars(record))


class AuditReply(Model):
    """Changes, the latest first."""

    model_config = examples({"lines": []})

    lines: list[AuditLine]


class ReplicaReply(Model):
    """A server, as it last described itself."""

    model_config = examples(
        {
            "id": "gpu-1-77-1a2b3c4d",
            "generation": 41,
            "is_serving": True,
            "is_alive": True,
            "age_s": 0.8,
            "details": {"url": "http://127.0.0.1:8000", "device": "cuda:0", "resident": {"device": [], "host": []}},
        }
    )

    id: str
    generation: int = Field(description="Of the registry state it serves.")
    is_serving: bool
    is_alive: bool
    age_s: float = Field(description="Seconds since it was heard of.")
    details: dict[str, JsonValue]

    @classmethod
    def of(cls, replica: Replica, *, is_alive: bool) -> "ReplicaReply":
        """From a registry record."""
        details: dict[str, Any] = dict(replica.details)
        return cls(
            id=replica.id,
            generation=replica.generation,
            is_serving=replica.is_serving,
            is_alive=is_alive,
            age_s=round(replica.age_s, 3),
            details=details,
        )


class ReplicasReply(Model):
    """All servers of a registry, and where the registry stands."""

    model_config = examples({"generation": 41, "replicas": []})

    generation: int
    replicas: list[ReplicaReply]
