"""The probe's format: what is drawn fits, what is written is read back, and anything else is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.config import AdapterConfig, BackboneRef, Preprocessing, Task
from adapters.errors import InvalidPackage, NonFiniteTensor, TensorMismatch
from adapters.package import (
    PROBE_FILE,
    parse_package,
    read_files,
    read_package,
    replace_file,
    with_probe,
    write_package,
)
from adapters.probe import NUM_FRAMES, Probe, Vocabulary, draw_inputs, parse_probe
from tests.adapters.test_package import make_config, make_tensors

PATCH = 16
SPECIAL = frozenset({0, 1, 2, 38, 39})
VOCABULARY = Vocabulary(size=40, text=(1, 2), answer=(38, 2), special=SPECIAL, max_tokens=24)
EMBED_DIM = 5


def config_of(task: Task, **preprocessing: int) -> AdapterConfig:
    return AdapterConfig(
        family="uniadapter",
        task=task,
        rank=3,
        backbone=BackboneRef(architecture="blip", width=12, layers=2, parts={}),
        preprocessing=Preprocessing(**{"resolution": 64, **preprocessing}),
    )


def probe_of(config: AdapterConfig) -> Probe:
    inputs = draw_inputs(config, patch=PATCH, vocabulary=VOCABULARY)
    frames, texts = len(inputs.medium), len(inputs.text_ids)
    if config.task == "retrieval":
        shapes = {"frames": (frames, EMBED_DIM), "texts": (texts, EMBED_DIM), "match": (texts, 2)}
    else:
        shapes = dict.fromkeys(("scores", "first_words"), (texts, len(inputs.answers())))
    return Probe(inputs, {name: torch.randn(shape) for name, shape in shapes.items()})


# --- drawing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_the_same_inputs_are_drawn_every_time_and_fit_into_a_few_kilobytes(task: Task) -> None:
    config = config_of(task, resolution=480)
    one, two = probe_of(config), probe_of(config)
    assert torch.equal(one.inputs.medium, two.inputs.medium)
    assert (one.inputs.texts(), one.inputs.answers()) == (two.inputs.texts(), two.inputs.answers())
    assert sum(t.numel() * t.element_size() for t in one.tensors().values()) < 10_000


def test_words_are_drawn_from_the_vocabulary_and_special_ids_stand_where_they_belong() -> None:
    inputs = draw_inputs(config_of("vqa"), patch=PATCH, vocabulary=VOCABULARY)
    for first, rows in ((VOCABULARY.text[0], inputs.texts()), (VOCABULARY.answer[0], inputs.answers())):
        assert len(set(rows)) == len(rows) > 1
        for row in rows:
            assert (row[0], row[-1]) == (first, VOCABULARY.text[1])
            assert not set(row[1:-1]) & SPECIAL
            assert max(row) < VOCABULARY.size
    assert draw_inputs(config_of("retrieval"), patch=PATCH, vocabulary=VOCABULARY).answers() == ()


def test_texts_keep_to_the_limits_of_the_adapter_and_of_the_backbone() -> None:
    short = config_of("vqa").model_copy(update={"max_text_tokens": 3})
    assert draw_inputs(short, patch=PATCH, vocabulary=VOCABULARY).text_ids.shape[1] == 3
    few = Vocabulary(40, (1, 2), (38, 2), SPECIAL, max_tokens=3)
    drawn = draw_inputs(config_of("vqa"), patch=PATCH, vocabulary=few)
    assert drawn.text_ids.shape[1] == 3
    assert drawn.answer_ids is not None and drawn.answer_ids.shape[1] == 3


@pytest.mark.parametrize("num_frames, drawn", [(1, 1), (2, 2), (8, NUM_FRAMES)])
def test_frames_differ_and_there_are_two_where_the_adapter_takes_clips(num_frames: int, drawn: int) -> None:
    pixels = draw_inputs(config_of("vqa", num_frames=num_frames), patch=PATCH, vocabulary=VOCABULARY).medium
    assert len(pixels) == drawn
    assert len({frame.numpy().tobytes() for frame in pixels}) == drawn


def test_squares_are_spread_over_their_patches_and_normalised() -> None:
    config = config_of("vqa")
    inputs = draw_inputs(config, patch=PATCH, vocabulary=VOCABULARY)
    frames = inputs.frames(config.preprocessing)
    assert frames.shape == (NUM_FRAMES, 3, 64, 64) and frames.dtype == torch.float32
    for frame, channel, row, column in ((0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)):
        value = int(inputs.medium[frame, channel, row, column]) / 255
        expected = (value - config.preprocessing.mean[channel]) / config.preprocessing.std[channel]
        top, left = row * PATCH, column * PATCH
        patch = frames[frame, channel, top : top + PATCH, left : left + PATCH]
        torch.testing.assert_close(patch, torch.full((PATCH, PATCH), expected))


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_what_is_written_is_read_back(tmp_path: Path, task: Task) -> None:
    config = make_config(task=task)
    probe = Probe(
        draw_inputs(config, patch=PATCH, vocabulary=VOCABULARY),
        probe_of(config_of(task)).outputs,
    )
    write_package(tmp_path / "p", config, make_tensors(config), "", probe.tensors())
    stored = read_package(tmp_path / "p").probe
    assert stored is not None
    read = parse_probe(stored, config)
    assert read.tensors().keys() == probe.tensors().keys() == stored.keys()
    for name, tensor in probe.tensors().items():
        assert torch.equal(read.tensors()[name], tensor)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("vqa", lambda t: t.pop("text_ids"), "lacks text_ids"),
        ("retrieval", lambda t: t.pop("expected.match"), r"lacks expected\.match"),
        ("vqa", lambda t: t.update(extra=torch.ones(1)), "holds extra"),
        ("retrieval", lambda t: t.update(answer_ids=torch.ones(2, 3, dtype=torch.int64)), "holds answer_ids"),
        ("vqa", lambda t: t.update(pixels=t["pixels"].float()), r"pixels is float32 .*, not uint8 \[F, 3, G, G\]"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][:, :1]), r"pixels is uint8 \[2, 1, 4, 4\]"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][..., :2]), r"pixels is uint8 \[2, 3, 4, 2\], not"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][0]), "pixels is uint8"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][:0]), "F must be 1 to 8"),
        ("vqa", lambda t: t.update(pixels=t["pixels"].repeat(5, 1, 1, 1)), "F must be 1 to 8"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][:1]), "has 1 frames; at least 2"),
        ("vqa", lambda t: t.update(pixels=t["pixels"][..., :3, :3]), "3 squares a side, which do not divide"),
        ("vqa", lambda t: t.update(text_ids=t["text_ids"].int()), "text_ids is int32"),
        ("vqa", lambda t: t.update(text_ids=t["text_ids"][:, :2]), "L must be 3 to 512"),
        ("vqa", lambda t: t.update(text_ids=t["text_ids"].repeat(1, 5)), "texts have 40 tokens; the adapter takes 35"),
        ("vqa", lambda t: t.update(answer_ids=t["answer_ids"][:1]), r"scores is float32 \[2, 4\], not .*N=2, C=1"),
        (
            "retrieval",
            lambda t: t.update({"expected.texts": t["expected.texts"][:, :2]}),
            r"texts is float32 \[2, 2\], not float32 \[N=2, E=5\]",
        ),
        ("retrieval", lambda t: t.update({"expected.match": t["expected.match"].half()}), "match is float16"),
    ],
)
def test_what_is_not_a_probe_of_the_task_is_refused_by_name(task: Task, change: Change, message: str) -> None:
    config = config_of(task)
    tensors = probe_of(config).tensors()
    change(tensors)
    with pytest.raises(InvalidPackage, match=message):
        parse_probe(tensors, config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    config = config_of("retrieval")
    tensors = probe_of(config).tensors()
    tensors["expected.texts"][1, 2] = value
    with pytest.raises(NonFiniteTensor, match=r"expected\.texts"):
        parse_probe(tensors, config)


def test_a_probe_of_another_task_is_refused() -> None:
    with pytest.raises(TensorMismatch):
        parse_probe(probe_of(config_of("vqa")).tensors(), config_of("retrieval"))


# --- in a package --------------------------------------------------------------------------------------------


def test_a_probe_changes_the_package_digest_and_nothing_else(tmp_path: Path) -> None:
    config = make_config()
    without = write_package(tmp_path / "p", config, make_tensors(config), "card", None)
    assert without.probe is None
    files = with_probe(read_files(tmp_path / "p"), {"x": torch.ones(2)})
    package = parse_package(files)
    assert package.probe is not None and package.probe.keys() == {"x"}
    assert package.weights_digest == without.weights_digest
    assert package.package_digest != without.package_digest
    replace_file(tmp_path / "p", PROBE_FILE, files[PROBE_FILE])
    assert read_package(tmp_path / "p").package_digest == package.package_digest
    again = with_probe(read_files(tmp_path / "p"), {"x": torch.zeros(2)})
    replace_file(tmp_path / "p", PROBE_FILE, again[PROBE_FILE])
    assert {p.name for p in tmp_path.iterdir()} == {"p"}
    assert read_files(tmp_path / "p") == again
