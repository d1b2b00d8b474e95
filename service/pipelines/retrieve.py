"""Search: encode the query, search the index, look at candidates again.

none     cosine of unit vectors
frames   each candidate's frames pooled with weights from the query (frame-aware)
match    the cross-encoder's matching logit, frame-aware attention inside
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from adapters.config import BASE_ADAPTER
from adapters.families.uniadapter import FRAME_TEMPERATURE
from adapters.registry import GalleryRecord
from service.admission import Admission
from service.backbone.cost import text_cost, tokens_per_frame, vision_cost
from service.errors import BadQuery, IndexStale
from service.gallery.frames import FrameScores, frame_attention_weights, pool, rerank_frames
from service.gallery.store import Gallery
from service.loader import Loader, Pin
from service.metrics import Metrics
from service.pipelines.blip import Seen, frame_similarities, preprocessing_of, text_limit, weighs_frames
from service.pipelines.galleries import Galleries, frame_features
from service.pipelines.stage_set import StageSet
from service.pipelines.stages import Medium, gather_or_cancel, tokenize_within, within_deadline
from service.types import (
    AdapterInfo,
    FrameWeight,
    GalleryMedia,
    Hit,
    MatchInput,
    MediaBytes,
    RequestContext,
    RetrieveAnswer,
    RetrieveQuery,
    TextQuery,
)

Floats = npt.NDArray[np.float32]

DEFAULT_RERANK_DEPTH = 32
PAIRS_PER_JOB = 16
NOT_MATCHED = -100.0  # the authors' score of a pair that was not looked at


def shortlist(similarities: Floats, depth: int) -> list[int]:
    """The `depth` best positions of similarities [N], best first; of equals the lower position."""
    order = np.argsort(-similarities, kind="stable")
    return [int(position) for position in order[:depth]]


def blend(logits: Floats, similarities: Floats, beta: float = 0.0) -> Floats:
    """Scores [n] of pairs: matching logit plus beta times similarity. Source: the authors' evaluation (beta 0)."""
    return np.asarray(logits[:, 1] + beta * similarities, np.float32)


def match_scores(
    similarities: Floats, depth: int, match: Callable[[list[int]], Floats], *, beta: float = 0.0
) -> Floats:
    """One row [N] of the authors' score table: `match` gives logits [n, 2] of the shortlisted; the others get -100."""
    chosen = shortlist(similarities, depth)
    scores = np.full(len(similarities), NOT_MATCHED, np.float32)
    scores[chosen] = blend(match(chosen), similarities[chosen], beta)
    return scores


@dataclass(frozen=True)
class EncodedSearch:
    """A query as the stages need it: its vector [E], and either its tokens or what was seen."""

    vector: Floats
    ids: tuple[int, ...] | None
    seen: Seen | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidates:
    """Items under consideration, best first: positions [n], the score that orders them, and every stage's scores."""

    positions: list[int]
    scores: dict[str, Floats]
    by: str
    weights: Floats | None = None

    def head(self, k: int) -> "Candidates":
        """The best k."""
        weights = None if self.weights is None else self.weights[:k]
        return Candidates(self.positions[:k], {n: s[:k] for n, s in self.scores.items()}, self.by, weights)

    def ordered(self, stage: str, scores: Floats, weights: Floats | None = None) -> "Candidates":
        """Reordered by a new stage's scores; ties keep the earlier order."""
        order = np.argsort(-scores, kind="stable")
        known = {name: values[order] for name, values in (self.scores | {stage: scores}).items()}
        kept = weights if weights is not None else self.weights
        return Candidates([self.positions[i] for i in order], known, stage, None if kept is None else kept[order])


