"""Words that are recorded: the same texts as without, whoever comes, goes, and was there before."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from adapters.families.base import SlotView, adapt_rows
from adapters.families.uniadapter import UniAdapter
from service.backbone.base import Backbone
from service.backbone.blip import Blip
from service.backbone.blip_answers import BlipSteps, begin_answers
from service.backbone.blip_fixed import BlipFixedSteps, Shape
from service.backbone.decoding import Steps, Writing, write_all
from service.backbone.folder import load_backbone
from service.recordings import Recordings
from service.types import GenerateOutput
from tests.service.backbone.churn import assert_same, write_with_comings_and_goings
from tests.service.worlds import WIDTH, adapter_config, random_tensors, write_tiny_backbone
from tests.tape import CannotRecord, make_recordings

NO_ADAPTER = SlotView(None, {})
FAMILY = UniAdapter()
NUM_TEXTS = 24


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("fixed") / "backbone"
    write_tiny_backbone(folder)
    return load_backbone(folder)


@pytest.fixture(scope="module")
def slots(backbone: Backbone) -> list[SlotView]:
    """Slots of several ranks, one of whom has no query term, and none at all."""
    found = [NO_ADAPTER]
    for seed, rank in enumerate((2, 4, 4, 8, 20)):
        config = adapter_config(backbone, rank=rank, options={"query_residual": seed != 1})
        found.append(
            SlotView(FAMILY, FAMILY.fold(config, random_tensors(config, backbone.dims(), seed), backbone.dims()))
        )
    return found


@dataclass(frozen=True)
class Text:
    """A question's states [K, D], the slot of its adapter, and how long its answer may be."""

    states: Tensor
    slot: int
    max_length: int


def make_texts(seed: int, num: int = NUM_TEXTS) -> list[Text]:
    choice = random.Random(seed)
    torch.manual_seed(seed)
    return [
        Text(3 * torch.randn(choice.choice([2, 5, 19]), WIDTH), choice.randrange(6), choice.choice([3, 6, 9]))
        for _ in range(num)
    ]


def begin(
    model: Blip, slots: Sequence[SlotView], texts: Sequence[Text], num_beams: int, writer: Callable[[BlipSteps], Steps]
) -> Writing:
    assert model.decoder is not None
    states = torch.nn.utils.rnn.pad_sequence([text.states for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.states) for text in texts])
    seen = torch.arange(states.shape[1]) < lengths[:, None]
    adaptation = adapt_rows(slots, [text.slot for text in texts])
    memory = model.decoder.body.remember(states, seen, adaptation)
    length = texts[0].max_length
    return begin_answers(model, memory, len(texts), adaptation, num_beams=num_beams, max_length=length, writer=writer)


def alone(backbone: Backbone, slots: Sequence[SlotView], text: Text, num_beams: int) -> GenerateOutput:
    (found,) = write_all(begin(backbone.model, slots, [text], num_beams, lambda steps: steps))
    return found


def recorded(backbone: Backbone, recordings: Recordings) -> Callable[[BlipSteps], Steps]:
    return partial(BlipFixedSteps, recordings=recordings, dims=backbone.dims())


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_texts_are_written_as_alone_whoever_comes_and_goes(
    backbone: Backbone, slots: list[SlotView], num_beams: int, seed: int
) -> None:
    recordings, recorder = make_recordings()
    texts = make_texts(seed)
    with torch.inference_mode():
        found = write_with_comings_and_goings(
            texts,
            lambda own: begin(backbone.model, slots, own, num_beams, recorded(backbone, recordings)),
            lambda text: text.max_length,
            seed,
        )
        for text, output in zip(texts, found, strict=True):
            assert_same(output, alone(backbone, slots, text, num_beams))
    assert recorder.num_played > recorder.num_recorded > 1
    assert not recordings.has_failed and not recordings.num_held


def alike(num: int, slot: int | Sequence[int] = 2, seed: int = 0) -> list[Text]:
    """Texts of one length, of one slot or of these."""
    of_text = [slot] * num if isinstance(slot, int) else slot
    texts = make_texts(seed, num)
    return [Text(text.states, own, 6) for text, own in zip(texts, of_text, strict=True)]


