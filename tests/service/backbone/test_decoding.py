"""The rules of answering, on a decoder whose logits are written down in advance."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adapters.families.base import Adaptation, SlotView, adapt_rows
from adapters.families.uniadapter import UniAdapter
from adapters.training.losses import shifted_nll
from service.backbone.base import Backbone
from service.backbone.blip import Blip, Memory
from service.backbone.blip_answers import beam_search, rank_answers
from service.backbone.decoding import Beams, best_of, pad_ids
from service.backbone.folder import load_backbone
from tests.service.worlds import adapter_config, random_tensors, write_tiny_backbone

MAX_LENGTH = 6


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("decoding") / "backbone"
    write_tiny_backbone(folder)
    return load_backbone(folder)


def memory_of(model: Blip, rows: int) -> Memory:
    assert model.decoder is not None
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(rows, 4, model.config.vision.width, generator=generator)
    return model.decoder.body.remember(y, torch.ones(rows, 4, dtype=torch.bool), None)


def script(monkeypatch: pytest.MonkeyPatch, model: Blip, steps: list[dict[int, float]]) -> None:
    """Every row's log-probabilities of step i are `steps[i]`; words not named are out of the question."""
    taken = iter(steps)
    vocabulary = model.config.decoder.vocab_size  # type: ignore[union-attr]

    def step(ids: Tensor, *_: object) -> Tensor:
        row = torch.full((vocabulary,), -1e4)
        for word, log_prob in next(taken).items():
            row[word] = log_prob
        return row.expand(len(ids), -1)

    monkeypatch.setattr(model.decoder, "step", step)


def probabilities(**words: float) -> dict[int, float]:
    """Log-probabilities by word id, `w7=0.5` for word 7; the rest of the mass goes to word 9."""
    named = {int(name[1:]): p for name, p in words.items()}
    named[9] = named.get(9, 0.0) + max(1.0 - sum(named.values()), 1e-9)
    return {word: float(torch.tensor(p).log()) for word, p in named.items()}


