"""A package's probe: a few inputs, and the outputs its adapter must give for them.

`probe.safetensors` holds, with F frames, G squares a side, N texts of L tokens, C answers of A tokens:

    pixels                uint8    [F, 3, G, G]   a clip whose frames are squares of one colour, a patch each
    spectrogram           uint8    [S, M]         in place of it, for who listens: squares of one loudness, a patch each
    text_ids              int64    [N, L]         captions (retrieval), questions (vqa), the start token (caption)
    answer_ids            int64    [C, A]         vqa, caption: the answers to rank, start and end token included

    expected.frames       float32  [F, E]         retrieval: features of the frames, unnormalised
    expected.texts        float32  [N, E]         retrieval: unit features of the texts
    expected.match        float32  [N, 2]         retrieval: matching logits of each text with the clip
    expected.scores       float32  [N, C]         vqa, caption: scores of the answers, each read as a whole
    expected.first_words  float32  [N, C]         vqa, caption: log-probabilities of the answers' first words

No other tensor. Knows the format and how inputs are drawn; who computes outputs is not its business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.config import AdapterConfig, AudioPreprocessing, Preprocessing, Task
from adapters.errors import InvalidPackage, NonFiniteTensor, TensorMismatch

NUM_FRAMES = 2  # frame weights have an effect from two frames on
NUM_TEXTS = 2
NUM_ANSWERS = 4
TEXT_TOKENS = 8  # of a drawn text, [CLS] and [SEP] counted
ANSWER_TOKENS = 4  # of a drawn answer, [DEC] and [SEP] counted
SEED = 20_230_521

# What a probe may hold at most: whoever is given one runs it.
MAX_SIZES = {"F": 8, "G": 2048, "S": 4096, "M": 512, "N": 8, "L": 512, "C": 32, "A": 512, "E": 65536}
MIN_SIZES = {"L": 3, "A": 3}  # one word at least
LOUDNESS = (-2.0, 2.0)  # of a spectrogram, normalised

EXPECTED = "expected."
OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "retrieval": ("frames", "texts", "match"),
    "vqa": ("scores", "first_words"),
    "caption": ("scores", "first_words"),
}


class _Form(NamedTuple):
    """Dtype and shape of a tensor; letters are sizes that tensors share."""

    dtype: torch.dtype
    shape: tuple[str | int, ...]


_SEEN = {"pixels": _Form(torch.uint8, ("F", 3, "G", "G"))}
_HEARD = {"spectrogram": _Form(torch.uint8, ("S", "M"))}
_ANSWERS = {
    "answer_ids": _Form(torch.int64, ("C", "A")),
    "expected.scores": _Form(torch.float32, ("N", "C")),
    "expected.first_words": _Form(torch.float32, ("N", "C")),
}
_FORMS: Mapping[Task, Mapping[str, _Form]] = {
    "retrieval": {
        "expected.frames": _Form(torch.float32, ("F", "E")),
        "expected.texts": _Form(torch.float32, ("N", "E")),
        "expected.match": _Form(torch.float32, ("N", 2)),
    },
    "vqa": _ANSWERS,
    "caption": _ANSWERS,
}


def _forms(config: AdapterConfig) -> dict[str, _Form]:
    """What a probe of an adapter holds, in the order in which sizes are fixed."""
    medium = _HEARD if isinstance(config.preprocessing, AudioPreprocessing) else _SEEN
    length = 1 if config.task == "caption" else "L"
    return {**medium, "text_ids": _Form(torch.int64, ("N", length)), **_FORMS[config.task]}


@dataclass(frozen=True, eq=False)
class ProbeInputs:
    """What is put in: see the module. `medium` is pixels or a spectrogram; `answer_ids` is None for retrieval."""

    medium: Tensor
    text_ids: Tensor
    answer_ids: Tensor | None

    def frames(self, preprocessing: Preprocessing) -> Tensor:
        """The clip as the vision tower reads it: [F, 3, R, R] float32, squares spread out by nearest, then normalised."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        squares = (self.medium.float() / 255.0 - mean) / std
        side = preprocessing.resolution // squares.shape[-1]
        return squares.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)

    def spectrogram(self, preprocessing: AudioPreprocessing) -> Tensor:
        """The sound as the audio encoder reads it: [steps, bins] float32, squares spread out by nearest, then cut."""
        quietest, loudest = LOUDNESS
        squares = quietest + (loudest - quietest) * self.medium.float() / 255.0
        steps, bins = preprocessing.max_steps, preprocessing.num_mel_bins
        tall = squares.repeat_interleave(-(-steps // squares.shape[0]), dim=0)[:steps]
        return tall.repeat_interleave(-(-bins // squares.shape[1]), dim=1)[:, :bins]

    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each text."""
        return _rows(self.text_ids)

    def answers(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each answer; none for retrieval."""
        return () if self.answer_ids is None else _rows(self.answer_ids)


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs and what they must give, outputs by name (`OUTPUTS` of the task)."""

    inputs: ProbeInputs
    outputs: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """What goes into `probe.safetensors`."""
        medium = "spectrogram" if self.inputs.medium.ndim == 2 else "pixels"
        tensors = {medium: self.inputs.medium, "text_ids": self.inputs.text_ids}
        if self.inputs.answer_ids is not None:
            tensors["answer_ids"] = self.inputs.answer_ids
        return tensors | {f"{EXPECTED}{name}": output for name, output in self.outputs.items()}


@dataclass(frozen=True)
class Vocabulary:
    """What drawing words needs to know of a backbone: ids below `size` are words, but for the `special` ones.

    `text` and `answer` are the tokens that a text, and an answer, start and end with.
    """

    size: int
    text: tuple[int, int]
    answer: tuple[int, int]
    special: frozenset[int]
    max_tokens: int


def draw_inputs(config: AdapterConfig, *, patch: int, vocabulary: Vocabulary) -> ProbeInputs:
    """Inputs for an adapter, always the same ones for the same sizes: random squares around a colour of each frame's own,
    and random words."""
    generator = torch.Generator().manual_seed(SEED)
    medium = _draw_medium(config, patch, generator)
    words = torch.tensor([word for word in range(vocabulary.size) if word not in vocabulary.special])

    def draw(rows: int, ends: tuple[int, int], length: int) -> Tensor:
        ids = words[torch.randint(0, len(words), (rows, length), generator=generator)]
        ids[:, 0], ids[:, -1] = ends
        return ids

    length = min(TEXT_TOKENS, config.max_text_tokens, vocabulary.max_tokens)
    text_ids = draw(NUM_TEXTS, vocabulary.text, length)
    if config.task == "caption":
        text_ids = torch.tensor([[vocabulary.text[0]]])
    answers = draw(NUM_ANSWERS, vocabulary.answer, min(ANSWER_TOKENS, vocabulary.max_tokens))
    return ProbeInputs(medium, text_ids, None if config.task == "retrieval" else answers)


def _draw_medium(config: AdapterConfig, patch: int, generator: torch.Generator) -> Tensor:
    if isinstance(config.preprocessing, AudioPreprocessing):
        steps, bins = -(-config.preprocessing.max_steps // patch), -(-config.preprocessing.num_mel_bins // patch)
        return torch.randint(0, 256, (steps, bins), generator=generator).to(torch.uint8)
    num_frames = min(NUM_FRAMES, config.pixels.num_frames)
    side = config.pixels.resolution // patch
    colours = torch.randint(0, 256, (num_frames, 3, 1, 1), generator=generator)
    squares = torch.randint(0, 256, (num_frames, 3, side, side), generator=generator)
    return ((colours + squares) // 2).to(torch.uint8)


def parse_probe(tensors: Mapping[str, Tensor], config: AdapterConfig) -> Probe:
    """The probe that a package's `probe.safetensors` holds.

    Raises: TensorMismatch for a tensor that is missing, unexpected, or of another dtype or shape than the task demands,
    or a size out of bounds; NonFiniteTensor; InvalidPackage for a clip that the preprocessing cannot spread out.
    """
    forms = _forms(config)
    _check_names(forms.keys(), tensors.keys())
    sizes: dict[str, int] = {}
    for name, form in forms.items():
        _check_form(name, tensors[name], form, sizes)
        if form.dtype.is_floating_point and not bool(torch.isfinite(tensors[name]).all()):
            raise NonFiniteTensor(f"the probe's {name} holds NaN or an infinity", param=name)
    _check_against(config, sizes)
    medium = tensors["pixels"] if "pixels" in tensors else tensors["spectrogram"]
    inputs = ProbeInputs(medium, tensors["text_ids"], tensors.get("answer_ids"))
    return Probe(inputs, {name: tensors[f"{EXPECTED}{name}"] for name in OUTPUTS[config.task]})


def _check_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, unexpected = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing:
        raise TensorMismatch(f"the probe lacks {', '.join(missing)}", param=missing[0])
    if unexpected:
        raise TensorMismatch(f"the probe holds {', '.join(unexpected)}, which it must not", param=unexpected[0])


def _check_form(name: str, tensor: Tensor, form: _Form, sizes: dict[str, int]) -> None:
    """Check a tensor against its form, given the `sizes` that earlier ones fixed; note those it fixes."""
    found = f"{_dtype(tensor.dtype)} [{', '.join(map(str, tensor.shape))}]"
    wanted = f"{_dtype(form.dtype)} [{', '.join(_size(size, sizes) for size in form.shape)}]"
    if tensor.dtype != form.dtype or tensor.ndim != len(form.shape):
        raise TensorMismatch(f"the probe's {name} is {found}, not {wanted}", param=name)
    for wanted_size, size in zip(form.shape, tensor.shape, strict=True):
        if isinstance(wanted_size, str) and wanted_size not in sizes:
            if not MIN_SIZES.get(wanted_size, 1) <= size <= MAX_SIZES[wanted_size]:
                raise TensorMismatch(
                    f"the probe's {name} is {found}: {wanted_size} must be {MIN_SIZES.get(wanted_size, 1)} to "
                    f"{MAX_SIZES[wanted_size]}",
                    param=name,
                )
            sizes[wanted_size] = size
        if size != (sizes[wanted_size] if isinstance(wanted_size, str) else wanted_size):
            raise TensorMismatch(f"the probe's {name} is {found}, not {wanted}", param=name)


def _check_against(config: AdapterConfig, sizes: Mapping[str, int]) -> None:
    if sizes.get("L", 1) > config.max_text_tokens:
        raise InvalidPackage(
            f"the probe's texts have {sizes['L']} tokens; the adapter takes {config.max_text_tokens}", param="text_ids"
        )
    if isinstance(config.preprocessing, AudioPreprocessing):
        return
    preprocessing = config.pixels
    if preprocessing.resolution % sizes["G"]:
        raise InvalidPackage(
            f"the probe's pixels have {sizes['G']} squares a side, which do not divide resolution "
            f"{preprocessing.resolution}",
            param="pixels",
        )
    fewest = min(NUM_FRAMES, preprocessing.num_frames)
    if sizes["F"] < fewest:
        raise InvalidPackage(f"the probe's clip has {sizes['F']} frames; at least {fewest} are needed", param="pixels")


def _size(size: str | int, sizes: Mapping[str, int]) -> str:
    """A size as a message shows it: `N=2` where it is fixed, `N` where any will do."""
    if isinstance(size, int):
        return str(size)
    return f"{size}={sizes[size]}" if size in sizes else size


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(ids: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in ids.tolist())
