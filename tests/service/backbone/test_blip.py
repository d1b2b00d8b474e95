"""Our forward beside the library's BLIP, on tiny random models imported from folders the library wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.backbone.base import Backbone
from service.backbone.blip import Blip, Memory, TextStack
from service.backbone.convert import assemble, read_hugging_face
from service.backbone.folder import load_backbone, write_backbone
from service.backbone.vit import interpolate_positions
from tests.service.backbone.library import CAPTION, IDS, IMAGE, PATCH, QA, RETRIEVAL, VOCABULARY, write_library_model

LENGTHS = (9, 4, 6)


class Pair:
    """The library's model and ours, imported from it."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.library: Any = write_library_model(folder / architecture, architecture)
        model, tokenizer = assemble(read_hugging_face(str(folder / architecture)), special_ids=IDS)
        write_backbone(folder / f"{architecture}-ours", model, tokenizer, {})
        self.folder = folder / f"{architecture}-ours"
        self.backbone: Backbone = load_backbone(self.folder)

    @property
    def ours(self) -> Blip:
        return self.backbone.model


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("qa"), QA)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("retrieval"), RETRIEVAL)


@pytest.fixture(scope="module")
def caption(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("caption"), CAPTION)


def random_pixels(side: int = IMAGE, rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


def random_ids(first: int) -> tuple[Tensor, Tensor]:
    """Padded ids and mask of three rows."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(6, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids[:, 0] = first
    return ids.where(mask, IDS.pad), mask


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def everything_seen(y: Tensor) -> Tensor:
    return torch.ones(y.shape[:2], dtype=torch.bool)


def alone(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row by itself, without padding [1, L]: the library ignores the mask of its cross-attention."""
    return [row[seen][None] for row, seen in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", ["qa", "retrieval", "caption"])
def test_vision_tower(name: str, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(name)
    close(
        pair.ours.encode_vision(random_pixels(), None),
        pair.library.vision_model(pixel_values=random_pixels()).last_hidden_state,
    )


@pytest.mark.parametrize("side", [8, 24, 28])
def test_another_resolution_interpolates_the_positions(qa: Pair, side: int) -> None:
    theirs = qa.library.vision_model(pixel_values=random_pixels(side), interpolate_pos_encoding=True).last_hidden_state
    ours = qa.ours.encode_vision(random_pixels(side), None)
    assert ours.shape[1] == (side // PATCH) ** 2 + 1
    close(ours, theirs)


def test_native_positions_are_used_as_they_are(qa: Pair) -> None:
    positions = qa.ours.vision.pos_embed
    side = IMAGE // PATCH
    assert interpolate_positions(positions, side, side) is positions
    other = interpolate_positions(positions, side + 2, side + 1)
    assert other.shape[1] == 1 + (side + 2) * (side + 1)
    assert torch.equal(other[:, :1], positions[:, :1])


def test_text_alone(retrieval: Pair) -> None:
    ids, mask = random_ids(IDS.cls)
    theirs = retrieval.library.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    close(retrieval.ours.encode_text(ids, mask, None), theirs)


def test_features_and_matching_logits(retrieval: Pair) -> None:
    ids, mask = random_ids(IDS.cls)
    theirs = retrieval.library(
        pixel_values=random_pixels(), input_ids=ids, attention_mask=mask.long(), use_itm_head=False
    )
    ours = retrieval.ours
    states = ours.encode_vision(random_pixels(), None)
    clips = functional.normalize(ours.project("vision_proj", states[:, 0], None), dim=-1)
    texts = functional.normalize(ours.project("text_proj", ours.encode_text(ids, mask, None)[:, 0], None), dim=-1)
    close(clips @ texts.t(), theirs[0])
    hidden = ours.encode_multimodal(ids, mask, states, everything_seen(states), None)
    asked, _ = random_ids(IDS.enc)  # the library leaves putting [ENC] first to its caller
    theirs = retrieval.library(
        pixel_values=random_pixels(), input_ids=asked, attention_mask=mask.long(), use_itm_head=True
    )
    close(ours.project("itm_head", hidden[:, 0], None), theirs[0])


def test_question_states(qa: Pair) -> None:
    ids, mask = random_ids(IDS.cls)
    asked, _ = random_ids(IDS.enc)
    states = qa.ours.encode_vision(random_pixels(), None)
    theirs = qa.library.text_encoder(
        input_ids=asked,
        attention_mask=mask.long(),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2]),
    ).last_hidden_state
    close(qa.ours.encode_multimodal(ids, mask, states, everything_seen(states), None), theirs)


def test_word_logits_of_padded_questions(qa: Pair) -> None:
    """Ours in one padded batch; theirs row by row, since their cross-attention would see the padding."""
    ids, mask = random_ids(IDS.cls)
    y = qa.ours.encode_vision(random_pixels(), None)
    states = qa.ours.encode_multimodal(ids, mask, y, everything_seen(y), None)
    answers, answer_mask = random_ids(IDS.bos)
    ours = qa.ours.score_answers(states, mask, answers, answer_mask, torch.arange(3), None)
    for row, (answer, question) in enumerate(zip(alone(answers, answer_mask), alone(ids, mask), strict=True)):
        theirs = qa.library.text_decoder(
            input_ids=answer, encoder_hidden_states=states[row : row + 1, : question.shape[1]], use_cache=False
        ).logits
        close(ours[row : row + 1, : answer.shape[1]], theirs)


def test_captions_read_the_picture(caption: Pair) -> None:
    answers, mask = random_ids(IDS.bos)
    decoder = caption.ours.decoder
    assert decoder is not None and caption.ours.text_encoder is None
    y = caption.ours.encode_vision(random_pixels(), None)
    ours = decoder.score(answers, mask, decoder.body.remember(y, everything_seen(y), None), None)
    theirs = caption.library(pixel_values=random_pixels(), input_ids=answers, attention_mask=mask.long()).logits
    for row, length in enumerate(LENGTHS):
        close(ours[row, :length], theirs[row, :length])


def _memory(pair: Pair, rows: int) -> tuple[Memory, TextStack]:
    assert pair.ours.decoder is not None
    body = pair.ours.decoder.body
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(rows, 7, pair.backbone.dims().width, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([7, 3, 5, 7, 1, 2][:rows])[:, None]
    return body.remember(y, mask, None), body


def test_step_by_step_equals_all_at_once(qa: Pair) -> None:
    memory, body = _memory(qa, 3)
    decoder = qa.ours.decoder
    assert decoder is not None
    ids = torch.randint(6, 50, (3, 8), generator=torch.Generator().manual_seed(4))
    whole = decoder.score(ids, torch.ones_like(ids, dtype=torch.bool), memory, None)
    cache = body.new_cache(3, 8)
    for place in range(8):
        close(decoder.step(ids[:, place], cache, memory, None), whole[:, place])
    assert cache.length == 8


def test_rows_that_share_a_memory(qa: Pair) -> None:
    """Beams become further query positions of their question's keys; nothing else changes."""
    memory, body = _memory(qa, 2)
    decoder = qa.ours.decoder
    assert decoder is not None
    ids = torch.randint(6, 50, (6, 5), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    each = memory.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    close(decoder.score(ids, mask, memory, None), decoder.score(ids, mask, each, None))
    cache, own = body.new_cache(6, 5), body.new_cache(6, 5)
    for place in range(5):
        close(decoder.step(ids[:, place], cache, memory, None), decoder.step(ids[:, place], own, each, None))


def test_a_cache_follows_its_beams(qa: Pair) -> None:
    memory, body = _memory(qa, 1)
    decoder = qa.ours.decoder
    assert decoder is not None
    kept = torch.tensor([2, 2, 0])
    first = torch.tensor([10, 20, 30])
    cache = body.new_cache(3, 2)
    decoder.step(first, cache, memory, None)
    cache.select(kept)
    second = torch.tensor([11, 21, 31])
    whole = decoder.score(torch.stack([first[kept], second], 1), torch.ones(3, 2, dtype=torch.bool), memory, None)
    close(decoder.step(second, cache, memory, None), whole[:, 1])


def test_texts_are_appended_to_what_rows_hold(qa: Pair) -> None:
    """Three texts of different lengths, one of them empty, behind the first of two rows, one behind the other."""
    memory, body = _memory(qa, 2)
    decoder = qa.ours.decoder
    assert decoder is not None
    ids = torch.randint(6, 50, (4, 6), generator=torch.Generator().manual_seed(6))
    ids[:, 0] = torch.tensor([10, 10, 10, 20])
    rows, lengths = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 0, 2, 4])
    each = memory.select(rows)
    mask = torch.arange(5) < lengths[:, None]
    whole = decoder.score(ids, torch.ones_like(ids, dtype=torch.bool), each, None)
    cache = body.new_cache(2, 1)
    decoder.step(torch.tensor([10, 20]), cache, memory, None)
    fork = cache.fork(rows, 6)
    shared = replace(memory, readers=(3, 1))
    close(decoder.append(ids[:, 1:], mask, fork, shared, None), whole[:, 1:][mask])
    assert cache.length == 1 and cache.kept.places == 1
    nexts = torch.tensor([30, 31, 32, 33])  # the texts may go on: each at its own position
    after = decoder.step(nexts, fork, shared, None)
    for row, length in enumerate(lengths.tolist()):
        text = torch.cat([ids[row, : 1 + length], nexts[row : row + 1]])[None]
        own = memory.select(rows[row : row + 1])
        close(after[row], decoder.score(text, torch.ones_like(text, dtype=torch.bool), own, None)[0, -1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_run_and_drift(qa: Pair, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Drift and flipped words are shown, not judged."""
    half = load_backbone(qa.folder, dtype=dtype).model
    ids, mask = random_ids(IDS.cls)
    logits = []
    for model in (qa.ours, half):
        y = model.encode_vision(random_pixels(), None)
        states = model.encode_multimodal(ids, mask, y, everything_seen(y), None)
        assert states.dtype == model.dtype
        logits.append(model.score_answers(states, mask, ids, mask, torch.arange(3), None)[mask].float())
    exact, rough = logits
    assert rough.shape == (sum(LENGTHS), VOCABULARY) and bool(torch.isfinite(rough).all())
    flipped = float((exact.argmax(-1) != rough.argmax(-1)).float().mean())
    with capsys.disabled():
        print(
            f"\n{dtype}: word logits drift by at most {float((exact - rough).abs().max()):.3f}, {100 * flipped:.0f} % flip"
        )


@pytest.mark.parametrize("readers", [(2, 1, 3), (1, 1, 1), (2, 2, 2), (4,)])
def test_questions_share_the_keys_of_what_they_are_about(qa: Pair, readers: tuple[int, ...]) -> None:
    """However many ask about each, they read what they would read of a copy of their own."""
    encoder, rows, generator = qa.ours.text_encoder, sum(readers), torch.Generator().manual_seed(8)
    assert encoder is not None
    ids = torch.randint(6, 50, (rows, 5), generator=generator)
    mask = torch.arange(5)[None] < torch.randint(2, 6, (rows, 1), generator=generator)
    y = torch.randn(len(readers), 7, qa.backbone.dims().width, generator=generator)
    seen = torch.arange(7)[None] < torch.tensor([7, 3, 5][: len(readers)])[:, None]
    memory = replace(encoder.remember(y, seen, None), readers=readers)
    of_row = torch.arange(len(readers)).repeat_interleave(torch.tensor(readers))
    close(qa.ours.read(ids, mask, memory, None), qa.ours.encode_multimodal(ids, mask, y[of_row], seen[of_row], None))