class RetrievePipeline:
    """Answers `/retrieve`."""

    def __init__(
        self,
        stages: StageSet,
        loader: Loader,
        galleries: Galleries,
        admission: Admission,
        metrics: Metrics,
        *,
        max_k: int,
        max_rerank_depth: int,
    ) -> None:
        self._stages = stages
        self._loader = loader
        self._galleries = galleries
        self._admission = admission
        self._metrics = metrics
        self._max_k = max_k
        self._max_rerank_depth = max_rerank_depth

    async def search(self, query: RetrieveQuery, context: RequestContext) -> RetrieveAnswer:
        """Search a gallery.

        Raises: GalleryNotFound, Forbidden, IndexStale when the adapter is not the one the gallery was embedded with, BadQuery,
        BadMedia, MissingMedia, MissingPart, Overloaded, DeadlineExceeded.
        """
        async with within_deadline(context):
            while True:
                before = self._loader.snapshot.revision
                try:
                    return await self._answer(query, context)
                except IndexStale:
                    if self._loader.snapshot.revision == before:
                        raise
                    # Alias and gallery moved together between the two looks: with both of now they agree.

    async def _answer(self, query: RetrieveQuery, context: RequestContext) -> RetrieveAnswer:
        record, gallery = await self._galleries.live(query.gallery, context.principal, context.routing_key)
        depth = self._depth(query, gallery)
        reference = self._reference(query, record)
        async with self._loader.pin(reference, context.principal, context.routing_key) as pin:
            self._check_key(pin, record, gallery, query)
            medium = await self._medium(query, pin, context)
            with self._admission.permit(self._cost(query, gallery, pin, depth, medium)):
                return await self._search(query, record, gallery, pin, depth, medium, context)

    def _depth(self, query: RetrieveQuery, gallery: Gallery) -> int:
        """How many candidates are looked at again. Raises: BadQuery."""
        if not 1 <= query.k <= self._max_k:
            raise BadQuery(f"k must be between 1 and {self._max_k}, not {query.k}", param="k")
        if query.rerank == "none":
            return 0
        limit = self._max_rerank_depth
        usual = max(min(query.k, len(gallery)), min(DEFAULT_RERANK_DEPTH, limit))
        wanted = query.rerank_depth if query.rerank_depth is not None else usual
        if wanted < min(query.k, len(gallery)):
            raise BadQuery(
                f"rerank_depth {wanted} is below k {query.k}: some hits would have no such score", param="rerank_depth"
            )
        if wanted > limit:
            raise BadQuery(f"rerank_depth {wanted} is above the limit of {limit}", param="rerank_depth")
        return min(wanted, len(gallery))

    def _reference(self, query: RetrieveQuery, record: GalleryRecord) -> str:
        """The adapter asked for; else the version the gallery was embedded with."""
        if query.adapter is not None:
            return query.adapter
        return record.adapter

    def _check_key(self, pin: Pin, record: GalleryRecord, gallery: Gallery, query: RetrieveQuery) -> None:
        if pin.config is not None and pin.config.task != "retrieval":
            raise BadQuery(f"{pin.info.name} was made for {pin.config.task}, not for retrieval", param="adapter")
        manifest = gallery.manifest
        if self._galleries.key(pin, manifest.kind, manifest.pooling, manifest.tau) == record.embedding_key:
            return
        made_by = f"{manifest.adapter.name}" + (f"@{manifest.adapter.version}" if manifest.adapter.version else "")
        asked = f"{pin.info.name}" + (f"@{pin.info.version}" if pin.info.version else "")
        raise IndexStale(
            f"gallery {record.name!r} version {record.version} was embedded with {made_by}; a query embedded with "
            f"{asked} on this backbone cannot be compared with it",
            param="adapter",
        )

    async def _medium(self, query: RetrieveQuery, pin: Pin, context: RequestContext) -> Medium | None:
        """What is searched with, and what is kept of it; None for a text."""
        stages = self._stages.blip(pin)
        match query.query:
            case TextQuery():
                return None
            case MediaBytes():
                medium = await stages.uploaded(query.query)
            case GalleryMedia(gallery, item):
                medium = await self._galleries.medium(gallery, item, context.principal)
        return stages.recall(medium, pin, context)

    def _cost(self, query: RetrieveQuery, gallery: Gallery, pin: Pin, depth: int, medium: Medium | None) -> float:
        """Estimated operations; candidates whose states are kept turn out cheaper."""
        stages = self._stages.blip(pin)
        backbone = stages.backbone
        backbone.require("retrieval", heads=pin.config.heads if pin.config else ())
        preprocessing = preprocessing_of(pin.config, backbone)
        stack = backbone.config.text_encoder
        assert stack is not None
        length = text_limit(pin.config, backbone)
        per_frame = vision_cost(backbone.config, preprocessing.resolution, 1)
        cost = text_cost(stack, 1, length) if medium is None else stages.cost_of_seeing(medium, pin)
        if query.rerank == "match":
            frames = 1 if gallery.manifest.kind == "image" else preprocessing.num_frames
            memory = frames * tokens_per_frame(backbone.config, preprocessing.resolution)
            cost += text_cost(stack, depth, length, memory) + (depth * frames * per_frame if medium is None else 0.0)
        return cost

    async def _search(
        self,
        query: RetrieveQuery,
        record: GalleryRecord,
        gallery: Gallery,
        pin: Pin,
        depth: int,
        medium: Medium | None,
        context: RequestContext,
    ) -> RetrieveAnswer:
        self._check_rerank(query, gallery)
        encoded = await self._encode(query, gallery, pin, medium, context)
        hits = tuple(await self._found(query, encoded, gallery, pin, depth, context))
        info = pin.info
        if query.adapter is None and pin.digest != BASE_ADAPTER:  # found by its weights, which others may share
            by, is_canary = gallery.manifest.adapter, self._loader.snapshot.is_canary(record)
            info = AdapterInfo(by.name, by.version, pin.digest, is_canary=is_canary)
        return RetrieveAnswer(
            record.name, record.version, hits, info, query.rerank, depth, len(gallery), encoded.warnings
        )

    async def _found(
        self,
        query: RetrieveQuery,
        encoded: EncodedSearch,
        gallery: Gallery,
        pin: Pin,
        depth: int,
        context: RequestContext,
    ) -> list[Hit]:
        """The hits, best first."""
        if query.rerank == "none":
            with self._metrics.stage("search", context):  # and what was found is read by the same thread
                return await asyncio.to_thread(_search_hits, gallery, encoded.vector, query.k)
        with self._metrics.stage("search", context):
            candidates = await asyncio.to_thread(_search, gallery, encoded.vector, max(query.k, depth))
        if query.rerank == "frames":
            with self._metrics.stage("frames", context):
                reranked = await asyncio.to_thread(_rerank, gallery, encoded.vector, candidates.positions)
            candidates = candidates.ordered("frames", reranked.scores, reranked.weights)
        else:
            logits, weights = await self._match(encoded, gallery, candidates.positions, pin, context)
            candidates = candidates.ordered("match", blend(logits, candidates.scores["search"]), weights)
        return await asyncio.to_thread(_hits, gallery, candidates.head(query.k))

    def _check_rerank(self, query: RetrieveQuery, gallery: Gallery) -> None:
        kind, mode = gallery.manifest.kind, query.rerank
        is_text = isinstance(query.query, TextQuery)
        if mode == "frames" and kind == "text":
            raise BadQuery(
                "rerank 'frames' needs pictures or clips in the gallery; this one holds texts", param="rerank"
            )
        if mode == "match" and is_text == (kind == "text"):
            raise BadQuery(
                "rerank 'match' compares a text with a picture or clip; both sides here are alike", param="rerank"
            )

    async def _encode(
        self, query: RetrieveQuery, gallery: Gallery, pin: Pin, medium: Medium | None, context: RequestContext
    ) -> EncodedSearch:
        stages = self._stages.blip(pin)
        if isinstance(query.query, TextQuery):
            limit = text_limit(pin.config, stages.backbone)
            tokens = tokenize_within(stages.backbone, query.query.text, limit, param="query.text")
            output = await stages.text(tokens.ids, pin, context)
            return EncodedSearch(np.asarray(output.vector.numpy(), np.float32), tokens.ids, None, tokens.warnings)
        assert medium is not None
        seen = await stages.see(medium, pin, context)
        frames = frame_features(seen.output.frames)
        manifest = gallery.manifest
        weighs = manifest.pooling == "frame_attention" and manifest.kind == "video"
        weights = frame_attention_weights(frames, manifest.tau) if weighs else None
        return EncodedSearch(pool(frames, weights), None, seen)

    async def _match(
        self, encoded: EncodedSearch, gallery: Gallery, positions: Sequence[int], pin: Pin, context: RequestContext
    ) -> tuple[Floats, Floats | None]:
        """Matching logits [n, 2] of the candidates and, with frame-aware attention, how its factors weigh the frames."""
        parts = [positions[i : i + PAIRS_PER_JOB] for i in range(0, len(positions), PAIRS_PER_JOB)]
        results = await gather_or_cancel([self._match_part(encoded, gallery, part, pin, context) for part in parts])
        logits = np.concatenate([logits for logits, _ in results])
        weights = [row for _, rows in results for row in rows]
        if not any(len(row) for row in weights):
            return logits, None
        table = np.zeros((len(weights), max(map(len, weights))), np.float32)
        for row, values in zip(table, weights, strict=True):
            row[: len(values)] = values
        return logits, table

    async def _match_part(
        self, encoded: EncodedSearch, gallery: Gallery, positions: Sequence[int], pin: Pin, context: RequestContext
    ) -> tuple[Floats, list[Floats]]:
        stages = self._stages.blip(pin)
        backbone = stages.backbone
        if encoded.ids is None:  # a medium against texts
            assert encoded.seen is not None
            limit = text_limit(pin.config, backbone)
            texts = [gallery.item(position).text or "" for position in positions]
            ids = tuple(tokenize_within(backbone, text, limit, param="text").ids for text in texts)
            seen = [encoded.seen] * len(positions)
            vectors = gallery.vectors[list(positions)]
        else:
            media = [await self._galleries.medium_at(gallery, position) for position in positions]
            seen = await gather_or_cancel([stages.see(medium, pin, context) for medium in media])
            ids = (encoded.ids,) * len(positions)
            vectors = np.repeat(encoded.vector[None], len(positions), axis=0)
        weighs = weighs_frames(pin.config)
        similarities = [
            frame_similarities(one.output.frames, torch.from_numpy(np.array(vector, np.float32))) if weighs else None
            for one, vector in zip(seen, vectors, strict=True)
        ]
        pairs = MatchInput(ids, tuple(one.output.states for one in seen), tuple(similarities))
        output = await stages.match(pairs, pin, context)
        weights = [_softmax(s) if s is not None else np.empty(0, np.float32) for s in similarities]
        return np.asarray(output.logits.numpy(), np.float32), weights


