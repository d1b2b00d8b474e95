"""One detail broken at a time, to see that the comparisons notice.

    python -m tests.parity.mutations              prints the table
    python -m tests.parity.mutations --write      and puts it into docs/parity.md

Each mutation patches our code, serves every case anew and counts the comparisons that fail.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapters.families import uniadapter
from adapters.families.base import Adaptation, Site, SlotTensors
from adapters.families.slots import ManySlots, OneSlot, Slot
from adapters.families.uniadapter import UniAdapter
from adapters.training import losses, objectives
from service import bank
from service.backbone import blip, convert, decoding
from service.engine import blip_stages as stages
from tests.parity.claims import Claims
from tests.parity.outcomes import Mutation, Outcome, quiet, table, write
from tests.parity.serving import serve
from tests.parity.sets import DATA, Case, find_sets, read_set

# --- the changes -----------------------------------------------------------------------------------------


def _norm_before(patch: pytest.MonkeyPatch, norm: Callable[[Tensor], Tensor]) -> None:
    """Another LayerNorm before `down`: the one that the adapter's module calls itself."""
    patch.setattr(uniadapter, "functional", SimpleNamespace(layer_norm=lambda x, shape, eps: norm(x)))


def no_norm_before(patch: pytest.MonkeyPatch, case: Case) -> None:
    _norm_before(patch, lambda x: x)


def gelu_in_adapter(patch: pytest.MonkeyPatch, case: Case) -> None:
    for kind in (OneSlot, ManySlots):
        linear = kind.linear

        def other(
            self: Any, x: Tensor, name: str, layer: Any = None, activation: Any = "none", of: Any = linear
        ) -> Any:
            return of(self, x, name, layer, "gelu" if activation == "relu" else activation)

        patch.setattr(kind, "linear", other)


def no_cross_norm(patch: pytest.MonkeyPatch, case: Case) -> None:
    for kind in (OneSlot, ManySlots):
        patch.setattr(kind, "norm", lambda self, x, name, layer, eps: uniadapter.SCALE * x)


def eps_before(patch: pytest.MonkeyPatch, case: Case) -> None:
    _norm_before(patch, lambda x: functional.layer_norm(x, x.shape[-1:], eps=1e-12))


def eps_cross(patch: pytest.MonkeyPatch, case: Case) -> None:
    for kind in (OneSlot, ManySlots):
        norm = kind.norm
        patch.setattr(kind, "norm", lambda self, x, name, layer, eps, of=norm: of(self, x, name, layer, 1e-12))


def scale_before_cross_norm(patch: pytest.MonkeyPatch, case: Case) -> None:
    fold = UniAdapter._fold_layer

    def folded(self: UniAdapter, tensors: SlotTensors, prefix: str, options: Any) -> dict[str, Tensor]:
        layer = fold(self, tensors, prefix, options)
        for name in ("cross.weight", "cross.bias"):
            layer[name] = uniadapter.SCALE * layer[name]
        for name in ("cross_norm.weight", "cross_norm.bias"):
            layer[name] = layer[name] / uniadapter.SCALE
        return layer

    patch.setattr(UniAdapter, "_fold_layer", folded)


def no_shared_up(patch: pytest.MonkeyPatch, case: Case) -> None:
    fold = UniAdapter._fold_layer

    def folded(self: UniAdapter, tensors: SlotTensors, prefix: str, options: Any) -> dict[str, Tensor]:
        layer = fold(self, tensors, prefix, options)
        if options.multimodal:
            for kind in ("weight", "bias"):
                layer[f"cross.{kind}"] = tensors[f"{prefix}.multi_up_proj.{kind}"]
        return layer

    patch.setattr(UniAdapter, "_fold_layer", folded)


def no_query_residual(patch: pytest.MonkeyPatch, case: Case) -> None:
    fold = UniAdapter.fold

    def folded(self: UniAdapter, *args: Any) -> dict[str, Tensor]:
        slot = fold(self, *args)
        return slot | {"query_gate": torch.zeros_like(slot["query_gate"])}

    patch.setattr(UniAdapter, "fold", folded)


