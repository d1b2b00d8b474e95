"""The kernels that every claim about numbers is tested under, by name, and which of them multiplied for which slot.

A kernel more is a line in `SETTINGS`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import products
from adapters.families import base
from adapters.families.slots import COPYING_KERNELS, DEFAULT_KERNELS, GROUPED_KERNELS, Kernels, ManySlots, OneSlot, Run

NEVER = 1 << 30
ALONE = "one slot for all rows"
LOOP, SLOT_BY_SLOT, STACKED = "one", "slot by slot", "stacked"
WORD = 2  # tokens of a row where a word is written: a cross-attending layer reads what went in and what came out


@dataclass(frozen=True)
class Setting:
    """Kernels, whether the backbone's matrices are packed, how much must be multiplied for oneDNN to do it by plain ones, and
    whether words are recorded behind the first, which are slots' copies' then.

    `only`: what alone multiplies for the rows of a mixed batch whose slots have neighbours of their size and number of
    rows; None: whatever the sizes lead to.
    """

    kernels: Kernels
    only: str | None
    packs: bool = True
    records: bool = False
    onednn_from: int = products._ONEDNN_FROM


# Everything at a threshold of 1 or NEVER: models of tests are too small to reach the thresholds that serve.
SERVED = "as served"
SETTINGS: Mapping[str, Setting] = {
    SERVED: Setting(DEFAULT_KERNELS, None),
    "slot by slot": Setting(Kernels(segments_from=1, wide_from=1), SLOT_BY_SLOT, onednn_from=0),
    "a loop": Setting(Kernels(NEVER, stacked_up_to=0, gathered_up_to=0, gathered_at_most=0), LOOP),
    "stacked": Setting(Kernels(NEVER, stacked_up_to=NEVER, gathered_up_to=0, gathered_at_most=0), STACKED),
    "gathered": Setting(Kernels(NEVER, stacked_up_to=0, gathered_up_to=NEVER), "gathered"),
    "grouped": Setting(GROUPED_KERNELS, "grouped"),
    "copied": Setting(replace(COPYING_KERNELS, stacked_up_to=0), "copied"),
    "stacked, nothing packed": Setting(
        Kernels(NEVER, stacked_up_to=NEVER, gathered_up_to=0, gathered_at_most=0), STACKED, packs=False
    ),
    "copied, words recorded": Setting(replace(COPYING_KERNELS, stacked_up_to=0), "copied", records=True),
}


def settings_of(device: torch.device) -> list[str]:
    """The names of those that there are on a device: rows are gathered on CPUs alone."""
    return [name for name, setting in SETTINGS.items() if setting.only != "gathered" or device.type == "cpu"]


@dataclass
class Watch:
    """What multiplied the layers' maps while it watched, slot by slot. Heads and key/value terms do not count."""

    _slots: dict[int, Mapping[str, Any]] = field(
        default_factory=dict
    )  # by where they are; kept, so that they stay there
    _seen: set[tuple[int, str, bool]] = field(default_factory=set)
    _within: str = ALONE

    def add(self, tensors: Mapping[str, Any], kernel: str, x: Tensor) -> None:
        """A product of rows x [B, T, in] with a slot's tensors."""
        self._slots[id(tensors)] = tensors
        self._seen.add((id(tensors), kernel, x.shape[1] <= WORD))

    def of(self, tensors: Mapping[str, Any], *, is_word: bool) -> set[str]:
        """What multiplied for the slot with these tensors: for words of texts being written, whose rows are as many as texts
        go on; or for all else.
        """
        return {kernel for slot, kernel, word in self._seen if slot == id(tensors) and word == is_word}

    @property
    def kernels(self) -> set[str]:
        """What multiplied for any slot."""
        return {kernel for _, kernel, _ in self._seen}

    @contextmanager
    def within(self, kernel: str) -> Iterator[None]:
        """Products of single slots are this kernel's."""
        before, self._within = self._within, kernel
        try:
            yield
        finally:
            self._within = before

    def single(self, slot: OneSlot, x: Tensor) -> None:
        """A product with a single slot's matrix."""
        self.add(slot.tensors, self._within, x)


@contextmanager
def watching(setting: Setting | None = None) -> Iterator[Watch]:
    """See which kernels multiply: they are wrapped where they are chosen. One at a time.

    With a setting oneDNN multiplies by plain matrices as it says; its kernels are the caller's to take.
    """
    watch = Watch()
    one, many, add_term = OneSlot.linear, ManySlots._product, base._add_term

    def one_linear(self: OneSlot, x: Any, name: str, layer: int | None = None, *rest: Any, **named: Any) -> Any:
        if layer is not None:
            watch.single(self, x)
        return one(self, x, name, layer, *rest, **named)

    def product(self: ManySlots, x: Tensor, run: Run, *rest: Any) -> Any:
        if run.kernel != "one":
            for part in run.parts:
                watch.add(part.slot.tensors, run.kernel, x)
        with watch.within(LOOP):
            return many(self, x, run, *rest)

    @wraps(add_term)
    def term(*args: Any, **named: Any) -> None:
        is_single = any(isinstance(value, OneSlot) for value in (*args, *named.values()))
        with watch.within(SLOT_BY_SLOT if is_single else LOOP):
            add_term(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_ONEDNN_FROM", (setting or SETTINGS[SERVED]).onednn_from)
        patch.setattr(OneSlot, "linear", one_linear)
        patch.setattr(ManySlots, "_product", product)
        patch.setattr(base, "_add_term", term)
        yield watch
