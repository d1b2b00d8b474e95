"""One detail of eP-ALM broken at a time, to see that the comparisons notice.

    python -m tests.parity.epalm.mutations              prints the table
    python -m tests.parity.epalm.mutations --write      and puts it into docs/parity.md

Each mutation patches our code, serves every case anew and counts the comparisons that fail.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.base import NOTHING, Injection, Prompt, Schedule
from adapters.families.epalm import PROMPT, EPalm, options_of
from service.backbone import decoding, opt_answers
from service.backbone.decoding import Beams, Start
from service.backbone.opt import EXTRA, Columns, Decoding, ExtraToken, LanguageModel, Opt
from tests.parity.epalm.cases import Case, read_sets
from tests.parity.epalm.claims import Claims
from tests.parity.epalm.serving import make_worlds
from tests.parity.outcomes import Mutation, Outcome, quiet, table, write
from tests.parity.sets import DATA, Comparison

NAME = "epalm mutations"
Patch = pytest.MonkeyPatch


# --- the extra token -------------------------------------------------------------------------------------


def causal_extra(patch: Patch) -> None:
    mask = Columns.mask

    def causal(self: Columns, layer: int, end: int | None = None) -> Tensor:
        seen = mask(self, layer, end).clone()
        seen[:, :, EXTRA, 1:] = False
        return seen

    patch.setattr(Columns, "mask", causal)


def unseen_extra(patch: Patch) -> None:
    mask = Columns.mask

    def unseen(self: Columns, layer: int, end: int | None = None) -> Tensor:
        seen = mask(self, layer, end).clone()
        seen[:, :, 1:, EXTRA] = False
        return seen

    patch.setattr(Columns, "mask", unseen)


def extra_sees_padding(patch: Patch) -> None:
    mask = Columns.mask

    def leaking(self: Columns, layer: int, end: int | None = None) -> Tensor:
        seen = mask(self, layer, end).clone()
        seen[:, :, EXTRA, 1:] = True
        return seen

    patch.setattr(Columns, "mask", leaking)


def padding_seen(patch: Patch) -> None:
    of = Columns.__init__

    def seeing(self: Columns, seen: Tensor, extra: ExtraToken | None) -> None:
        of(self, functional.pad(torch.ones_like(seen[:, 1:]), (1, 0), value=False), extra)

    patch.setattr(Columns, "__init__", seeing)


def stale_extra(patch: Patch) -> None:
    """Keys and values of the extra token behind the window are those of the question, whatever follows."""

    def append(self: Decoding, tail: int, x: Tensor, new: int, *, everything: bool) -> Tensor:
        model, columns, end = self.model, self.columns, self.end
        assert self._inputs is not None
        x = columns.enter(tail - 1, functional.pad(x, (0, 0, 1, 0)))
        x = columns.enter(tail, self._append_layer(tail - 1, x, new))
        layer = model.layer(tail)
        qkv = layer.project(x)
        q, (keys, values) = qkv[0], self._keep(tail, qkv, new)
        self._inputs[:, end - new : end] = x[:, 1:]
        if not everything:
            return layer.finish(x[:, 1:], q[:, :, 1:], keys, values, self._mask(tail, new, new))
        whole = self._inputs[:, :end]
        return model.run(
            layer.finish(whole, layer.project(whole)[0], keys, values, columns.mask(tail, end)), columns, tail + 1
        )

    patch.setattr(Decoding, "_append_tail", append)


# --- the schedule ----------------------------------------------------------------------------------------


def _reschedule(patch: Patch, change: Any) -> None:
    schedule = EPalm.schedule

    def changed(self: EPalm, config: Any, dims: Any) -> Schedule:
        own = schedule(self, config, dims)
        return Schedule(own.num_features, tuple(change(own, options_of(config))))

    patch.setattr(EPalm, "schedule", changed)


def last_features(patch: Patch) -> None:
    def change(own: Schedule, options: Any) -> Iterable[int]:
        left = max(0, own.num_features - (options.end_layer_idx - options.start_layer_idx))
        return (feature if feature == NOTHING else feature + left for feature in own.layers)

    _reschedule(patch, change)


def one_layer_later(patch: Patch) -> None:
    _reschedule(patch, lambda own, options: (NOTHING, *own.layers[:-1]))


def once(patch: Patch) -> None:
    def change(own: Schedule, options: Any) -> Iterable[int]:
        return (feature if layer == own.first else NOTHING for layer, feature in enumerate(own.layers))

    _reschedule(patch, change)


def step_in_window(patch: Patch) -> None:
    def change(own: Schedule, options: Any) -> Iterable[int]:
        start, n = options.start_layer_idx, own.num_features
        window = options.end_layer_idx - start
        step = window // n if n > 1 and window > n else 1
        text_step = max(step, options.text_step) if options.select_higher_step else options.text_step
        for layer in range(len(own.layers)):
            is_in = start <= layer < options.end_layer_idx and (layer - start) % text_step == 0
            yield (min((layer - start) // step, n - 1) if n > 1 else 0) if is_in else NOTHING

    _reschedule(patch, change)


def one_schedule(patch: Patch) -> None:
    of = ExtraToken.of.__func__  # type: ignore[attr-defined]  # a class method

    def made(cls: type[ExtraToken], injection: Injection, num_layers: int) -> ExtraToken:
        first = next(schedule for schedule in injection.schedules if schedule is not None)
        same = tuple(None if schedule is None else first for schedule in injection.schedules)
        return of(cls, replace(injection, schedules=same), num_layers)  # type: ignore[no-any-return]

    patch.setattr(ExtraToken, "of", classmethod(made))


# --- features and prompts --------------------------------------------------------------------------------


def features_reversed(patch: Patch) -> None:
    inject = EPalm.inject

    def reversed_(self: EPalm, features: Tensor, slot: Any, schedule: Schedule) -> Tensor:
        before, own = features.split([features.shape[1] - schedule.num_features, schedule.num_features], dim=1)
        return inject(self, torch.cat([before, own.flip(1)], dim=1), slot, schedule)

    patch.setattr(EPalm, "inject", reversed_)


def _perceive(patch: Patch, change: Any) -> None:
    perceive = Opt.perceive
    patch.setattr(Opt, "perceive", lambda self, encoder, inputs: change(perceive, self, encoder, inputs))


def swapped_sample(patch: Patch) -> None:
    _perceive(patch, lambda perceive, model, encoder, inputs: perceive(model, encoder, inputs).roll(1, 0))


def no_final_norm(patch: Patch) -> None:
    def raw(perceive: Any, model: Opt, encoder: str, inputs: Tensor) -> Tensor:
        part = model.encoder(encoder)
        norm, part.norm = part.norm, nn.Identity()  # type: ignore[assignment]
        try:
            found: Tensor = perceive(model, encoder, inputs)
            return found
        finally:
            part.norm = norm

    _perceive(patch, raw)


def prompt_has_positions(patch: Patch) -> None:
    arrange = LanguageModel.arrange

    def shifted(
        self: LanguageModel, ids: Tensor, mask: Tensor, prompt: Prompt | None, injection: Injection | None
    ) -> tuple[Tensor, Columns]:
        x, columns = arrange(self, ids, mask, prompt, injection)
        if prompt is None:
            return x, columns
        table = self.positions.weight
        size, text = prompt.embeddings.shape[1], ids.shape[1]
        for row, length in enumerate(prompt.lengths):
            x[row, 1 : 1 + length] += table[2 : 2 + length]
            x[row, 1 + size :] += table[2 + length : 2 + length + text] - table[2 : 2 + text]
        return x, columns

    patch.setattr(LanguageModel, "arrange", shifted)


def prompt_without_network(patch: Patch) -> None:
    fold = EPalm.fold

    def folded(self: EPalm, config: Any, tensors: Any, dims: Any) -> dict[str, Tensor]:
        slot = fold(self, config, tensors, dims)
        return slot | ({"prompt": tensors[f"{PROMPT}.0.weight"]} if "prompt" in slot else {})

    patch.setattr(EPalm, "fold", folded)


# --- searching and ranking -------------------------------------------------------------------------------


def generated_length(patch: Patch) -> None:
    """As newer releases of the library do: the question's length does not count, the end token's does."""

    @dataclass
    class ByGenerated(Beams):
        before: int = 0

        def keep(self, ids: tuple[int, ...], total: float, length: int) -> None:
            super().keep(ids, total, length - self.before + 1)

        def check_done(self, best_total: float, length: int) -> None:
            super().check_done(best_total, length - self.before + 1)

    search_of = decoding.Search.of

    def searched(start: Start, num_beams: int) -> decoding.Search:
        search = search_of(start, num_beams)
        search.state = ByGenerated(num_beams, before=len(start.ids))
        return search

    patch.setattr(decoding.Search, "of", searched)


def answers_alone(patch: Patch) -> None:
    """The answer's start token, in the middle of question and answer, is not read."""
    behind, along = opt_answers._score_behind_questions, opt_answers._score_with_questions

    def without_start(texts: Any) -> list[tuple[int, ...]]:
        return [text[1:] for text in texts]

    patch.setattr(opt_answers, "_score_behind_questions", lambda *given: behind(*given[:-1], without_start(given[-1])))
    patch.setattr(opt_answers, "_score_with_questions", lambda *given: along(*given[:-1], without_start(given[-1])))