def query_residual_after_cross(patch: pytest.MonkeyPatch, case: Case) -> None:
    delta = UniAdapter.delta

    def late(self: UniAdapter, site: Site, x: Tensor, slot: Slot, before: Tensor | None = None) -> Tensor | None:
        return delta(self, site, x, slot, None if before is None else x)

    patch.setattr(UniAdapter, "delta", late)


def memory_with_relu(patch: pytest.MonkeyPatch, case: Case) -> None:
    def bottleneck(y: Tensor, slot: OneSlot, prefix: str) -> Tensor:
        return slot.linear(slot.linear(y, f"{prefix}.down", activation="relu"), f"{prefix}.up")

    patch.setattr(uniadapter, "_bottleneck", bottleneck)


def memory_unscaled(patch: pytest.MonkeyPatch, case: Case) -> None:
    fold = uniadapter._fold_memory

    def folded(tensors: SlotTensors, source: str, target: str) -> dict[str, Tensor]:
        return fold({**tensors, f"{source}.scale": torch.ones(1)}, source, target)

    patch.setattr(uniadapter, "_fold_memory", folded)


def no_memory(patch: pytest.MonkeyPatch, case: Case) -> None:
    patch.setattr(UniAdapter, "memory", lambda self, stack, y, slot: None)


def decoder_uses_unused_adapters(patch: pytest.MonkeyPatch, case: Case) -> None:
    """The decoder's own, never trained list, for the case's adapter; the companions have none."""
    state = case.document["model"]
    fold, delta = UniAdapter.fold, UniAdapter.delta
    unused: dict[str, dict[str, Tensor]] = {}

    def folded(self: UniAdapter, config: Any, tensors: SlotTensors, dims: Any) -> dict[str, Tensor]:
        slot = fold(self, config, tensors, dims)
        name = "adapters.0.down_proj.weight"
        if "adapters_dec.0.down_proj.weight" in state and torch.equal(tensors[name], state[name]):
            others = {n: state.get(n.replace("adapters.", "adapters_dec."), t) for n, t in tensors.items()}
            unused["slot"] = slot
            unused["decoder"] = fold(self, config, others, dims)
        return slot

    def other(slot: OneSlot) -> OneSlot:
        down, own = slot.tensor("down.weight", None), unused["slot"]["down.weight"]
        return OneSlot(unused["decoder"]) if torch.equal(down, own) else slot

    def other_delta(
        self: UniAdapter, site: Site, x: Tensor, slot: OneSlot | ManySlots, before: Tensor | None = None
    ) -> Tensor | None:
        if site.stack != "decoder" or not unused:
            return delta(self, site, x, slot, before)
        if isinstance(slot, OneSlot):
            return delta(self, site, x, other(slot), before)
        parts = [dataclasses.replace(part, slot=other(part.slot), place=None) for part in slot.parts]
        return delta(self, site, x, ManySlots(parts, slot.kernels), before)

    patch.setattr(UniAdapter, "fold", folded)
    patch.setattr(UniAdapter, "delta", other_delta)


def no_smoothing(patch: pytest.MonkeyPatch, case: Case) -> None:
    for loss in (losses.word_nll, losses.smoothed_nll):
        patch.setattr(loss, "__defaults__", (0.0,))


