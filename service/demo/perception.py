"""Train the demo's encoders, each on its own modality alone: what is there must be readable from the first token.

No words: the labels are attributes. A picture's are, for each shape and for each colour, whether a thing of it is there
and what else that thing is, then those of its first and of its second thing; a clip's the same, by motions too; a sound's
those of its first and of its second noise. They are read by linear maps, thrown away afterwards, from the states of the
last blocks, which adapters will be given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.epalm import EncoderName
from service.backbone.config import AstConfig, TimesformerConfig, VisionConfig
from service.backbone.encoders import Encoder, Timesformer, make_encoder
from service.demo.batches import pixels_of
from service.demo.corpus import MAX_THINGS, Known, known_of_movers, known_of_noises, known_of_things
from service.demo.motion import MOTIONS, MovingScene, by_shape
from service.demo.pretrain import POSITION_AMPLITUDE, sine_positions
from service.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene
from service.demo.sounds import KINDS, LENGTHS_S, PITCHES, Sound, synthesise
from service.demo.world import Content, draft, render
from service.media.sound import SpectrogramPreprocessing, spectrogram

WIDTH, BLOCKS, HEADS, RESOLUTION, PATCH, NUM_FRAMES = 128, 4, 4, 64, 16, 8
READ_BLOCKS = 3  # labels are readable from the last so many blocks
TIME_POSITION_AMPLITUDE = 1.0  # of clips' patches and frames: which way a thing moves is a product of the two
LOSS_SCALE = 10.0  # mean losses of many easy labels are small beside the gradient's limit
SPECTROGRAM = SpectrogramPreprocessing(num_mel_bins=64, max_steps=128)

Attributes = Mapping[str, Sequence[str]]
PICTURE: Attributes = {"shape": SHAPES, "colour": COLOURS, "place": PLACES, "size": SIZES}
CLIP: Attributes = {"shape": SHAPES, "colour": COLOURS, "motion": tuple(MOTIONS)}
SOUND: Attributes = {"kind": tuple(KINDS), "pitch": tuple(PITCHES), "length": tuple(LENGTHS_S)}
NAMING: Mapping[EncoderName, Sequence[str]] = {  # what no two things share
    "vit": ("shape", "colour"),
    "timesformer": ("shape", "colour", "motion"),
    "ast": (),
}


@dataclass(frozen=True)
class Sense:
    """How one encoder is trained: on the training split of a world, at what sizes."""

    encoder: EncoderName
    world: str
    config: VisionConfig | TimesformerConfig | AstConfig
    attributes: Attributes
    steps: int
    batch_size: int
    named_steps: int = 0  # before these, with labels by name alone
    learning_rate: float = 1e-3
    num_items: int | None = None  # so many items, again and again; None: new ones in each step
    alone_until: int = 0  # of the named steps, with one thing in each scene: which way it moves is else learned late
    num_validated: int = 400
    seed: int = 5


_SIZES: dict[str, Any] = {"width": WIDTH, "layers": BLOCKS, "heads": HEADS, "mlp_width": 4 * WIDTH, "patch": PATCH}
SENSES: dict[EncoderName, Sense] = {
    sense.encoder: sense
    for sense in (
        Sense(
            "vit",
            "demo-epalm-vqa",
            VisionConfig(**_SIZES, grid=RESOLUTION // PATCH),
            PICTURE,
            steps=2000,
            batch_size=64,
            named_steps=4000,
        ),
        Sense(
            "timesformer",
            "demo-epalm-video-qa",
            TimesformerConfig(**_SIZES, grid=RESOLUTION // PATCH, num_frames=NUM_FRAMES),
            CLIP,
            steps=2000,
            batch_size=32,
            named_steps=5000,
            alone_until=1000,
        ),
        Sense(
            "ast",
            "demo-epalm-audio-caption",
            AstConfig(
                **_SIZES,
                frequency_stride=PATCH,
                time_stride=PATCH,
                num_mel_bins=SPECTROGRAM.num_mel_bins,
                max_steps=SPECTROGRAM.max_steps,
            ),
            SOUND,
            steps=2500,
            batch_size=64,
            num_items=12_000,  # filter banks take longer than the step itself
        ),
    )
}


def initialise(encoder: Encoder, seed: int) -> None:
    """Normal weights, zero biases, sine-cosine positions for the patches of a square grid, and random ones for frames."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02 if "embed" in name or "token" in name else 0.04, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        if not isinstance(encoder.config, AstConfig):
            amplitude = TIME_POSITION_AMPLITUDE if isinstance(encoder, Timesformer) else POSITION_AMPLITUDE
            encoder.pos_embed[0, 1:] = amplitude * sine_positions(encoder.config.grid, encoder.config.width)
        if isinstance(encoder, Timesformer):
            encoder.time_embed.normal_(0.0, TIME_POSITION_AMPLITUDE, generator=generator)


def labels_of(content: Content, sense: Sense, *, ordered: bool = True) -> list[int]:
    """The labels of what is shown or heard; 0 is "no such thing".

    First, for each name that no two things share (a shape, a colour, ...), what else the thing of that name is; then, where
    they are `ordered`, what the first thing is and the second. Sounds have no names.
    """
    things = _things(content)
    labels = []
    for naming in NAMING[sense.encoder]:
        for name in sense.attributes[naming]:
            thing = next((t for t in things if getattr(t, naming) == name), None)
            labels += _labels_of_thing(thing, sense, but=naming)
    for place in range(MAX_THINGS if ordered else 0):
        labels += _labels_of_thing(things[place] if place < len(things) else None, sense)
    return labels


