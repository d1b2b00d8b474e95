"""Without an adapter our OPT is the library's, before and after the norms, in batches padded on the right."""

from typing import Any

import pytest
import torch
from torch import Tensor

from service.backbone.convert_opt import assemble_opt, read_part
from service.backbone.decoding import Start, pad_ids
from service.backbone.opt import Opt
from service.backbone.opt_answers import generate_texts, rank_texts
from tests.service.backbone.opt_library import BOS, PAD, POSITIONS, POST_NORM, VOCABULARY, write_library_model

VARIANTS: dict[str, dict[str, Any]] = {
    "norms before": {},
    "norms behind, words projected": POST_NORM,
    "norms behind": {"do_layer_norm_before": False},
    "norms before, words projected": {"word_embed_proj_dim": 16},
    "no last norm": {"_remove_final_layer_norm": True},
}
LENGTHS = (9, 1, 4, 6)


@pytest.fixture(scope="module", params=VARIANTS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Opt, Any]:
    folder = tmp_path_factory.mktemp("opt")
    theirs = write_library_model(folder, "OPT", **VARIANTS[request.param])
    return assemble_opt([read_part(str(folder))])[0], theirs


def texts_of(*lengths: int, seed: int = 5) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(3, VOCABULARY, (length - 1,), generator=generator).tolist() for length in lengths]
    return [(BOS, *own) for own in words]


def padded(texts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    return pad_ids(texts, PAD, torch.device("cpu"))


def test_the_variant_is_what_it_says(both: tuple[Opt, Any]) -> None:
    ours, theirs = both
    own = ours.config.language_model
    assert own.pre_norm == theirs.config.do_layer_norm_before
    assert (ours.language_model.norm is None) == (theirs.model.decoder.final_layer_norm is None)
    assert (ours.language_model.project_in is None) == (theirs.model.decoder.project_in is None)


def test_logits_of_ragged_texts(both: tuple[Opt, Any]) -> None:
    ours, theirs = both
    ids, mask = padded(texts_of(*LENGTHS))
    found = ours.score(ids, mask, [None] * len(ids), None)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
    assert float(expected[mask].abs().max()) > 3.0, "too small to compare"
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=1e-5)


def test_a_text_as_long_as_the_positions_go(both: tuple[Opt, Any]) -> None:
    ours, theirs = both
    ids, mask = padded(texts_of(POSITIONS))
    torch.testing.assert_close(ours.score(ids, mask, [None], None), theirs(input_ids=ids).logits, atol=5e-5, rtol=1e-5)


def test_steps_give_what_whole_texts_give(both: tuple[Opt, Any]) -> None:
    """Ragged texts grow word by word; each logit is the library's for the text alone."""
    ours, theirs = both
    texts = texts_of(*LENGTHS)
    ids, mask = padded(texts)
    steps = ours.decode(ids, mask, [None] * len(ids), None, max_new_tokens=5)
    logits = steps.logits()
    for word in (7, 30, 12, 45, 3):
        for row, text in enumerate(texts):
            expected = theirs(input_ids=torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=5e-5, rtol=1e-5)
        logits = steps.step(torch.full((len(texts),), word))
        texts = [(*text, word) for text in texts]


def test_greedy_texts_are_the_librarys(both: tuple[Opt, Any]) -> None:
    ours, theirs = both
    for text in texts_of(*LENGTHS):
        (found,) = generate_texts(ours, [Start(text, 20)], [None], None, num_beams=1)
        expected = theirs.generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_length=20,
            do_sample=False,
        )
        assert found.gap < 1e-4 or found.hypotheses[0].ids == tuple(expected[0].tolist())


def test_a_full_text_is_followed_by_one_token(both: tuple[Opt, Any]) -> None:
    ours, _ = both
    for num_beams in (1, 3):
        short, full = texts_of(4, 12)
        found = generate_texts(ours, [Start(short, 10), Start(full, 10)], [None, None], None, num_beams=num_beams)
        assert len(found[0].hypotheses[0].ids) <= 10
        assert len(found[1].hypotheses[0].ids) == 13


def test_rankings_are_sums_of_the_librarys_losses(both: tuple[Opt, Any]) -> None:
    """The first word counts twice; question, start token and candidate all count."""
    ours, theirs = both
    question, *others = texts_of(5, 3, 6, 4)
    candidates = [(*other, BOS) for other in others]
    (found,) = rank_texts(ours, [question], [None], None, [candidates], [2])
    prior = theirs(input_ids=torch.tensor([question])).logits[0, -1].log_softmax(-1)
    first = torch.stack([prior[candidate[1]] for candidate in candidates])
    assert found.indices == tuple(first.sort(descending=True, stable=True).indices[:2].tolist())
    for index, score in zip(found.indices, found.scores, strict=True):
        whole = torch.tensor([(*question, *candidates[index])])
        log_probs = theirs(input_ids=whole).logits[0, :-1].log_softmax(-1)
        total = log_probs.gather(1, whole[0, 1:, None]).sum()
        assert score == pytest.approx(float(first[index] + total), abs=2e-4)
    assert found.best == max(range(2), key=lambda place: found.scores[place])


def test_a_ranking_that_is_told_to_stop_scores_nothing(both: tuple[Opt, Any]) -> None:
    ours, _ = both
    question, *others = texts_of(5, 3, 6)
    (found,) = rank_texts(ours, [question], [None], None, [others], [2], keep_going=lambda: False)
    assert found.scores == (float("-inf"),) * 2 and len(found.indices) == 2


def test_long_lists_are_scored_in_parts(both: tuple[Opt, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions with lists of their own; parts that cross from one to the other."""
    ours, _ = both
    questions = texts_of(5, 3)
    candidates = [[(*text, BOS) for text in texts_of(*([2, 4, 3] * 3), seed=seed)] for seed in (1, 2)]
    whole = rank_texts(ours, questions, [None, None], None, candidates, [9, 5])
    monkeypatch.setattr("service.backbone.opt_answers.MAX_LOGITS", 4 * 10 * VOCABULARY)
    parts = rank_texts(ours, questions, [None, None], None, candidates, [9, 5])
    for one, other in zip(whole, parts, strict=True):
        assert one.indices == other.indices and one.best == other.best
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    answers = iter([True, False])
    found = rank_texts(ours, questions, [None, None], None, candidates, [9, 5], keep_going=lambda: next(answers))
    scored = [score > float("-inf") for output in found for score in output.scores]
    assert scored == [True] * sum(scored) + [False] * (14 - sum(scored)) and 0 < sum(scored) < 14