def _patch_factors(patch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    patch.setattr(stages, "frame_factors", change)
    patch.setattr(objectives, "frame_factors", change)


def cls_key_scaled_too(patch: pytest.MonkeyPatch, case: Case) -> None:
    def factors(similarity: Tensor, tokens: int) -> Tensor:
        weights = similarity.shape[1] * torch.softmax(similarity / uniadapter.FRAME_TEMPERATURE, dim=1)
        return weights.repeat_interleave(tokens, dim=1)

    _patch_factors(patch, factors)


def no_temperature(patch: pytest.MonkeyPatch, case: Case) -> None:
    patch.setattr(uniadapter, "FRAME_TEMPERATURE", 1.0)


def no_number_of_frames(patch: pytest.MonkeyPatch, case: Case) -> None:
    def factors(similarity: Tensor, tokens: int) -> Tensor:
        weights = uniadapter.frame_factors(similarity, tokens).unflatten(1, (-1, tokens)) / similarity.shape[1]
        weights[:, :, 0] = 1.0
        return weights.flatten(1)

    _patch_factors(patch, factors)


def no_frame_weight(patch: pytest.MonkeyPatch, case: Case) -> None:
    _patch_factors(patch, lambda similarity, tokens: similarity.new_ones(len(similarity), similarity.shape[1] * tokens))


def values_scaled_too(patch: pytest.MonkeyPatch, case: Case) -> None:
    remember = blip.CrossAttention.remember

    def scaled(
        self: blip.CrossAttention, y: Tensor, terms: tuple[Tensor, Tensor] | None, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, v = remember(self, y, terms, factors)
        return k, v if factors is None else v * factors[:, None, :, None]

    patch.setattr(blip.CrossAttention, "remember", scaled)


def scaled_before_key_adapter(patch: pytest.MonkeyPatch, case: Case) -> None:
    remember = blip.CrossAttention.remember

    def scaled(
        self: blip.CrossAttention, y: Tensor, terms: tuple[Tensor, Tensor] | None, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, v = remember(self, y, None, factors)
        if terms is None:
            return k, v
        return k + blip.split_heads(terms[0], self.heads), v + blip.split_heads(terms[1], self.heads)

    patch.setattr(blip.CrossAttention, "remember", scaled)


def text_mask_of_ones(patch: pytest.MonkeyPatch, case: Case) -> None:
    pad = stages._pad

    def padded(*args: Any) -> tuple[Tensor, Tensor]:
        ids, mask = pad(*args)
        return ids, torch.ones_like(mask)

    patch.setattr(stages, "_pad", padded)


def memory_mask_of_ones(patch: pytest.MonkeyPatch, case: Case) -> None:
    pad = stages._pad_states

    def padded(*args: Any) -> tuple[Tensor, Tensor]:
        y, mask = pad(*args)
        return y, torch.ones_like(mask)

    patch.setattr(stages, "_pad_states", padded)


def decoder_sees_question_padding(patch: pytest.MonkeyPatch, case: Case) -> None:
    states = stages._question_states

    def seen(*args: Any) -> tuple[Tensor, Tensor, list[str]]:
        hidden, mask, adapters = states(*args)
        return hidden, torch.ones_like(mask), adapters

    patch.setattr(stages, "_question_states", seen)


def base_heads(patch: pytest.MonkeyPatch, case: Case) -> None:
    fold = bank.fold_package

    def folded(package: Any, dims: Any, dtype: torch.dtype) -> Any:
        adapter = fold(package, dims, dtype)
        kept = {name: tensor for name, tensor in adapter.tensors.items() if name not in dims.head_shapes()}
        return dataclasses.replace(adapter, tensors=kept)

    patch.setattr(bank, "fold_package", folded)


def visual_eps(patch: pytest.MonkeyPatch, case: Case) -> None:
    read = convert._vision_config
    patch.setattr(convert, "_vision_config", lambda *args: read(*args).model_copy(update={"norm_eps": 1e-5}))


def text_eps(patch: pytest.MonkeyPatch, case: Case) -> None:
    read = convert._text_config
    patch.setattr(convert, "_text_config", lambda *args: read(*args).model_copy(update={"norm_eps": 1e-5}))


def newer_stop_test(patch: pytest.MonkeyPatch, case: Case) -> None:
    check = decoding.Beams.check_done
    patch.setattr(decoding.Beams, "check_done", lambda self, best, length: check(self, best, length + 1))


def first_row_for_all(patch: pytest.MonkeyPatch, case: Case) -> None:
    from adapters.families.base import UniformAdaptation
    from service.bank import BatchLeases

    def adaptation(self: BatchLeases, digest_of_row: Any) -> Adaptation:
        return UniformAdaptation(next(iter(self._leases.values())).view)

    patch.setattr(BatchLeases, "adaptation", adaptation)


FRAMES = "frame weights (video_retrieval itm_logits)"
MUTATIONS = (
    Mutation("adapter without layer_norm_before", "the LayerNorm before `down` is left out", no_norm_before),
    Mutation("adapter GELU instead of ReLU", "GELU in the bottleneck", gelu_in_adapter),
    Mutation("no cross_modal layer norm", "0.1 times the sum instead of its LayerNorm", no_cross_norm),
    Mutation(
        "scale before the cross-modal norm",
        "0.1 goes into the up-projections, where the norm undoes it",
        scale_before_cross_norm,
    ),
    Mutation("multimodal without shared up_proj", "`multi_up` alone in the cross term", no_shared_up),
    Mutation("query residual missing", "the query term is zero", no_query_residual),
    Mutation(
        "query residual after cross-attention",
        "the query term reads what the cross term reads",
        query_residual_after_cross,
    ),
    Mutation("key/value adapter with ReLU", "ReLU in the key/value bottleneck", memory_with_relu),
    Mutation("key/value adapter unscaled", "the learnable scale counts as 1", memory_unscaled),
    Mutation(
        "decoder uses adapters_dec",
        "the decoder's unused adapter list serves the decoder",
        decoder_uses_unused_adapters,
    ),
    Mutation("loss without label smoothing", "smoothing 0", no_smoothing),
    Mutation(
        f"{FRAMES}: frame CLS key scaled too", "the CLS key of a frame is scaled like its patches", cls_key_scaled_too
    ),
    Mutation(f"{FRAMES}: no division by 4", "softmax of the similarities themselves", no_temperature),
    Mutation(f"{FRAMES}: no multiplication by T", "softmax weights of mean 1/T", no_number_of_frames),
    Mutation(f"{FRAMES}: values scaled too", "values are scaled like keys", values_scaled_too),
    Mutation(
        f"{FRAMES}: scaled before the key adapter is added",
        "keys are scaled, then the key term added",
        scaled_before_key_adapter,
    ),
    Mutation(f"{FRAMES}: no frame weight", "all factors are 1", no_frame_weight),
    Mutation(f"{FRAMES}: no kv adapter", "the key/value terms are left out", no_memory),
    Mutation("all-ones mask over texts in a padded batch", "padding of texts and questions is seen", text_mask_of_ones),
    Mutation("all-ones mask over clips in a padded batch", "padding of shorter clips is seen", memory_mask_of_ones),
    Mutation("decoder sees question padding", "all-ones question mask in the decoder", decoder_sees_question_padding),
    Mutation("base heads instead of tuned ones", "a package's heads are dropped", base_heads),
    Mutation("one adapter for the whole batch", "every row uses the first row's slot", first_row_for_all),
    Mutation("LayerNorm eps, visual", "1e-5 instead of 1e-6", visual_eps),
    Mutation("LayerNorm eps, text and decoder", "1e-5 instead of 1e-12", text_eps),
    Mutation("LayerNorm eps, adapter before", "1e-12 instead of 1e-5", eps_before),
    Mutation("LayerNorm eps, adapter cross-modal", "1e-12 instead of 1e-5", eps_cross),
    Mutation(
        "beam search's stop test of newer transformers",
        "running sum divided by the length after the token",
        newer_stop_test,
    ),
)
NOT_MUTATED = (
    "generate with the real question mask",  # that is what we do; the `_alone` outputs say it is right
    f"{FRAMES}: frame factor range",  # a description, no detail
)


def details(sensitivity: Mapping[str, Any]) -> list[str]:
    """The details a set says its outputs are sensitive to."""
    found = []
    for name, effect in sensitivity.items():
        is_group = name == FRAMES
        found += [f"{name}: {detail}" for detail in effect] if is_group else [name]
    return found


def run(mutation: Mutation, cases: Iterable[Case], *, stop_at_first: bool = False) -> Outcome:
    """Serve the cases with one detail broken."""
    count, failed = 0, []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, quiet():
            mutation.apply(patch, case)
            found = Claims(serve(case, Path(folder))).all()
        count += len(found)
        failed += [(case.name, comparison) for comparison in found if not comparison.holds]
        if failed and stop_at_first:
            break
    return Outcome(mutation, count, tuple(failed))


def default_cases() -> list[Case]:
    """The cases in this repository, whatever `PARITY_DATA` says."""
    return [case for folder in find_sets("uniadapter", DATA) for case in read_set(folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/parity.md")
    arguments = parser.parse_args()
    cases = default_cases()
    outcomes = [run(mutation, cases) for mutation in MUTATIONS]
    text = table(outcomes)
    print(text)
    if arguments.write:
        write(text, "mutations")
    if not all(outcome.failed for outcome in outcomes):
        raise SystemExit("a mutation went unnoticed")


if __name__ == "__main__":
    main()
