"""Kept keys and values change nothing: growing texts give what whole forwards give, whatever is injected where.

Schedules, prompts, texts and models are random. `OPT_RANDOM_CASES=1000` runs more of them than the suite does.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.backbone.decoding import Steps, Writing, pad_ids, write_all
from service.backbone.opt_answers import generate_texts
from service.types import GenerateOutput
from tests.service.backbone.opt_random import BASE, FAMILY, IDS, Mixed, config_of, dims_of, random_batch, random_model

NUM_CASES = int(os.environ.get("OPT_RANDOM_CASES", "60"))
NEAR_TIE = 1e-4
ATOL, RTOL = 5e-5, 1e-5  # of logits up to 40


class Whole(Steps):
    """Texts that are read from their first token each time. See Steps."""

    def __init__(self, batch: Mixed) -> None:
        self.batch = batch
        self.texts = [list(start.ids) for start in batch.starts]
        self.features = list(batch.features)
        self.adaptation = batch.adaptation

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def num_rows(self) -> int:
        return len(self.texts)

    def logits(self) -> Tensor:
        ids, mask = pad_ids(self.texts, IDS.pad, torch.device("cpu"))
        logits = self.batch.model.score(ids, mask, self.features, self.adaptation)
        return logits[torch.arange(len(ids)), mask.sum(dim=1) - 1]

    def step(self, ids: Tensor) -> Tensor:
        self.texts = [[*text, token] for text, token in zip(self.texts, ids.tolist(), strict=True)]
        return self.logits()

    def select(self, rows: Sequence[int], rows_per_text: int = 1) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.features = [self.features[row] for row in rows]
        self.adaptation = self.adaptation.expand(torch.tensor(rows))


def kept(batch: Mixed, num_beams: int) -> list[GenerateOutput]:
    return generate_texts(batch.model, batch.starts, batch.features, batch.adaptation, num_beams=num_beams)


def whole(batch: Mixed, num_beams: int) -> list[GenerateOutput]:
    return write_all(Writing(Whole(batch), batch.starts, num_beams=num_beams, end=IDS.eos))


def kinds(batch: Mixed) -> list[str]:
    """Which of the ways to decode a batch takes, for the count."""
    found = ["alone" if len(batch.starts) == 1 else "mixed" if len(set(batch.slot_of_row)) > 1 else "batch"]
    layers = batch.model.config.language_model.layers
    for slot, states in zip(batch.slot_of_row, batch.features, strict=True):
        schedule = batch.slots[slot].schedule
        if schedule is None or states is None or schedule.first == layers:
            found.append("rows without extra token")
        else:
            tail = schedule.tail
            found.append(
                f"rows whose extra token goes on {'never' if tail == layers else 'last' if tail == layers - 1 else 'earlier'}"
            )
    return found


def test_sequences_are_those_of_whole_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy and with three beams; a row may differ where its lone run was a near tie."""
    counts: Counter[str] = Counter()
    with torch.inference_mode():
        for seed in range(NUM_CASES):
            batch = random_batch(seed)
            counts.update(kinds(batch))
            for num_beams in (1, 3):
                for number, (found, expected) in enumerate(
                    zip(kept(batch, num_beams), whole(batch, num_beams), strict=True)
                ):
                    counts["sequences"] += 1
                    counts["tokens"] += len(found.hypotheses[0].ids) - len(batch.starts[number].ids)
                    if found.hypotheses[0].ids != expected.hypotheses[0].ids:
                        (lone,) = whole(batch.row(number), num_beams)
                        where = f"case {seed}, row {number}, {num_beams} beams: {batch.describe()}"
                        assert lone.gap < NEAR_TIE, where
                        counts["near ties that fell otherwise"] += 1
                        continue
                    assert found.hypotheses[0].score == pytest.approx(expected.hypotheses[0].score, abs=1e-4)
    with capsys.disabled():
        print("\nkept against whole:", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    assert (
        min(counts[f"rows whose extra token goes on {when}"] for when in ("never", "last", "earlier")) > NUM_CASES / 20
    )
    assert counts["mixed"] > NUM_CASES / 4 and counts["rows without extra token"] > NUM_CASES / 4


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_logits_are_those_of_whole_forwards(first: int) -> None:
    """Along random words, with rows dropped, doubled and put in another order on the way."""
    with torch.inference_mode():
        for seed in range(1000 + first, 1000 + first + 10):
            batch, draw = random_batch(seed), random.Random(seed)
            ids, mask = batch.padded
            steps = batch.model.decode(ids, mask, batch.features, batch.adaptation, max_new_tokens=6)
            expected = Whole(batch)
            torch.testing.assert_close(steps.logits(), expected.logits(), atol=ATOL, rtol=RTOL)
            for _ in range(6):
                if draw.random() < 0.5:
                    size = len(expected.texts)
                    rows = [draw.randrange(size) for _ in range(draw.randint(1, size + 1))]
                    steps.select(rows)
                    expected.select(rows)
                words = torch.tensor([draw.randrange(3, 40) for _ in expected.texts])
                message = f"case {seed}: {batch.describe()}"
                torch.testing.assert_close(
                    steps.step(words),
                    expected.step(words),
                    atol=ATOL,
                    rtol=RTOL,
                    msg=lambda text, m=message: f"{m}\n{text}",
                )


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_appended_texts_are_read_as_by_whole_forwards(first: int) -> None:
    """Texts of any lengths behind rows that are forked, some often, some not at all; twice over, then word by word."""
    rereads: Counter[bool] = Counter()
    with torch.inference_mode():
        for seed in range(6000 + first, 6000 + first + 20):
            batch, draw = random_batch(seed), random.Random(seed)
            ids, mask = batch.padded
            steps = batch.model.decode(ids, mask, batch.features, batch.adaptation, max_new_tokens=0)
            before = steps.logits()
            rows = [draw.randrange(len(ids)) for _ in range(draw.randint(1, 6))]
            expected = Whole(batch)
            expected.select(rows)
            fork = steps.fork(rows, 10)
            held = mask[rows]  # of the columns of texts so far, where there is a token
            for _ in range(2):
                texts = [[draw.randrange(3, 40) for _ in range(draw.randint(1, 4))] for _ in rows]
                new, new_mask = pad_ids(texts, IDS.pad, torch.device("cpu"))
                held = torch.cat([held, new_mask], dim=1)
                states = fork.append(new, new_mask)
                expected.texts = [[*old, *text] for old, text in zip(expected.texts, texts, strict=True)]
                whole_ids, whole_mask = pad_ids(expected.texts, IDS.pad, torch.device("cpu"))
                whole = batch.model.score(whole_ids, whole_mask, expected.features, expected.adaptation)
                if fork.rereads:
                    found, wanted = states[:, -held.shape[1] :][held], whole[whole_mask]
                else:
                    parts = zip(whole, whole_mask.sum(dim=1).tolist(), texts, strict=True)
                    found = states[new_mask]
                    wanted = torch.cat([row[length - len(text) : length] for row, length, text in parts])
                logits = batch.model.language_model.logits(found)
                message = f"case {seed}: {batch.describe()}"
                torch.testing.assert_close(
                    logits, wanted, atol=ATOL, rtol=RTOL, msg=lambda text, m=message: f"{m}\n{text}"
                )
                torch.testing.assert_close(fork.logits(), expected.logits(), atol=ATOL, rtol=RTOL)
            for _ in range(2):
                words = torch.tensor([draw.randrange(3, 40) for _ in rows])
                torch.testing.assert_close(fork.step(words), expected.step(words), atol=ATOL, rtol=RTOL)
            assert torch.equal(steps.logits(), before), "the rows that were forked stay as they were"
            rereads[steps.rereads] += 1
    assert min(rereads[False], rereads[True]) >= 3


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_rows_that_come_in_later_read_and_write_as_alone(first: int) -> None:
    """Two batches of one model, each some words along, rows dropped: joined they go on as whole forwards of both."""
    joined, refused = 0, 0
    with torch.inference_mode():
        for seed in range(5000 + first, 5000 + first + 20):
            draw, batches = random.Random(seed), [random_batch(seed)]
            while len(batches) < 3:  # others of the same model, which the seed decides
                other = random_batch(draw.randrange(1 << 30))
                batches += [other] if other.model is batches[0].model else []
            sides = []
            for batch in batches:
                ids, mask = batch.padded
                steps, expected = (
                    batch.model.decode(ids, mask, batch.features, batch.adaptation, max_new_tokens=9),
                    Whole(batch),
                )
                for _ in range(draw.randint(0, 3)):
                    words = torch.tensor([draw.randrange(3, 40) for _ in expected.texts])
                    steps.step(words), expected.step(words)
                rows = sorted(draw.sample(range(len(ids)), draw.randint(1, len(ids))))
                steps.select(rows)
                expected.select(rows)
                sides.append((steps, [expected]))
            (steps, wholes), *others = sides
            for other, its in others:
                if not steps.can_join(other):
                    refused += 1
                    continue
                steps.join(other)
                wholes += its
                joined += 1
                for _ in range(2):
                    words = torch.tensor([draw.randrange(3, 40) for whole in wholes for _ in whole.texts])
                    expected_logits, at = [], 0
                    for whole in wholes:
                        expected_logits.append(whole.step(words[at : at + len(whole.texts)]))
                        at += len(whole.texts)
                    torch.testing.assert_close(steps.step(words), torch.cat(expected_logits), atol=ATOL, rtol=RTOL)
    assert joined >= 5 and refused >= 1


WINDOWS = [
    (variant, start, end)
    for variant in range(4)
    for start in range(random_model(variant).config.language_model.layers)
    for end in range(start + 1, random_model(variant).config.language_model.layers + 1)
]


@pytest.mark.parametrize("text_step", [1, 2, 3])
def test_every_window(text_step: int) -> None:
    """Each placement there is, in every model, with a row beside that has another one and a row that has none."""
    from tests.service.backbone.opt_random import slot_of

    with torch.inference_mode():
        for number, (variant, start, end) in enumerate(WINDOWS):
            model = random_model(variant)
            dims = dims_of(model)
            options = {"encoder": "vit", "injected_hidden_states": 1 + number % 3, "text_step": text_step}
            own = config_of(dims, start_layer_idx=start, end_layer_idx=end, prompt_len=number % 3, **options)
            other = config_of(dims, start_layer_idx=0, end_layer_idx=1 + number % dims.layers, **options)
            slots = [slot_of(own, dims, number), slot_of(other, dims, number + 1), BASE]
            template = random_batch(2000 + number, max_rows=1)
            features = 2.0 * torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(number))
            starts = tuple(template.starts * 3)
            for batch in (
                Mixed(model, slots[:1], (0,), starts[:1], (features[0],)),
                Mixed(model, slots, (0, 1, 2), starts, tuple(features)),
            ):
                ids, mask = batch.padded
                steps = model.decode(ids, mask, batch.features, batch.adaptation, max_new_tokens=2)
                expected = Whole(batch)
                for word in (5, 30):
                    words = torch.full((len(starts[: len(ids)]),), word)
                    torch.testing.assert_close(
                        steps.step(words),
                        expected.step(words),
                        atol=ATOL,
                        rtol=RTOL,
                        msg=lambda text, where=(variant, start, end): f"{where}\n{text}",
                    )


def test_a_tail_is_not_causal() -> None:
    """Else the tests above would show nothing: behind the window a text's earlier logits depend on its later words."""
    from tests.service.backbone.opt_random import slot_of

    model = random_model(0)
    dims = dims_of(model)
    ids = torch.tensor([[2, 5, 9, 13]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    features = [torch.randn(5, 10, generator=torch.Generator().manual_seed(0))]
    for end, depends in ((4, True), (dims.layers - 1, True), (dims.layers, False)):
        config = config_of(dims, encoder="vit", start_layer_idx=2, end_layer_idx=end, injected_hidden_states=2)
        adaptation = Mixed(model, [slot_of(config, dims, 1)], (0,), (), ()).adaptation
        logits = [
            model.score(torch.cat([ids[:, :-1], torch.tensor([[last]])], dim=1), mask, features, adaptation)[0, :-1]
            for last in (13, 30)
        ]
        assert torch.allclose(*logits, atol=1e-4) != depends
    assert FAMILY.name == "epalm"