def test_what_is_no_number_stays_with_its_text(backbone: Backbone, slots: list[SlotView]) -> None:
    """Neither beside it nor after it, in the places that it left, does anyone hear of it."""
    recordings, recorder = make_recordings()
    bad = SlotView(FAMILY, {name: torch.full_like(tensor, torch.nan) for name, tensor in slots[2].tensors.items()})
    everyone = [*slots, bad]
    texts = [Text(torch.full((12, WIDTH), torch.nan), 6, 6), *alike(2, [1, 3])]
    with torch.inference_mode():
        found = write_all(begin(backbone.model, everyone, texts, 2, recorded(backbone, recordings)))
        for text, output in list(zip(texts, found, strict=True))[1:]:
            assert_same(output, alone(backbone, slots, text, 2))
        (shape,) = {shape for shape in keys(recordings) if shape.num_texts == 4}
        for seed in range(3):
            later = [Text(text.states[:2], text.slot, 6) for text in alike(3, [4, 1, 2], seed)]
            found = write_all(begin(backbone.model, slots, later, 2, recorded(backbone, recordings)))
            for text, output in zip(later, found, strict=True):
                assert_same(output, alone(backbone, slots, text, 2))
    assert keys(recordings).count(shape) == 1, "the places of the first texts were the later ones'"
    assert not recordings.has_failed and recorder.num_played


def test_places_that_texts_left_do_not_outgrow_the_positions_there_are(
    backbone: Backbone, slots: list[SlotView]
) -> None:
    recordings, _ = make_recordings()
    texts = [Text(text.states, text.slot, 20) for text in alike(4, [1, 2, 3, 4])]
    with torch.inference_mode():
        writing = begin(backbone.model, slots, texts[:1], 2, recorded(backbone, recordings))
        for _ in range(14):
            assert not writing.choose(), "a random text ended"
            writing.step()
        writing.join(begin(backbone.model, slots, texts[1:], 2, recorded(backbone, recordings)))
        assert writing_places(writing) > backbone.model.config.decoder.max_positions
        for text, output in zip(texts, write_all(writing), strict=True):
            assert_same(output, alone(backbone, slots, text, 2))


def writing_places(writing: Writing) -> int:
    """How many words there is room for."""
    assert isinstance(writing._steps, BlipFixedSteps)
    return writing._steps.exact.cache.kept.places