def test_greedy_takes_the_likeliest_and_stops(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    model, special = backbone.model, backbone.config.special_ids
    script(monkeypatch, model, [probabilities(w7=0.6, w8=0.3), probabilities(**{f"w{special.sep}": 0.9})])
    (found,) = beam_search(model, memory_of(model, 1), 1, None, num_beams=1, max_length=MAX_LENGTH)
    (best,) = found.hypotheses
    assert best.ids == (special.bos, 7, special.sep)
    log = torch.tensor([0.6, 0.9]).log().sum()
    assert best.score == pytest.approx(float(log) / 2, abs=1e-5)  # [DEC] and one word count, [SEP] does not
    assert found.gap == pytest.approx(float(torch.tensor(0.6).log() - torch.tensor(0.3).log()), abs=1e-4)


def test_a_search_ends_at_its_length(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    model, special = backbone.model, backbone.config.special_ids
    for num_beams in (1, 3):
        script(monkeypatch, model, [probabilities(w7=0.5, w8=0.4)] * MAX_LENGTH)
        (found,) = beam_search(model, memory_of(model, 1), 1, None, num_beams=num_beams, max_length=MAX_LENGTH)
        assert found.hypotheses[0].ids == (special.bos, *[7] * (MAX_LENGTH - 1))
        assert len(found.hypotheses) == num_beams


def test_a_finished_hypothesis_is_scored_without_its_end(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    model, special = backbone.model, backbone.config.special_ids
    end = f"w{special.sep}"
    steps = [
        probabilities(w7=0.6, w8=0.3),
        probabilities(**{end: 0.95, "w7": 0.03}),
        probabilities(**{end: 0.5, "w7": 0.4}),
    ]
    script(monkeypatch, model, steps * 2)
    (found,) = beam_search(model, memory_of(model, 1), 1, None, num_beams=2, max_length=MAX_LENGTH)
    assert found.hypotheses[0].ids == (special.bos, 7, special.sep)
    assert found.hypotheses[0].score == pytest.approx(float(torch.tensor([0.6, 0.95]).log().sum()) / 2, abs=1e-4)


def test_a_search_that_is_told_to_stop_gives_what_it_has(backbone: Backbone) -> None:
    model = backbone.model
    asked = 0

    def keep_going() -> bool:
        nonlocal asked
        asked += 1
        return asked <= 2

    for num_beams in (1, 3):
        asked = 0
        found = beam_search(
            model, memory_of(model, 2), 2, None, num_beams=num_beams, max_length=10, keep_going=keep_going
        )
        assert asked <= 3
        assert all(2 <= len(output.hypotheses[0].ids) <= 5 for output in found)  # [DEC], three words, [SEP]


def test_the_pool_keeps_the_best_and_the_earlier_of_equals() -> None:
    search = Beams(2)
    search.keep((1, 5), -2.0, 2)
    search.keep((2, 5), -2.0, 2)
    search.keep((3, 5), -1.0, 2)
    assert [h.ids for h in search.kept] == [(3, 5), (1, 5)]


def test_done_divides_by_the_length_before_the_token() -> None:
    """Newer releases of the library divide by the length after it, and go on."""
    search = Beams(1)
    search.keep((1, 5), -3.0, 3)  # -1.0
    search.check_done(-2.9, 3)
    assert not search.is_done
    search.check_done(-3.0, 3)
    assert search.is_done
    search = Beams(2)
    search.keep((1, 5), -0.1, 1)
    search.check_done(-100.0, 3)
    assert not search.is_done, "the pool is not full"


def test_questions_do_not_wait_for_each_other(backbone: Backbone) -> None:
    """Two questions in one search give what each gives alone, whichever is done first."""
    model = backbone.model
    memory = memory_of(model, 3)
    for num_beams in (1, 3):
        together = beam_search(model, memory, 3, None, num_beams=num_beams, max_length=MAX_LENGTH)
        for row, found in enumerate(together):
            alone = memory.select(torch.tensor([row]))
            (expected,) = beam_search(model, alone, 1, None, num_beams=num_beams, max_length=MAX_LENGTH)
            assert [h.ids for h in found.hypotheses] == [h.ids for h in expected.hypotheses]


def test_ranking_breaks_ties_by_index(backbone: Backbone) -> None:
    """Candidates 1, 2 and 4 share their first word; the shortlist takes them in order, whatever follows."""
    model, special = backbone.model, backbone.config.special_ids
    probs = _first_words(model)
    likely, other = int(probs.argsort(descending=True)[0]), int(probs.argsort(descending=True)[1])
    ends = [(other, 10), (likely, 11), (likely, 12), (other, 13), (likely, 14)]
    candidates = [(special.bos, first, second, special.sep) for first, second in ends]
    (found,) = rank_answers(model, memory_of(model, 1), None, [candidates], [4])
    assert found.indices == (1, 2, 4, 0)
    assert found.first_token_probs[0] == found.first_token_probs[2] > found.first_token_probs[3]
    assert found.best == max(range(4), key=lambda place: found.scores[place])


def _first_words(model: Blip) -> Tensor:
    assert model.decoder is not None
    start = torch.tensor([model.config.special_ids.bos])
    return model.decoder.step(start, model.decoder.body.new_cache(1, 1), memory_of(model, 1), None)[0].softmax(-1)


def test_equal_candidates_rank_by_index(backbone: Backbone) -> None:
    model, special = backbone.model, backbone.config.special_ids
    same = (special.bos, 10, special.sep)
    (found,) = rank_answers(model, memory_of(model, 1), None, [[same, same, same]], [3])
    assert found.indices == (0, 1, 2) and found.best == 0


def test_ranking_scores_are_minus_the_smoothed_loss(backbone: Backbone) -> None:
    """Each question with its own candidates and shortlist length, in one call."""
    model, special = backbone.model, backbone.config.special_ids
    memory = memory_of(model, 2)
    candidates: list[list[tuple[int, ...]]] = [
        [(special.bos, 10, special.sep), (special.bos, 11, 12, 13, special.sep)],
        [(special.bos, 12, special.sep)],
    ]
    found = rank_answers(model, memory, None, candidates, [2, 1])
    assert model.decoder is not None
    for question, output in enumerate(found):
        for index, score in zip(output.indices, output.scores, strict=True):
            ids, mask = pad_ids([candidates[question][index]], special.pad, model.device)
            logits = model.decoder.score(ids, mask, memory.select(torch.tensor([question])), None)
            assert score == pytest.approx(-float(shifted_nll(logits, ids, mask)), abs=1e-4)


def whole_scores(
    model: Blip, memory: Memory, adaptation: Adaptation | None, question: int, texts: Sequence[tuple[int, ...]]
) -> list[float]:
    """Minus the loss of each text by a forward of its own, from [DEC] to [SEP]."""
    assert model.decoder is not None
    row, scores = torch.tensor([question]), []
    for text in texts:
        ids, mask = pad_ids([text], model.config.special_ids.pad, model.device)
        own = None if adaptation is None else adaptation.expand(row)
        logits = model.decoder.score(ids, mask, memory.select(row), own)
        scores.append(-float(shifted_nll(logits, ids, mask)))
    return scores


def test_candidates_that_share_a_start_score_as_whole_texts(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random questions with adapters of their own or none, lists of any lengths with empty answers, in parts or in one."""
    model, special, family, dims = backbone.model, backbone.config.special_ids, UniAdapter(), backbone.dims()
    slots = [SlotView(None, {})]
    for seed, rank in enumerate((3, 5, 5)):
        config = adapter_config(backbone, rank=rank)
        slots.append(SlotView(family, family.fold(config, random_tensors(config, dims, seed), dims)))
    assert model.decoder is not None
    for seed in range(40):
        draw = random.Random(seed)
        monkeypatch.setattr("service.backbone.blip_answers.MAX_CANDIDATE_ROWS", draw.choice((1, 2, 5, 256)))
        questions = draw.randint(1, 4)
        slot_of_row = sorted(draw.randrange(len(slots)) for _ in range(questions))
        adaptation = adapt_rows(slots, slot_of_row) if seed % 5 else None
        y = torch.randn(questions, 4, dims.width, generator=torch.Generator().manual_seed(seed))
        y_mask = torch.arange(4) < torch.tensor([draw.randint(1, 4) for _ in range(questions)])[:, None]
        memory = model.decoder.body.remember(y, y_mask, adaptation)
        longest = draw.randint(0, 6)
        candidates = [
            [
                (special.bos, *[draw.randrange(6, 40) for _ in range(draw.randint(0, longest))], special.sep)
                for _ in range(draw.randint(1, 9))
            ]
            for _ in range(questions)
        ]
        ks = [draw.randint(1, 9) for _ in range(questions)]
        for question, found in enumerate(rank_answers(model, memory, adaptation, candidates, ks)):
            assert len(found.indices) == min(ks[question], len(candidates[question]))
            texts = [candidates[question][index] for index in found.indices]
            expected = whole_scores(model, memory, adaptation, question, texts)
            assert found.scores == pytest.approx(expected, abs=1e-5, rel=1e-5)
            best = max(found.scores)
            assert found.indices[found.best] == min(
                i for i, score in zip(found.indices, found.scores, strict=True) if score == best
            )


def test_nothing_is_run_twice_or_for_nothing(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """[DEC] once a question; of each candidate the words alone, with the question's keys where they lie."""
    model, special = backbone.model, backbone.config.special_ids
    memory = memory_of(model, 2)
    assert model.decoder is not None
    run: list[list[list[int]]] = []
    worded: list[int] = []
    read: list[int] = []
    forward, logits = model.decoder.body.forward, model.decoder.logits

    def seen_forward(ids: Tensor, mask: Tensor, adaptation: None, own: Memory, cache: object) -> Tensor:
        run.append(ids.tolist())
        read.append(own.keys[0].data_ptr())
        return forward(ids, mask, adaptation, own, cache)  # type: ignore[arg-type]

    def seen_logits(h: Tensor) -> Tensor:
        worded.append(h.shape[:-1].numel())
        return logits(h)

    monkeypatch.setattr(model.decoder.body, "forward", seen_forward)
    monkeypatch.setattr(model.decoder, "logits", seen_logits)
    two, none = (special.bos, 10, 11, special.sep), (special.bos, special.sep)
    rank_answers(model, memory, None, [[two, two], [none]], [2, 1])
    assert run == [[[special.bos]] * 2, [[10, 11], [10, 11], [0, 0]]]
    assert worded == [2, 4] and read == [memory.keys[0].data_ptr()] * 2
    run.clear()
    rank_answers(model, memory, None, [[none], [none, none]], [1, 2])
    assert run == [[[special.bos]] * 2]


def test_long_lists_are_scored_in_parts(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model, special = backbone.model, backbone.config.special_ids
    candidates = [[(special.bos, 8 + i, *[9] * (i % 3), special.sep) for i in range(11)]] * 2
    whole = rank_answers(model, memory_of(model, 2), None, candidates, [11, 5])
    monkeypatch.setattr("service.backbone.blip_answers.MAX_CANDIDATE_ROWS", 3)
    parts = rank_answers(model, memory_of(model, 2), None, candidates, [11, 5])
    for a, b in zip(whole, parts, strict=True):
        assert a.indices == b.indices and a.best == b.best
        assert a.scores == pytest.approx(b.scores, abs=1e-5)


def test_ranking_that_is_told_to_stop_scores_no_further_part(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, special = backbone.model, backbone.config.special_ids
    candidates = [[(special.bos, 8 + i, special.sep) for i in range(11)]]
    monkeypatch.setattr("service.backbone.blip_answers.MAX_CANDIDATE_ROWS", 3)
    answers = iter([True, True, False])
    (found,) = rank_answers(model, memory_of(model, 1), None, candidates, [11], keep_going=lambda: next(answers))
    assert [score > float("-inf") for score in found.scores] == [True] * 6 + [False] * 5


def test_padding_is_on_the_right() -> None:
    ids, mask = pad_ids([(1, 2, 3), (4,)], 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("length", [7, 8, 27, 28, 29, 700, 5003])
@pytest.mark.parametrize("levels", [1, 2, 5, 1_000_000])
def test_the_best_of_a_row_come_in_order_and_of_equals_the_first(length: int, levels: int) -> None:
    scores = torch.randint(levels, (6, length)).float()
    scores[1] = -torch.inf
    scores[2, ::2] = -torch.inf
    scores[3, -1] = levels
    values, index = best_of(scores, 7)
    wanted = scores.sort(descending=True, stable=True)
    assert torch.equal(values, wanted.values[:, :7])
    assert torch.equal(index, wanted.indices[:, :7])


def test_finding_the_best_waits_for_no_device() -> None:
    with FakeTensorMode():  # numbers that nobody can look at
        values, index = best_of(torch.zeros(2, 1001), 5)
    assert values.shape == index.shape == (2, 5)
