"""A step's losses: what is paired with what, over which features, and where gradients stop."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.uniadapter import frame_factors
from adapters.training import objectives
from adapters.training.data import RetrievalBatch
from adapters.training.losses import shifted_nll
from adapters.training.objectives import RetrievalSettings, encode_pairs, matching_loss_of, vqa_loss
from service.backbone.blip import Blip
from tests.adapters.training.tiny import adapter, answer_batch, blip, retrieval_batch


def test_a_clips_feature_is_the_unit_projection_of_its_frames_mean() -> None:
    model, batch = blip(), retrieval_batch(0, frames=3)
    pairs = encode_pairs(model, batch, None)
    states = model.encode_vision(batch.pixels.flatten(0, 1), None).unflatten(0, (4, 3))
    clips = functional.normalize(model.project("vision_proj", states[:, :, 0].mean(1), None), dim=-1)
    frames = functional.normalize(model.project("vision_proj", states[:, :, 0], None), dim=-1)
    texts = functional.normalize(model.project("text_proj", model.encode_text(batch.ids, batch.mask, None)[:, 0], None))
    for mine, theirs in ((pairs.states, states), (pairs.clips, clips), (pairs.frames, frames), (pairs.texts, texts)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


class Recorder:
    """A backbone that notes what was matched."""

    def __init__(self, model: Blip) -> None:
        self.model = model
        self.matched: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_multimodal(
        self, ids: Tensor, mask: Tensor, y: Tensor, y_mask: Tensor, adaptation: Any, factors: Tensor | None
    ) -> Tensor:
        self.matched.append((ids, y, factors))
        return self.model.encode_multimodal(ids, mask, y, y_mask, adaptation, factors)


def test_matching_sees_the_pairs_then_wrong_clips_then_wrong_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = retrieval_batch(0)
    batch = RetrievalBatch(batch.pixels, batch.ids, batch.mask, torch.tensor([0, 1, 0, 2]))
    recorder, labels = Recorder(blip()), list[Tensor]()

    def noted(logits: Tensor, matches: Tensor) -> Tensor:
        labels.append(matches)
        return functional.cross_entropy(logits, matches)

    monkeypatch.setattr(objectives, "matching_loss", noted)
    pairs = encode_pairs(recorder, batch, None)
    matching_loss_of(recorder, batch, None, pairs, RetrievalSettings(), torch.Generator().manual_seed(0))
    (ids, y, factors), own = recorder.matched[0], torch.arange(4)
    texts = [row_of(row, batch.ids) for row in ids]
    clips = [row_of(row, pairs.states.flatten(1, 2)) for row in y]
    assert texts[:8] == [*own, *own] and clips[:4] == clips[8:] == own.tolist()
    for text, clip in zip(texts[4:], clips[4:], strict=True):
        assert batch.pair_ids[text] != batch.pair_ids[clip]
    assert labels[0].tolist() == [1] * 4 + [0] * 8
    assert factors is None


def test_negatives_are_drawn_for_texts_over_clips_and_for_clips_over_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, asked = blip(), retrieval_batch(0), list[Tensor]()

    def noted(similarity: Tensor, pair_ids: Tensor, temperature: float, generator: object) -> Tensor:
        asked.append(similarity)
        return (torch.arange(4) + 1) % 4

    monkeypatch.setattr(objectives, "hard_negatives", noted)
    pairs = encode_pairs(model, batch, None)
    matching_loss_of(model, batch, None, pairs, RetrievalSettings(), None)
    texts_over_clips, clips_over_texts = asked
    torch.testing.assert_close(texts_over_clips[0, 2], pairs.texts[0] @ pairs.clips[2])
    torch.testing.assert_close(clips_over_texts[0, 2], pairs.clips[0] @ pairs.texts[2])


def row_of(row: Tensor, rows: Tensor) -> int:
    return next(i for i, other in enumerate(rows) if torch.equal(row, other))


def test_a_batch_that_matches_itself_throughout_has_positives_only() -> None:
    batch = retrieval_batch(0)
    batch = RetrievalBatch(batch.pixels, batch.ids, batch.mask, torch.zeros(4, dtype=torch.long))
    recorder = Recorder(blip())
    loss = matching_loss_of(recorder, batch, None, encode_pairs(recorder, batch, None), RetrievalSettings(), None)
    assert len(recorder.matched[0][0]) == 4 and bool(torch.isfinite(loss))


def test_frame_factors_are_data_not_a_path_for_gradients() -> None:
    model = blip()
    tuned = adapter(model, "retrieval", frame_aware=True)
    recorder = Recorder(model)
    batch = retrieval_batch(0)
    pairs = encode_pairs(recorder, batch, tuned.adaptation())
    assert not pairs.frames.requires_grad and pairs.clips.requires_grad
    settings = RetrievalSettings(frame_aware=True)
    matching_loss_of(recorder, batch, tuned.adaptation(), pairs, settings, torch.Generator().manual_seed(0))
    factors = recorder.matched[0][2]
    assert factors is not None and not factors.requires_grad
    similarity = (pairs.frames @ pairs.texts.detach().unsqueeze(-1)).squeeze(-1)  # [B, T] of the pairs themselves
    torch.testing.assert_close(factors[:4], frame_factors(similarity, pairs.states.shape[2]))
    weights = 2 * torch.softmax(similarity / 4, dim=1)
    torch.testing.assert_close(factors[:4].unflatten(1, (2, -1))[:, :, 1], weights)
    assert bool((factors.unflatten(1, (2, -1))[:, :, 0] == 1).all())


def test_the_text_of_a_pair_gets_gradients_through_matching_and_contrast_alone() -> None:
    """Frame weights read the text's feature; detaching it must not cut the matching head's own path."""
    model = blip()
    tuned = adapter(model, "retrieval", frame_aware=True)
    batch = retrieval_batch(0)
    pairs = encode_pairs(model, batch, tuned.adaptation())
    loss = matching_loss_of(model, batch, tuned.adaptation(), pairs, RetrievalSettings(frame_aware=True), None)
    loss.backward()
    assert tuned.tensors["itm_head.weight"].grad is not None
    for head in ("text_proj", "vision_proj"):  # reached by the contrastive loss only
        assert tuned.tensors[f"{head}.weight"].grad is None


@pytest.mark.parametrize("frames", [1, 2])
def test_vqa_loss_is_the_weighted_sum_over_pictures(frames: int) -> None:
    model, batch = blip(), answer_batch(0, frames=frames)
    loss = vqa_loss(model, batch, None)
    total = 0.0
    for answer in range(4):
        question = int(batch.question_of_answer[answer])
        pixels = batch.pixels[batch.clip_of_question[question]]
        y = model.encode_vision(pixels, None).flatten(0, 1)[None]
        length = int(batch.question_mask[question].sum())
        ids = batch.question_ids[question : question + 1, :length]
        seen = torch.ones(y.shape[:2], dtype=torch.bool)
        states = model.encode_multimodal(ids, torch.ones_like(ids, dtype=torch.bool), y, seen, None)
        words = batch.answer_ids[answer : answer + 1, : int(batch.answer_mask[answer].sum())]
        whole = torch.ones_like(words, dtype=torch.bool)
        logits = model.score_answers(
            states, torch.ones_like(ids, dtype=torch.bool), words, whole, torch.zeros(1).long(), None
        )
        total += float(batch.answer_weights[answer]) * shifted_nll(logits, words, whole).item()
    assert loss.item() == pytest.approx(total / (2 * frames), rel=1e-5)
