"""From frame features to one vector per item, and frame-aware scores at query time. NumPy and formulas only.

Notation: `frames` v [N, T, E] float32 are **unnormalised** projected CLS tokens, v_t = vision_proj(CLS_t); an item with fewer than
T frames is padded, `lengths` [N] says how many count, and whatever stands behind them (NaN too) is never read. One item may
come as [T, E]; results then lose their first axis as well. Weights are 0 on padding and sum to 1 over an item's frames.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Pooling = Literal["mean", "frame_attention"]

DEFAULT_TAU = 2.0
"""Temperature of both frame weightings: far above it all frames count alike, far below one does. Every gallery records its own.
Chosen on 300 validation clips of the demo, where a sharper one costs recall (docs/demo.md)."""


class FrameScores(NamedTuple):
    """What `rerank_frames` returns."""

    scores: Floats  # [n], cosine of the query and the item as this query weighs its frames
    weights: Floats  # [n, T], how much each frame counted


def normalise(x: npt.ArrayLike) -> Floats:
    """x / |x| along the last axis; a zero vector stays zero."""
    x = np.asarray(x, np.float32)
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(x / np.where(norms > 0, norms, np.float32(1)), np.float32)


def pool(frames: Floats, weights: Floats | None = None, lengths: npt.ArrayLike | None = None) -> Floats:
    """One unit vector per item: normalise(sum_t w_t v_t), [N, E] (or [E]). `weights` [N, T] default to 1 / length.

    Uniform weights give the authors' normalise(vision_proj(mean_t CLS_t)): the projection is affine and the weights sum to 1.
    Frames that cancel out give zeros.
    """
    if frames.ndim == 2:
        return _first(pool(frames[None], None if weights is None else weights[None], _one(lengths)))
    mask = _mask(frames, lengths)
    if weights is None:
        weights = mask / mask.sum(axis=1, keepdims=True, dtype=np.float32)
    elif weights.shape != mask.shape:
        raise ValueError(f"weights {weights.shape} for frames {frames.shape}")
    return _pool(_clean(frames, mask), np.where(mask, weights, np.float32(0)))


def frame_attention_weights(frames: Floats, tau: float, lengths: npt.ArrayLike | None = None) -> Floats:
    """w = softmax_t(cos(v_t, mean_t v_t) / tau), [N, T] (or [T]): frames unlike the rest of the item count less."""
    if frames.ndim == 2:
        return _first(frame_attention_weights(frames[None], tau, _one(lengths)))
    mask = _mask(frames, lengths)
    clean = _clean(frames, mask)
    mean = clean.sum(axis=1) / mask.sum(axis=1, keepdims=True, dtype=np.float32)
    cosines = np.einsum("nte,ne->nt", normalise(clean), normalise(mean))
    return _softmax(cosines, mask, tau)


def query_weights(frames: Floats, query: Floats, tau: float, lengths: npt.ArrayLike | None = None) -> Floats:
    """w = softmax_t(cos(v_t, q) / tau), [N, T] (or [T]), for one query q [E] of any length: frames that answer it count more."""
    if frames.ndim == 2:
        return _first(query_weights(frames[None], query, tau, _one(lengths)))
    mask = _mask(frames, lengths)
    return _query_weights(_clean(frames, mask), mask, normalise(query), tau)


def rerank_frames(query: Floats, frames: Floats, lengths: npt.ArrayLike | None, tau: float) -> FrameScores:
    """score = cos(q, normalise(sum_t w_t v_t)) with w = `query_weights`: items as one query sees them.

    `query` [E], `frames` [n, T, E], `lengths` [n].
    """
    mask = _mask(frames, lengths)
    clean = _clean(frames, mask)
    direction = normalise(query)
    weights = _query_weights(clean, mask, direction, tau)
    return FrameScores(_pool(clean, weights) @ direction, weights)


def _one(lengths: npt.ArrayLike | None) -> Ints | None:
    return None if lengths is None else np.asarray(lengths, np.int64).reshape(1)


def _first(results: Floats) -> Floats:
    only: Floats = results[0]
    return only


def _mask(frames: Floats, lengths: npt.ArrayLike | None) -> npt.NDArray[np.bool_]:
    """[N, T]: True where a frame counts."""
    num_items, num_frames = frames.shape[:2]
    if lengths is None:
        lengths = np.full(num_items, num_frames)
    counts = np.asarray(lengths, np.int64)
    if counts.shape != (num_items,) or (counts < 1).any() or (counts > num_frames).any():
        raise ValueError(f"lengths must be {num_items} numbers from 1 to {num_frames}")
    return np.arange(num_frames) < counts[:, None]


def _clean(frames: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    return frames if mask.all() else np.where(mask[:, :, None], frames, np.float32(0))


def _pool(clean: Floats, weights: Floats) -> Floats:
    return normalise(np.einsum("nt,nte->ne", weights, clean))


def _query_weights(clean: Floats, mask: npt.NDArray[np.bool_], direction: Floats, tau: float) -> Floats:
    return _softmax(normalise(clean) @ direction, mask, tau)


def _softmax(cosines: Floats, mask: npt.NDArray[np.bool_], tau: float) -> Floats:
    """Over the last axis, where `mask`; 0 elsewhere."""
    if not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau}")
    logits = np.where(mask, cosines / np.float32(tau), np.float32(-np.inf))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
