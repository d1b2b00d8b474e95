"""All that travels between layers. Imports none of ours but the name of the base adapter and who asks.

A request becomes stages; each stage is a `Job` that waits in the scheduler, runs in a `Batch` and settles with the
output type of its stage. Shapes: F frames, P tokens of a frame (CLS first), D width, E embedding size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from adapters.config import BASE_ADAPTER
from service.auth import LOCAL, Principal

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["vision", "text", "match", "perceive", "generate", "rank"]
MediaKind = Literal["image", "video", "audio"]
GalleryKind = Literal["image", "video", "text"]
RerankMode = Literal["none", "frames", "match"]

# --- stages: what goes in ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VisionInput:
    """Frames of one clip, or one picture: pixels [F, 3, R, R] float32, preprocessed."""

    pixels: Tensor


@dataclass(frozen=True, slots=True)
class TextInput:
    """One text: [CLS] words [SEP]."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatchInput:
    """Texts against clips, pair by pair: ids[n] with states[n] [F, P, D].

    similarities[n] [F] are the text's cosines with the clip's frames, on the host, where the adapter weighs frames, else None.
    """

    ids: tuple[tuple[int, ...], ...]
    states: tuple[Tensor, ...]
    similarities: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class GenerateInput:
    """A question about states [M, D], answered by beam search (1 beam: greedy). `max_length` counts [DEC]."""

    question_ids: tuple[int, ...]
    states: Tensor
    num_beams: int
    max_length: int


@dataclass(frozen=True, slots=True)
class RankInput:
    """A question about states [M, D], answered by the best of given answers ([DEC] words [SEP] each)."""

    question_ids: tuple[int, ...]
    states: Tensor
    candidates: tuple[tuple[int, ...], ...]
    k: int


@dataclass(frozen=True, slots=True)
class PerceiveInput:
    """One medium for a perceptual encoder: pixels [3, R, R] or [F, 3, R, R], or a spectrogram [S, M]; float32."""

    encoder: str
    values: Tensor


@dataclass(frozen=True, slots=True)
class ContinueInput:
    """A text that a language model goes on with, by beam search (1 beam: greedy) up to `max_length` ids in all.

    `states` [blocks, d] is what the adapter's encoder made of the medium; None without one.
    """

    start_ids: tuple[int, ...]
    states: Tensor | None
    num_beams: int
    max_length: int


@dataclass(frozen=True, slots=True)
class ChooseInput:
    """A text and what may follow it, of which the best is chosen; candidates start with the start token. See ContinueInput."""

    start_ids: tuple[int, ...]
    states: Tensor | None
    candidates: tuple[tuple[int, ...], ...]
    k: int


StageInput = (
    VisionInput | TextInput | MatchInput | GenerateInput | RankInput | PerceiveInput | ContinueInput | ChooseInput
)

# --- stages: what comes out --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VisionOutput:
    """states [F, P, D] on the device; frames [F, E] unnormalised projections of each CLS, on the host, float32."""

    states: Tensor
    frames: Tensor | None


@dataclass(frozen=True, slots=True)
class TextOutput:
    """vector [E], unit norm, on the host, float32."""

    vector: Tensor


@dataclass(frozen=True, slots=True)
class MatchOutput:
    """logits [N, 2] of the pairs, on the host, float32; index 1 is "match"."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A generated answer: ids from [DEC] on, without padding. `score` is the mean log-probability of its length rule."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """Hypotheses, best first. `gap` is the smallest distance between a choice made and the one passed over."""

    hypotheses: tuple[Hypothesis, ...]
    gap: float


@dataclass(frozen=True, slots=True)
class RankOutput:
    """Indices into the candidates in shortlist order, their scores, and the chosen one's place in that list."""

    indices: tuple[int, ...]
    scores: tuple[float, ...]
    first_token_probs: tuple[float, ...]
    best: int


@dataclass(frozen=True, slots=True)
class PerceiveOutput:
    """states [blocks, d] of an encoder's first token, on the device."""

    states: Tensor


StageOutput = VisionOutput | TextOutput | MatchOutput | GenerateOutput | RankOutput | PerceiveOutput

# --- jobs --------------------------------------------------------------------------------------------------

