"""Pooling and frame weights against plain float64 formulas."""

import numpy as np
import pytest

from service.gallery.frames import (
    DEFAULT_TAU,
    frame_attention_weights,
    normalise,
    pool,
    query_weights,
    rerank_frames,
)

RNG = np.random.default_rng(7)
LENGTHS = np.array([5, 1, 3, 2])


def ragged_frames():
    """[4, 5, 16] whose padding is NaN: reading it would show."""
    frames = (RNG.standard_normal((4, 5, 16)) * 3).astype(np.float32)
    for row, length in enumerate(LENGTHS):
        frames[row, length:] = np.nan
    return frames


def unit64(x):
    return x / np.linalg.norm(x)


def softmax64(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def test_uniform_weights_equal_projecting_the_mean_cls_token():
    cls = RNG.standard_normal((3, 8, 24))
    weight, bias = RNG.standard_normal((16, 24)), RNG.standard_normal(16)
    authors = cls.mean(axis=1) @ weight.T + bias
    authors /= np.linalg.norm(authors, axis=1, keepdims=True)
    frames = (cls @ weight.T + bias).astype(np.float32)
    np.testing.assert_allclose(pool(frames), authors, atol=1e-6)
    np.testing.assert_allclose(pool(frames, np.full((3, 8), 1 / 8, np.float32)), authors, atol=1e-6)


def test_pooling_and_weights_of_ragged_items_match_the_formulas():
    frames, query = ragged_frames(), RNG.standard_normal(16).astype(np.float32)
    attention = frame_attention_weights(frames, 0.3, LENGTHS)
    asked = query_weights(frames, query, 0.3, LENGTHS)
    scores, weights = rerank_frames(query, frames, LENGTHS, 0.3)
    pooled, attended = pool(frames, lengths=LENGTHS), pool(frames, attention, LENGTHS)
    for row, length in enumerate(LENGTHS):
        v = frames[row, :length].astype(np.float64)
        mean, q = unit64(v.mean(axis=0)), unit64(query.astype(np.float64))
        w_mean = softmax64(np.array([unit64(f) @ mean for f in v]) / 0.3)
        w_query = softmax64(np.array([unit64(f) @ q for f in v]) / 0.3)
        np.testing.assert_allclose(pooled[row], unit64(v.sum(axis=0)), atol=1e-6)
        np.testing.assert_allclose(attention[row, :length], w_mean, atol=1e-6)
        np.testing.assert_allclose(attended[row], unit64(w_mean @ v), atol=1e-6)
        np.testing.assert_allclose(asked[row, :length], w_query, atol=1e-6)
        np.testing.assert_allclose(scores[row], unit64(w_query @ v) @ q, atol=1e-6)
        assert (attention[row, length:] == 0).all() and (weights[row, length:] == 0).all()
    np.testing.assert_array_equal(weights, asked)


def test_an_item_alone_equals_the_item_padded_in_a_batch():
    frames, query = ragged_frames(), RNG.standard_normal(16).astype(np.float32)
    for row, length in enumerate(LENGTHS):
        alone = frames[row, :length]
        np.testing.assert_allclose(pool(alone), pool(frames, lengths=LENGTHS)[row], atol=1e-6)
        np.testing.assert_allclose(pool(frames[row], lengths=length), pool(alone), atol=1e-6)
        np.testing.assert_allclose(
            frame_attention_weights(alone, 0.1), frame_attention_weights(frames, 0.1, LENGTHS)[row, :length], atol=1e-6
        )
        np.testing.assert_allclose(
            query_weights(alone, query, 0.1), query_weights(frames, query, 0.1, LENGTHS)[row, :length], atol=1e-6
        )


def test_one_frame_gets_all_the_weight_and_a_small_tau_picks_the_best_frame():
    frames = RNG.standard_normal((1, 6, 8)).astype(np.float32)
    assert frame_attention_weights(frames[:, :1], DEFAULT_TAU).tolist() == [[1.0]]
    weights = query_weights(frames, frames[0, 4] * 5, 1e-3)
    assert weights[0].argmax() == 4 and weights[0, 4] > 0.999


def test_the_query_length_and_frame_lengths_do_not_change_a_cosine():
    frames, query = RNG.standard_normal((2, 4, 8)).astype(np.float32), RNG.standard_normal(8).astype(np.float32)
    np.testing.assert_allclose(query_weights(frames, query * 9, 0.1), query_weights(frames, query, 0.1), atol=1e-6)
    assert (np.abs(rerank_frames(query * 9, frames, None, 0.1).scores) <= 1 + 1e-6).all()


def test_frames_that_cancel_out_and_zero_vectors_give_zeros_not_nan():
    frame = RNG.standard_normal(8).astype(np.float32)
    assert not pool(np.stack([frame, -frame])).any()
    assert not normalise(np.zeros((2, 3))).any()


@pytest.mark.parametrize("lengths", [[0, 1], [1, 4], [1], [-1, 1]])
def test_lengths_outside_the_frames_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths"):
        pool(np.ones((2, 3, 4), np.float32), lengths=lengths)


def test_weights_of_another_shape_and_a_tau_of_zero_are_refused():
    frames = np.ones((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="weights"):
        pool(frames, np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="tau"):
        frame_attention_weights(frames, 0.0)
