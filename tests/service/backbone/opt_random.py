"""Random OPTs, random eP-ALM adapters with random schedules, and batches that mix them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapters.config import AdapterConfig, BackboneRef, Preprocessing
from adapters.families.base import Adaptation, EncoderDims, OptDims, SlotView, adapt_rows
from adapters.families.epalm import EPalm, init_tensors
from service.backbone.config import LanguageModelConfig, OptConfig, OptSpecialIds
from service.backbone.decoding import Start, pad_ids
from service.backbone.opt import Opt

FAMILY = EPalm()
WIDTH, HEADS, VOCABULARY, POSITIONS = 24, 3, 40, 40
IDS = OptSpecialIds(pad=1, bos=2, eos=2)
ENCODERS = {"vit": EncoderDims(10, 5), "timesformer": EncoderDims(7, 4), "ast": EncoderDims(12, 6)}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"layers": 6},
    {"layers": 4, "word_width": 16},
    {"layers": 5, "pre_norm": False, "final_norm": False, "word_width": 16},
    {"layers": 3, "pre_norm": False, "final_norm": False},
)
BASE = SlotView(None, {})


@cache
def random_model(variant: int) -> Opt:
    """One of VARIANTS, with logits as far apart as a trained model's."""
    options = {"width": WIDTH, "heads": HEADS, "mlp_width": 40, "vocab_size": VOCABULARY, "max_positions": POSITIONS}
    config = LanguageModelConfig(**({"word_width": WIDTH} | options | VARIANTS[variant]))
    model = Opt(OptConfig(language_model=config, special_ids=IDS)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(variant)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        parameter.normal_(1.0 if is_gain else 0.0, 1.0 if "words" in name else 0.3, generator=generator)
    return model


def dims_of(model: Opt) -> OptDims:
    """The sizes its adapters must fit, as if it had encoders."""
    own = model.config.language_model
    return OptDims(own.width, own.layers, own.word_width, ENCODERS)


def config_of(dims: OptDims, **options: Any) -> AdapterConfig:
    """An adapter's config with these options of the family."""
    connectors = 1 if options.get("shared_connector") else options["injected_hidden_states"]
    return AdapterConfig(
        family="epalm",
        task="vqa",
        rank=connectors,
        options=options,
        backbone=BackboneRef(architecture="opt", width=dims.width, layers=dims.layers, parts={}),
        preprocessing=Preprocessing(resolution=32),
    )


def random_options(draw: random.Random, layers: int) -> dict[str, Any]:
    """Any window, also one that ends well below the last layer; any number of features, also more than it has layers."""
    start = draw.randrange(layers)
    encoder = draw.choice(list(ENCODERS))
    return {
        "encoder": encoder,
        "start_layer_idx": start,
        "end_layer_idx": draw.randint(start + 1, layers),
        "injected_hidden_states": draw.randint(1, ENCODERS[encoder].layers),
        "shared_connector": draw.random() < 0.3,
        "text_step": draw.choice((1, 1, 2, 3)),
        "select_higher_step": draw.random() < 0.3,
        "prompt_len": draw.choice((0, 0, 1, 2, 5)),
        "prompt_mlp": draw.random() < 0.5,
    }


def slot_of(config: AdapterConfig, dims: OptDims, seed: int) -> SlotView:
    """A folded adapter with tensors of any size."""
    tensors = init_tensors(config, dims, torch.Generator().manual_seed(seed))
    return SlotView(FAMILY, FAMILY.fold(config, tensors, dims), FAMILY.schedule(config, dims))


@dataclass(frozen=True)
class Mixed:
    """A batch of texts, whose row i uses `slots[slot_of_row[i]]` and comes with `features[i]`, if any."""

    model: Opt
    slots: Sequence[SlotView]
    slot_of_row: tuple[int, ...]
    starts: tuple[Start, ...]
    features: tuple[Tensor | None, ...]

    @property
    def adaptation(self) -> Adaptation:
        return adapt_rows(self.slots, self.slot_of_row)

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """ids and mask [B, L] of the texts."""
        return pad_ids([start.ids for start in self.starts], IDS.pad, self.model.device)

    def row(self, number: int) -> "Mixed":
        """One of its rows alone."""
        slot = self.slots[self.slot_of_row[number]]
        return Mixed(self.model, [slot], (0,), (self.starts[number],), (self.features[number],))

    def describe(self) -> str:
        """What a failing test must say to be run again by hand."""
        variants = [VARIANTS[number] for number in range(len(VARIANTS)) if random_model(number) is self.model]
        schedules = [None if slot.schedule is None else slot.schedule.layers for slot in self.slots]
        seen = [feature is not None for feature in self.features]
        return f"{variants} {schedules} rows {self.slot_of_row} {[len(s.ids) for s in self.starts]} media {seen}"


def random_batch(seed: int, *, max_rows: int = 4, max_new: int = 7) -> Mixed:
    """A mix of one to three adapters and of none, of all modalities, ragged, some rows without a medium."""
    draw = random.Random(seed)
    model = random_model(draw.randrange(len(VARIANTS)))
    dims = dims_of(model)
    configs = [config_of(dims, **random_options(draw, dims.layers)) for _ in range(draw.randint(1, 3))]
    slots = [*(slot_of(config, dims, seed * 10 + number) for number, config in enumerate(configs)), BASE]
    generator = torch.Generator().manual_seed(seed)
    slot_of_row, starts, features = [], [], []
    for _ in range(draw.randint(1, max_rows)):
        slot = draw.randrange(len(slots))
        words = torch.randint(3, VOCABULARY, (draw.randint(0, 8),), generator=generator).tolist()
        encoder = ENCODERS[str(configs[slot].options["encoder"])] if slot < len(configs) else ENCODERS["vit"]
        states = 2.0 * torch.randn(encoder.layers, encoder.width, generator=generator)
        slot_of_row.append(slot)
        starts.append(Start((IDS.bos, *words), 1 + len(words) + draw.randint(1, max_new)))
        features.append(None if draw.random() < 0.2 else states)
    return Mixed(model, slots, tuple(slot_of_row), tuple(starts), tuple(features))