_job_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One stage of one request, as data. Jobs of equal `backbone`, `stage` and `shape` may share a batch, whatever their adapter.

    adapter      weights digest, or `__base__`
    backbone     name of the one it runs on; empty: the default
    rows, tokens what the batch limits count: rows of the largest forward, and rows times their tokens
    cost         estimated floating point operations
    deadline     on the monotonic clock, seconds
    client       who is served fairly against whom
    request_id   of the request it belongs to, for the log
    """

    stage: Stage
    adapter: str
    inputs: StageInput
    shape: tuple[int, ...]
    rows: int
    tokens: int
    cost: float
    deadline: float
    client: str = ""
    background: bool = False
    request_id: str = ""
    backbone: str = ""
    number: int = field(default_factory=lambda: next(_job_numbers))
    submitted_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs that run together; never empty."""

    jobs: tuple[Job, ...]

    @property
    def stage(self) -> Stage:
        """The stage all jobs share."""
        return self.jobs[0].stage

    @property
    def backbone(self) -> str:
        """The backbone all jobs share."""
        return self.jobs[0].backbone


# --- requests and answers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """Which adapter answered."""

    name: str
    version: int | None
    digest: str
    alias: str | None = None
    is_canary: bool = False


BASE_INFO = AdapterInfo(BASE_ADAPTER, None, BASE_ADAPTER)


@dataclass(frozen=True, slots=True)
class MediaBytes:
    """An uploaded picture, clip or sound."""

    kind: MediaKind
    data: bytes


@dataclass(frozen=True, slots=True)
class GalleryMedia:
    """A picture or clip that is an item of a gallery."""

    gallery: str
    item: str


MediaSource = MediaBytes | GalleryMedia


@dataclass(frozen=True, slots=True)
class GenerateDecode:
    """Answer in free words. None: the adapter's default."""

    num_beams: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RankDecode:
    """Answer by choosing. None: the adapter's answer list, its shortlist length."""

    candidates: tuple[str, ...] | None = None
    k: int | None = None


@dataclass(frozen=True, slots=True)
class CaptionQuery:
    """A picture, clip or sound to be put into words."""

    adapter: str
    media: MediaSource
    decode: GenerateDecode


@dataclass(frozen=True, slots=True)
class VqaQuery:
    """One question about one picture, clip or sound."""

    adapter: str
    question: str
    media: MediaSource
    decode: GenerateDecode | RankDecode


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another answer considered. `index` is its place in the candidates, when answers were ranked."""

    answer: str
    score: float
    index: int | None = None


@dataclass(frozen=True, slots=True)
class VqaAnswer:
    """The answer, best first among `alternatives` too."""

    answer: str
    score: float
    index: int | None
    alternatives: tuple[Alternative, ...]
    adapter: AdapterInfo
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextQuery:
    """Search by a sentence."""

    text: str


RetrievalInput = TextQuery | MediaBytes | GalleryMedia


@dataclass(frozen=True, slots=True)
class RetrieveQuery:
    """Search a gallery. `rerank_depth` candidates are looked at again; `adapter` None: the gallery's own."""

    gallery: str
    query: RetrievalInput
    k: int
    rerank: RerankMode = "none"
    rerank_depth: int | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class FrameWeight:
    """How much a frame counted, and when it is shown (seconds from the clip's start)."""

    time_s: float
    weight: float


@dataclass(frozen=True, slots=True)
class Hit:
    """One item found. `scores` holds every stage that looked at it: "search", "frames", "match"."""

    id: str
    score: float
    scores: Mapping[str, float]
    metadata: Mapping[str, Any]
    text: str | None = None
    frames: tuple[FrameWeight, ...] = ()
    has_thumbnail: bool = False
    has_media: bool = False


@dataclass(frozen=True, slots=True)
class RetrieveAnswer:
    """Hits, best first, of one gallery version."""

    gallery: str
    gallery_version: int
    hits: tuple[Hit, ...]
    adapter: AdapterInfo
    rerank: RerankMode
    rerank_depth: int
    num_items: int
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class RequestContext:
    """What accompanies a request through every layer.

    `deadline` is on the monotonic clock; `stage_ms` is filled as stages end and returns as response headers. Over HTTP
    `principal` is nobody until a key was checked. `routing_key` decides whether a canary answers; None: it does not.
    The jobs of a request that is `alone` share their batches with nobody: equal jobs are then equal launches.
    """

    deadline: float
    client: str = ""
    request_id: str = ""
    background: bool = False
    alone: bool = False
    principal: Principal = LOCAL
    routing_key: str | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)

    def spent(self, stage: str, seconds: float) -> None:
        """Add the time a stage took."""
        self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + 1000.0 * seconds