def _search(gallery: Gallery, vector: Floats, k: int) -> Candidates:
    found = gallery.index.search(vector[None], k, num_threads=1)
    return Candidates([int(p) for p in found.positions[0]], {"search": found.scores[0]}, "search")


def _search_hits(gallery: Gallery, vector: Floats, k: int) -> list[Hit]:
    return _hits(gallery, _search(gallery, vector, k))


def _rerank(gallery: Gallery, vector: Floats, positions: Sequence[int]) -> FrameScores:
    frames, lengths = gallery.frames_of(positions)
    return rerank_frames(vector, frames, lengths, gallery.manifest.tau)


def _hits(gallery: Gallery, candidates: Candidates) -> list[Hit]:
    hits = []
    for rank, position in enumerate(candidates.positions):
        item = gallery.item(position)
        frames: tuple[FrameWeight, ...] = ()
        if candidates.weights is not None and item.frame_times_s:
            weights = candidates.weights[rank].tolist()
            frames = tuple(FrameWeight(t, w) for t, w in zip(item.frame_times_s, weights, strict=False))
        scores = {stage: float(values[rank]) for stage, values in candidates.scores.items()}
        hits.append(
            Hit(
                id=item.id,
                score=scores[candidates.by],
                scores=scores,
                metadata=item.metadata,
                text=item.text,
                frames=frames,
                has_thumbnail=gallery.thumbnail(position) is not None,
                has_media=item.media is not None,
            )
        )
    return hits


def _softmax(similarity: torch.Tensor) -> Floats:
    """The frame weights that the cross-attention's key factors stand for: softmax(f / 4), sum 1."""
    return np.asarray(torch.softmax(similarity / FRAME_TEMPERATURE, dim=0).numpy(), np.float32)
