"""Small batches of a BLIP's, recorded: a few frames, or a few texts, whose forward takes longer to launch than to compute.

Batches are padded to the next power of two rows; what is in a row of nobody is computed and not read.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import BackboneDims, SlotView
from adapters.families.copies import Copies, Slots, slots_of
from service.backbone.blip import Blip
from service.backbone.fixed import power_of_two, rounded_up
from service.recordings import Recordings

# Reckoned, not measured: above, a GPU computes for longer than it takes to launch what it computes.
MAX_FRAMES, MAX_TEXTS, MAX_TOKENS = 4, 8, 64
TOKENS = 16  # places for tokens come in multiples of so many


class FixedVision:
    """Frames: `states` [F, P, D] and, where there is that head, `frames` [F, E] of `pixels` [F, 3, R, R]. See Fixed."""

    def __init__(
        self,
        model: Blip,
        dims: BackboneDims | None,
        num_rows: int,
        resolution: int,
        slots: Slots,
        device: torch.device | None,
    ) -> None:
        """`device` None: the model's."""
        self._model, vision, head = model, model.config.vision, model.vision_proj
        like = torch.empty(0, dtype=model.dtype, device=device or model.device)
        self.pixels = like.new_zeros(num_rows, 3, resolution, resolution)
        self.states = like.new_zeros(num_rows, (resolution // vision.patch) ** 2 + 1, vision.width)
        self.frames = None if head is None else like.float().new_zeros(num_rows, head.out_features)
        self._copies = slots.make(dims, "mlp", like, heads=() if head is None else ("vision_proj",))

    @property
    def num_bytes(self) -> int:
        """See Fixed."""
        return _num_bytes(self._copies, self.pixels, self.states, self.frames)

    @property
    def changing(self) -> Sequence[Tensor]:
        """See Fixed: nothing is kept."""
        return ()

    @property
    def result(self) -> Tensor:
        """See Fixed."""
        return self.states

    def run(self) -> None:
        """See every frame."""
        self.states.copy_(self._model.encode_vision(self.pixels, None if self._copies is None else self._copies.terms))
        if self.frames is not None:
            self.frames.copy_(_project(self._model, self._copies, "vision_proj", self.states[:, 0]))

    def load(self, pixels: Tensor, views: Sequence[SlotView]) -> None:
        """Bring frames [F, 3, R, R] and the slots of each, or of all."""
        self.pixels[: len(pixels)] = pixels
        if self._copies is not None:
            self._copies.load(views)


class FixedText:
    """Texts: unit-norm `result` [B, E] of `ids` [B, L] with `mask` [B, L]. See Fixed."""

    def __init__(
        self,
        model: Blip,
        dims: BackboneDims | None,
        num_rows: int,
        num_tokens: int,
        slots: Slots,
        device: torch.device | None,
    ) -> None:
        """`device` None: the model's."""
        self._model = model
        like = torch.empty(0, dtype=model.dtype, device=device or model.device)
        self.ids = like.new_zeros(num_rows, num_tokens, dtype=torch.long)
        self.mask = like.new_zeros(num_rows, num_tokens, dtype=torch.bool)
        self.result = like.float().new_zeros(num_rows, model.head("text_proj").out_features)
        self._copies = slots.make(dims, "text", like, heads=("text_proj",))

    @property
    def num_bytes(self) -> int:
        """See Fixed."""
        return _num_bytes(self._copies, self.ids, self.mask, self.result)

    @property
    def changing(self) -> Sequence[Tensor]:
        """See Fixed: nothing is kept."""
        return ()

    def run(self) -> None:
        """Read every text."""
        hidden = self._model.encode_text(self.ids, self.mask, None if self._copies is None else self._copies.terms)
        self.result.copy_(functional.normalize(_project(self._model, self._copies, "text_proj", hidden[:, 0]), dim=-1))

    def load(self, ids: Tensor, mask: Tensor, views: Sequence[SlotView]) -> None:
        """Bring texts ids [B, L] with mask [B, L], and the slots of each, or of all."""
        rows, tokens = ids.shape
        self.ids.zero_()[:rows, :tokens] = ids
        self.mask.zero_()[:rows, :tokens] = mask
        if self._copies is not None:
            self._copies.load(views)


def _project(model: Blip, copies: Copies | None, head: str, x: Tensor) -> Tensor:
    """x [B, D] through the head each row uses, in float32."""
    projected: Tensor = model.head(head)(x) if copies is None else copies.project(head, x)
    return projected.float()


def _num_bytes(copies: Copies | None, *own: Tensor | None) -> int:
    tensors = [*own, *(() if copies is None else copies.tensors)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class SmallBatches:
    """A BLIP's small batches, by recordings where there is one that fits."""

    def __init__(self, model: Blip, recordings: Recordings, dims: BackboneDims | None) -> None:
        """`dims`: what the backbone's adapters fit; None for one that takes none."""
        self._model = model
        self._recordings = recordings
        self._dims = dims

    def see(self, pixels: Tensor, views: Sequence[SlotView]) -> FixedVision | None:
        """Frames [F, 3, R, R], on the device, with the slot of each. What is found there is there until the next batch."""
        num_rows = power_of_two(len(pixels))
        found = slots_of(views, num_rows, self._dims, "mlp") if len(pixels) <= MAX_FRAMES else None
        if found is None:
            return None
        slots, own = found
        size = num_rows, pixels.shape[-1], slots
        make = partial(FixedVision, self._model, self._dims, *size)
        return self._recordings.run(("vision", *size), make, lambda fixed: fixed.load(pixels, own))

    def read(self, ids: Tensor, mask: Tensor, views: Sequence[SlotView]) -> FixedText | None:
        """Texts ids [B, L], on the device, with the slot of each. What is found there is there until the next batch."""
        num_rows, fits = power_of_two(len(ids)), len(ids) <= MAX_TEXTS and ids.shape[1] <= MAX_TOKENS
        found = slots_of(views, num_rows, self._dims, "text") if fits else None
        if found is None:
            return None
        slots, own = found
        assert self._model.text_encoder is not None, "texts are read by a backbone with a text encoder. This is a bug."
        num_tokens = min(rounded_up(ids.shape[1], TOKENS), self._model.text_encoder.config.max_positions)
        size = num_rows, num_tokens, slots
        make = partial(FixedText, self._model, self._dims, *size)
        return self._recordings.run(("text", *size), make, lambda fixed: fixed.load(ids, mask, own))