MUTATIONS = (
    Mutation("causal_extra", "the extra token sees itself alone", causal_extra),
    Mutation("last", "the last features instead of the first, where the window is short", last_features),
    Mutation("shift", "injected one layer later", one_layer_later),
    Mutation("once", "injected at the first layer alone, then left to itself", once),
    Mutation("prompt_pos", "the prompt has positions, the text's follow them", prompt_has_positions),
    Mutation("cls_without_final_norm", "block outputs as they are", no_final_norm),
    Mutation("features_reversed", "the deepest feature first", features_reversed),
    Mutation("swapped_sample", "another sample's features", swapped_sample),
    Mutation("extra token unseen", "prompt and text do not see it", unseen_extra),
    Mutation("extra token sees padding", "as in the authors' padded batches", extra_sees_padding),
    Mutation("padding seen by all", "all-ones mask over texts and prompts in a padded batch", padding_seen),
    Mutation("stale extra keys and values", "behind the window they stay those of the question", stale_extra),
    Mutation("text_step counts from the window", "by the place in the window, not the layer's number", step_in_window),
    Mutation("one schedule for the whole batch", "every row takes the first one's", one_schedule),
    Mutation("prompt without its network", "the table itself stands before the text", prompt_without_network),
    Mutation("beams by generated length", "the question's length does not count in a beam's score", generated_length),
    Mutation("ranking without the answer's start", "the start token in the middle is left out", answers_alone),
)
NO_CHANGE = Mutation("none", "nothing", lambda patch: None)
NOT_MUTATED = (
    "encoder_eps_1e-12",  # below every tolerance; tests/service/backbone/test_convert_opt.py has the rule
    "padded_batch_vs_single_text_rows",  # this and what follows describe the reference
    "batch_extra_token_ignoring_padding",
    "leak_of_last_token_into_earlier_text_rows",
    "max_abs_logit",
)