def _labels_of_thing(thing: Any, sense: Sense, but: str | None = None) -> list[int]:
    return [
        0 if thing is None else 1 + values.index(getattr(thing, attribute))
        for attribute, values in sense.attributes.items()
        if attribute != but
    ]


def known_of(content: Content) -> Known:
    """What can be told of a content, in the order that its encoder's labels have."""
    things = _things(content)
    match content:
        case Sound():
            return known_of_noises(things)
        case MovingScene():
            return known_of_movers(things)
    return known_of_things(things)


def _things(content: Content) -> Sequence[Any]:
    """In order: noises as they follow each other, things of a picture as they are read, moving ones by their shapes."""
    match content:
        case Sound(noises):
            return noises
        case MovingScene(movers):
            return by_shape(movers)
        case (Scene() as scene,):
            return scene.things
    raise AssertionError("the caller's world shows something else. This is a bug.")


def num_values(sense: Sense, *, ordered: bool = True) -> list[int]:
    """How many values each of the labels can have."""
    sizes = {attribute: len(values) + 1 for attribute, values in sense.attributes.items()}
    named = [
        size
        for naming in NAMING[sense.encoder]
        for _ in sense.attributes[naming]
        for attribute, size in sizes.items()
        if attribute != naming
    ]
    return named + list(sizes.values()) * (MAX_THINGS if ordered else 0)


def inputs_of(contents: Sequence[Content]) -> Tensor:
    """What an encoder is given: pixels [B, 3, R, R] or [B, T, 3, R, R], or spectrograms [B, S, F]."""
    if isinstance(contents[0], Sound):
        sounds = [synthesise(sound) for sound in contents if isinstance(sound, Sound)]
        return torch.from_numpy(np.stack([spectrogram(samples, SPECTROGRAM) for samples in sounds]))
    pixels = pixels_of([render(content) for content in contents])
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels


class PerceptionTraining:
    """Cross-entropy of every label, read from each of the last blocks: those by name alone, or `ordered` ones too."""

    def __init__(self, sense: Sense, *, ordered: bool = True) -> None:
        self.sense = sense
        self.ordered = ordered
        self.encoder = make_encoder(sense.config)
        initialise(self.encoder, sense.seed)
        self._sizes = num_values(sense, ordered=ordered)
        self._kept: dict[int, tuple[Tensor, list[int]]] = {}
        self._readers = nn.ModuleList(nn.Linear(sense.config.width, sum(self._sizes)) for _ in range(READ_BLOCKS))
        generator = torch.Generator().manual_seed(sense.seed + 1)
        with torch.no_grad():
            for parameter in self._readers.parameters():
                parameter.normal_(0.0, 0.04, generator=generator)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained."""
        readers = {f"readers.{name}": parameter for name, parameter in self._readers.named_parameters()}
        return dict(self.encoder.named_parameters()) | readers

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        examples = [self.example(index) for index in self.indices(step)]
        labels = torch.tensor([labels for _, labels in examples])
        return {"labels": self.loss(torch.stack([inputs for inputs, _ in examples]), labels)}

    def indices(self, step: int) -> list[int]:
        """A step's items of the training split."""
        sense = self.sense
        first = step * sense.batch_size
        if not self.ordered and step < sense.alone_until:
            alone = (index for index in count(8 * first) if len(_things(self._content(index))) == 1)  # a third are
            return list(islice(alone, sense.batch_size))
        indices = range(first, first + sense.batch_size)
        return [index % sense.num_items for index in indices] if sense.num_items else list(indices)

    def _content(self, index: int) -> Content:
        return draft(self.sense.world, "train", self.sense.seed, index).content

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """A scalar, of labels [B, kinds of label]."""
        return LOSS_SCALE * torch.stack([_loss(read, labels) for read in self._read(inputs)]).sum()

    def example(self, index: int) -> tuple[Tensor, list[int]]:
        """What the encoder is given of an item, and its labels."""
        if index not in self._kept:
            content = self._content(index)
            example = inputs_of([content])[0], labels_of(content, self.sense, ordered=self.ordered)
            if self.sense.num_items is None:
                return example
            self._kept[index] = example
        return self._kept[index]

    def _read(self, inputs: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each block read, the logits [B, values] of each label."""
        states = self.encoder.first_tokens(inputs)[:, -READ_BLOCKS:]
        return [
            reader(states[:, block]).float().split(self._sizes, dim=-1) for block, reader in enumerate(self._readers)
        ]

    @torch.no_grad()
    def accuracy(self, contents: Sequence[Content]) -> list[float]:
        """The share of contents of which all labels are read rightly, from each of the last blocks."""
        labels = torch.tensor([labels_of(content, self.sense, ordered=self.ordered) for content in contents])
        shares = []
        for read in self._read(inputs_of(contents)):
            chosen = torch.stack([logits.argmax(dim=-1) for logits in read], dim=1)
            shares.append((chosen == labels).all(dim=1).float().mean().item())
        return shares

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


def _loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    losses = [functional.cross_entropy(each, labels[:, place]) for place, each in enumerate(logits)]
    return torch.stack(losses).mean()
