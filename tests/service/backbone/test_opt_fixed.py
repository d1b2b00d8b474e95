"""Words of a language model that are recorded: the same texts as without, whoever comes, goes, and was there before."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from service.backbone.decoding import Start, Steps, Writing, write_all
from service.backbone.opt import Decoding
from service.backbone.opt_answers import begin_texts
from service.backbone.opt_fixed import OptFixedSteps
from tests.service.backbone.churn import assert_same, write_with_comings_and_goings
from tests.service.backbone.opt_random import BASE, IDS, VARIANTS, Mixed, config_of, dims_of, random_model, slot_of
from tests.tape import make_recordings

NUM_TEXTS = 16


def texts_of(variant: int, seed: int) -> list[Mixed]:
    """Texts of one model, each as a batch of its own: adapters with windows that end at the last layer, before it, or earlier."""
    draw, model = random.Random(seed), random_model(variant)
    dims = dims_of(model)
    generator = torch.Generator().manual_seed(seed)
    slots = [BASE]
    for number, before_last in enumerate((0, 1, 1, dims.layers - 1)):
        end = dims.layers - before_last
        options = {
            "encoder": "vit",
            "start_layer_idx": draw.randrange(end),
            "end_layer_idx": end,
            "injected_hidden_states": draw.randint(1, 5),
            "prompt_len": draw.choice((0, 2, 5)),
        }
        slots.append(slot_of(config_of(dims, **options), dims, seed * 10 + number))
    texts = []
    for _ in range(NUM_TEXTS):
        words = torch.randint(3, 40, (draw.randint(0, 8),), generator=generator).tolist()
        start = Start((IDS.bos, *words), 1 + len(words) + draw.randint(2, 9))
        features = None if draw.random() < 0.2 else 2.0 * torch.randn(5, 10, generator=generator)
        texts.append(Mixed(model, slots, (draw.randrange(len(slots)),), (start,), (features,)))
    return texts


def begin(num_beams: int, texts: Sequence[Mixed], writer: Callable[[Decoding], Steps] = lambda steps: steps) -> Writing:
    batch = Mixed(
        texts[0].model,
        texts[0].slots,
        tuple(text.slot_of_row[0] for text in texts),
        tuple(text.starts[0] for text in texts),
        tuple(text.features[0] for text in texts),
    )
    arguments = batch.model, batch.starts, batch.features, batch.adaptation
    return begin_texts(*arguments, num_beams=num_beams, writer=writer)


def tail_of(text: Mixed) -> int | None:
    ids, mask = text.padded
    return text.model.decode(ids, mask, text.features, text.adaptation, max_new_tokens=1).tail


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_texts_are_written_as_alone_whoever_comes_and_goes(variant: int, num_beams: int) -> None:
    recordings, recorder = make_recordings()
    writer = partial(OptFixedSteps, recordings=recordings)
    counts: Counter[str] = Counter()
    with torch.inference_mode():
        for seed in range(3):
            texts = texts_of(variant, seed)
            for tail in dict.fromkeys(map(tail_of, texts)):
                own = [text for text in texts if tail_of(text) == tail]
                played = recorder.num_played
                start = partial(begin, num_beams, writer=writer)
                found = write_with_comings_and_goings(own, start, lambda _: None, seed)
                for text, output in zip(own, found, strict=True):
                    (wanted,) = write_all(begin(num_beams, [text]))
                    assert_same(output, wanted)
                is_recorded = tail in (None, texts[0].model.config.language_model.layers - 1)
                assert (recorder.num_played > played) == is_recorded
                counts["no tail" if tail is None else "a tail" if is_recorded else "layers behind a tail"] += len(own)
    assert min(counts.values()) >= 3 and len(counts) == 3
    assert not recordings.has_failed and not recordings.num_held


def test_what_is_no_number_stays_with_its_text() -> None:
    """Neither beside it nor after it, in the places that it left, does anyone hear of it."""
    recordings, recorder = make_recordings()
    writer = partial(OptFixedSteps, recordings=recordings)
    texts = [text for text in texts_of(0, 5) if text.features[0] is not None and text.slot_of_row[0] in (1, 2)][:3]
    tails = [tail_of(text) for text in texts]
    texts = [text for text in texts if tail_of(text) == tails[0]]
    assert len(texts) > 1
    bad = replace(texts[0], features=(torch.full_like(texts[0].features[0], torch.nan),))  # type: ignore[arg-type]
    with torch.inference_mode():
        for others in ([bad, *texts[1:]], texts, texts[::-1]):
            found = write_all(begin(3, others, writer))
            for text, output in zip(others, found, strict=True):
                if text is not bad:
                    assert_same(output, write_all(begin(3, [text]))[0])
    assert recorder.num_played and not recordings.has_failed


def test_places_that_texts_left_do_not_outgrow_the_positions_there_are() -> None:
    recordings, recorder = make_recordings()
    writer = partial(OptFixedSteps, recordings=recordings)
    model, draw = random_model(0), random.Random(0)
    positions = model.config.language_model.max_positions

    def text(length: int) -> Mixed:
        words = [draw.randrange(3, 40) for _ in range(length - 1)]
        return Mixed(model, [BASE], (0,), (Start((IDS.bos, *words), positions),), (None,))

    texts = [text(8), *(text(2) for _ in range(3))]
    with torch.inference_mode():
        writing = begin(1, texts[:1], writer)
        for _ in range(20):
            assert not writing.choose(), "a random text ended"
            writing.step()
        writing.join(begin(1, texts[1:], writer))
        steps = writing._steps
        assert isinstance(steps, OptFixedSteps) and steps.exact.columns.seen.shape[1] > positions + 1
        for own, output in zip(texts, write_all(writing), strict=True):
            assert_same(output, write_all(begin(1, [own]))[0])
    assert recorder.num_played > positions