def run(mutation: Mutation, cases: Sequence[Case], *, stop_at_first: bool = False) -> Outcome:
    """Serve the cases with one detail broken."""
    count, failed = 0, []
    with pytest.MonkeyPatch.context() as patch, quiet():
        mutation.apply(patch)
        for case, comparison in _comparisons(cases):
            if "(reference" in comparison.name:  # not ours
                continue
            count += 1
            if not comparison.holds:
                failed.append((case.name, comparison))
                if stop_at_first:
                    break
    return Outcome(mutation, count, tuple(failed))


def _comparisons(cases: Sequence[Case]) -> Iterator[tuple[Case, Comparison]]:
    """Of all cases, the cheap ones of all first."""
    worlds = make_worlds(cases)
    for cost in (0, 1, 2):
        for world in worlds:
            for case in world.cases:
                yield from ((case, comparison) for comparison in Claims(world, case).all([cost]))


def default_cases() -> list[Case]:
    """The cases in this repository, whatever `PARITY_DATA` says."""
    return read_sets(DATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/parity.md")
    arguments = parser.parse_args()
    cases = default_cases()
    assert not run(NO_CHANGE, cases).failed, "something fails without a change"
    outcomes = []
    for mutation in MUTATIONS:
        outcomes.append(run(mutation, cases))
        print(f"{mutation.detail}: {len(outcomes[-1].failed)} of {outcomes[-1].num_comparisons}", flush=True)
    text = table(outcomes)
    print(text)
    if not all(outcome.failed for outcome in outcomes):
        raise SystemExit("a mutation went unnoticed")
    if arguments.write:
        write(text, NAME)


if __name__ == "__main__":
    main()