def test_a_recording_serves_whoever_comes_next(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, recorder = make_recordings()
    with torch.inference_mode():
        for seed, of_text in enumerate(([1, 2, 3], [3, 3, 1], [2, 1, 0], [0, 0, 4])):
            texts = [Text(text.states[:2], text.slot, 6) for text in alike(3, of_text, seed)]
            for text, output in zip(
                texts,
                write_all(begin(backbone.model, slots, texts, 2, recorded(backbone, recordings))),
                strict=True,
            ):
                assert_same(output, alone(backbone, slots, text, 2))
    assert {shape.num_texts for shape in keys(recordings)} <= {1, 2, 4}
    assert recorder.num_recorded == len(set(keys(recordings)))
    assert recorder.num_recorded < recorder.num_played


def keys(recordings: Recordings) -> list[Shape]:
    """What there are recordings for."""
    return [recording.key for recording, _ in recordings._all]


@dataclass
class Refusing:
    """Records nothing at all, or says that it cannot."""

    error: Exception | None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        return lambda: None


@pytest.mark.parametrize("error", [None, CannotRecord("not here")])
def test_what_cannot_be_recorded_is_written_without(
    backbone: Backbone, slots: list[SlotView], caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    recordings, texts = Recordings(Refusing(error), 1 << 30), alike(3, [1, 2, 3])
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = write_all(begin(backbone.model, slots, texts, 2, recorded(backbone, recordings)))
            for text, output in zip(texts, found, strict=True):
                assert_same(output, alone(backbone, slots, text, 2))
    assert recordings.has_failed
    assert len([one for one in caplog.messages if "nothing more is recorded" in one]) == 1


def test_texts_for_which_there_is_no_room_are_written_without(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, recorder = make_recordings(max_bytes=1000)
    texts = alike(3, [1, 2, 3])
    with torch.inference_mode():
        found = write_all(begin(backbone.model, slots, texts, 2, recorded(backbone, recordings)))
        for text, output in zip(texts, found, strict=True):
            assert_same(output, alone(backbone, slots, text, 2))
    assert not recorder.num_recorded and not recordings.has_failed


def test_texts_whose_writing_was_given_up_hold_no_recording(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, recorder = make_recordings()
    with torch.inference_mode():
        for _ in range(3):
            writing = begin(backbone.model, slots, alike(2), 2, recorded(backbone, recordings))
            writing.choose()
            writing.step()
            del writing
    assert recorder.num_recorded == 1


def test_two_groups_of_texts_have_recordings_of_their_own(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, recorder = make_recordings()
    pair = [alike(2, seed=seed) for seed in (0, 1)]
    pair = [[Text(text.states[:2], 2, 6) for text in texts] for texts in pair]
    with torch.inference_mode():
        writings = [begin(backbone.model, slots, texts, 2, recorded(backbone, recordings)) for texts in pair]
        found: list[list[GenerateOutput]] = [[], []]
        while any(map(len, writings)):
            for own, writing in zip(found, writings, strict=True):
                if len(writing):
                    own += [output for _, output in writing.choose()]
                if len(writing):
                    writing.step()
        for texts, own in zip(pair, found, strict=True):
            wanted = [alone(backbone, slots, text, 2) for text in texts]
            by_ids = sorted(own, key=lambda output: output.hypotheses[0].ids)
            for output, one in zip(by_ids, sorted(wanted, key=lambda output: output.hypotheses[0].ids), strict=True):
                assert_same(output, one)
    assert recordings.num_bytes and recorder.num_recorded >= 2


def test_texts_move_to_fewer_places_when_half_of_them_are_empty(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, _ = make_recordings()
    texts = alike(8)
    with torch.inference_mode():
        writing = begin(backbone.model, slots, texts, 2, recorded(backbone, recordings))
        for gone in (0, 3, 1, 2):  # of 8, 5, 4 and 2
            assert not writing.choose(), "a random text ended"
            writing.let_go(range(gone))
            writing.step()
            assert recordings.num_held == 1
    seen = [shape.num_texts for shape in keys(recordings)]
    assert sorted(seen) == [2, 4, 8], "5 of 8 stay where they are, 4 move, and 2 do"


def test_texts_stay_where_they_are_while_no_recordings_are_made(
    backbone: Backbone, slots: list[SlotView], monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings, recorder = make_recordings()
    texts = alike(8)
    with torch.inference_mode():
        writing = begin(backbone.model, slots, texts, 2, recorded(backbone, recordings))
        for gone in (0, 6, 1):
            assert not writing.choose(), "a random text ended"
            writing.let_go(range(gone))
            writing.step()
            monkeypatch.setattr(Recordings, "makes_new", False)
        assert [shape.num_texts for shape in keys(recordings)] == [8] and recorder.num_played == 4, (
            "one of them a trial"
        )
        (found,) = write_all(writing)
    assert_same(found, alone(backbone, slots, texts[7], 2))


def test_what_a_recording_takes_is_counted(backbone: Backbone, slots: list[SlotView]) -> None:
    recordings, _ = make_recordings()
    with torch.inference_mode():
        writing = begin(backbone.model, slots, alike(3, [1, 2, 3]), 2, recorded(backbone, recordings))
        writing.choose()
        writing.step()
    ((recording, _),) = recordings._all
    fixed = recording.fixed
    moved = fixed._cache.kept.tensor, fixed._cache.seen, fixed._cache.length
    copies = fixed._copies._tensors.values()
    own = [fixed.told, fixed.best, *moved, *moved, fixed._states.tensor, fixed._states_mask, *copies]
    assert recordings.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in own)
