"""What was served beside what was recorded: a method per kind of quantity, and the rows beside next to the reference.

Where padding leaked into what was recorded, the plain reference that sees padding must give the record, and ours what the
reference without padding gives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adapters.config import BASE_ADAPTER
from tests.parity.epalm.cases import Case, Quantity, Text
from tests.parity.epalm.recorded import recorded_of, tokens_of
from tests.parity.epalm.reference import Ranking, Read, Reference, Written
from tests.parity.epalm.serving import MADE_UP, Adapter, Asked, Scored, World
from tests.parity.sets import Comparison, compare

NEAR_TIE = 1e-4  # below this gap a choice may fall either way
COST = {"rank_ids": 1, "rank_probs": 1, "sequences": 2, "score": 2}


@dataclass(frozen=True, eq=False)
class Alone:
    """One row by the plain reference, alone and unpadded. Everything is made when first asked for."""

    adapter: Adapter
    text: Text
    has_medium: bool

    @cached_property
    def reference(self) -> Reference:
        return self.adapter.reference()

    @cached_property
    def features(self) -> Tensor | None:
        """[n, d]."""
        if not self.has_medium or self.adapter.settings is None:
            return None
        return self.reference.perceived(tokens_of(self.adapter.case)[:, self.text.sample])

    @cached_property
    def values(self) -> Tensor | None:
        """[n, D]."""
        return None if self.features is None else self.reference.connected(self.features)

    @cached_property
    def read(self) -> Read:
        ids = torch.tensor([self.text.ids])
        return self.reference.read(ids, torch.ones_like(ids), None if self.values is None else self.values[:, None])

    def written(self, num_beams: int) -> Written:
        if num_beams not in self._written:
            self._written[num_beams] = self._write(num_beams)
        return self._written[num_beams]

    @cached_property
    def _written(self) -> dict[int, Written]:
        return {}

    def _write(self, num_beams: int) -> Written:
        ids = torch.tensor(self.text.ids)
        length = self.adapter.case.max_length
        if num_beams == 1:
            return self.reference.greedy(ids, torch.ones_like(ids), self.values, length)
        return self.reference.beams(ids, torch.ones_like(ids), self.values, num_beams, length)

    def ranked(self, case: Case, question: tuple[int, ...]) -> Ranking:
        width = max(map(len, case.candidates))
        return self.reference.rank(question, self.values, case.candidates, case.num_ranked, width=width)


_alone: dict[tuple[str, str, Text, bool], Alone] = {}
_results: dict[tuple[Alone, object], Tensor] = {}


def alone(row: Asked) -> Alone:
    """The row by the reference: made once, whatever it is compared with."""
    adapter = row.adapter
    key = f"{adapter.case.label} {adapter.case.language_model} {adapter.name}", row.group, row.text, row.has_medium
    return _alone.setdefault(key, Alone(adapter, row.text, row.has_medium))


class Claims:
    """The comparisons of one case of a world."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case = world, case

    def of(self, name: str) -> list[Comparison]:
        """Every comparison with one recorded output."""
        quantity = self.case.claimed[name]
        recorded, atol = self.case.tensors[name], self.case.tolerance(quantity)
        rows = self._rows(quantity)
        assert rows, f"nothing was compared with {name}"
        if not quantity.is_padded:
            (row,) = rows
            expected = recorded[:, 0] if quantity.kind in ("cls", "connector") else recorded[0]
            return [compare(name, self._ours(row, quantity), expected, atol, 0.0), *self._again(name, row, quantity)]
        theirs = recorded_of(self.case).get(quantity)
        found = [compare(f"{name} (reference, padding seen)", theirs, recorded, atol, 0.0)]
        for row in rows:
            found += self._beside_reference(f"{name} ({row.text.sample})", row, quantity, atol)
        return found

    def _again(self, name: str, row: Asked, quantity: Quantity) -> Iterator[Comparison]:
        """The same by another path of ours."""
        atol = self.case.tolerance(quantity)
        if quantity.kind in ("logits", "train_logits"):
            expected = self.case.tensors[name][0, -len(row.text.ids) :]
            yield compare(f"{name} (text)", self._scored(row, quantity).text_logits, expected, atol, 0.0)
        if quantity.kind in ("sequences", "score"):
            first = self.world.generated(quantity.num_beams, self.case)[row].hypotheses[0]
            found = torch.tensor(first.ids if quantity.kind == "sequences" else first.score)
            yield compare(f"{name} (own batch)", found, self.case.tensors[name][0], atol, 0.0)
        if quantity.kind == "loss_sum" and row.text.labels == row.text.ids:
            trained = self.world.training_losses(self.case)[row]
            yield compare(f"{name} (training)", trained, self.case.tensors[name][0], atol, 0.0)

    def all(self, costs: Sequence[int] = (0, 1, 2)) -> Iterator[Comparison]:
        """Every comparison of the case, those of the rows beside included; the cheap ones first, or those alone."""
        claimed = self.case.claimed
        for cost in costs:
            for name in self.case.names:
                if name in claimed and COST.get(claimed[name].kind, 0) == cost:
                    yield from self.of(name)
            yield from self.beside(cost)

    def _rows(self, quantity: Quantity) -> list[Asked]:
        """The served rows of what was recorded."""
        is_training = quantity.kind in ("train_logits", "loss_sum", "loss_mean")
        rows = self.world.rows(is_training=is_training)
        return [row for row in rows if row.adapter.name == self.case.name and row.group == quantity.texts]

    # --- ours --------------------------------------------------------------------------------------------

    def _ours(self, row: Asked, quantity: Quantity) -> Tensor:
        return getattr(self, f"_{quantity.kind}")(row, quantity)  # type: ignore[no-any-return]

    def _scored(self, row: Asked, quantity: Quantity) -> Scored:
        is_training = quantity.kind in ("train_logits", "loss_sum", "loss_mean")
        return (self.world.trained if is_training else self.world.asked)[row]

    def _cls(self, row: Asked, quantity: Quantity) -> Tensor:
        schedule = row.adapter.slot.schedule
        assert schedule is not None
        return self.world.features[row.features_key][-schedule.num_features :]

    def _connector(self, row: Asked, quantity: Quantity) -> Tensor:
        values = self.world.asked[row].values
        assert values is not None
        return values

    def _layer_input(self, row: Asked, quantity: Quantity) -> Tensor:
        return self.world.asked[row].inputs[quantity.parameters["layer"]]

    def _logits(self, row: Asked, quantity: Quantity) -> Tensor:
        return self.world.asked[row].logits

    def _train_logits(self, row: Asked, quantity: Quantity) -> Tensor:
        return self.world.trained[row].logits

    def _loss_sum(self, row: Asked, quantity: Quantity) -> Tensor:
        return _loss(self.world.trained[row].text_logits, row.text, "sum")

    def _loss_mean(self, row: Asked, quantity: Quantity) -> Tensor:
        return _loss(self.world.trained[row].text_logits, row.text, "mean")

    def _sequences(self, row: Asked, quantity: Quantity) -> Tensor:
        return torch.tensor(self.world.generated(quantity.num_beams)[row].hypotheses[0].ids)

    def _score(self, row: Asked, quantity: Quantity) -> Tensor:
        return torch.tensor(self.world.generated(quantity.num_beams)[row].hypotheses[0].score)

    def _ranking(self, row: Asked) -> tuple[Tensor, Tensor]:
        """Indices and probabilities, the likeliest first."""
        output = self.world.ranked[row]
        probs = torch.softmax(torch.tensor(output.scores), dim=0)
        order = probs.sort(descending=True, stable=True).indices
        assert order[0] == output.best
        return torch.tensor(output.indices)[order], probs[order]

    def _rank_ids(self, row: Asked, quantity: Quantity) -> Tensor:
        return self._ranking(row)[0]

    def _rank_probs(self, row: Asked, quantity: Quantity) -> Tensor:
        return self._ranking(row)[1]

    # --- beside the reference ----------------------------------------------------------------------------

    def _plain(self, row: Asked, quantity: Quantity) -> Tensor:
        """The same quantity of one row by the reference, alone."""
        own = alone(row)
        key = own, (quantity.kind, *quantity.parameters.items())
        if key not in _results:
            _results[key] = self._by_reference(own, row, quantity)
        return _results[key]

    @torch.no_grad()
    def _by_reference(self, own: Alone, row: Asked, quantity: Quantity) -> Tensor:
        match quantity.kind:
            case "cls":
                assert own.features is not None
                return own.features
            case "connector":
                assert own.values is not None
                return own.values
            case "layer_input":
                return own.read.inputs[quantity.parameters["layer"]][0]
            case "logits" | "train_logits":
                return own.read.logits[0]
            case "loss_sum" | "loss_mean":
                labels = torch.tensor([row.text.labels])
                total = own.reference.losses(own.read.logits, labels).sum()
                return total / (labels[:, 1:] >= 0).sum() if quantity.kind == "loss_mean" else total
            case "sequences" | "score":
                written = own.written(quantity.num_beams)
                return torch.tensor(written.ids if quantity.kind == "sequences" else written.score)
            case "rank_ids" | "rank_probs":
                ranking = own.ranked(self.world.rankable[row], self.world.ranked_question(row))
                return torch.tensor(ranking.indices) if quantity.kind == "rank_ids" else ranking.probs
        raise AssertionError(quantity.kind)

    def _beside_reference(self, label: str, row: Asked, quantity: Quantity, atol: float) -> Iterator[Comparison]:
        """Ours next to the reference; not where a choice that led there was a near tie."""
        if quantity.kind in ("sequences", "score") and self.world.generated(quantity.num_beams)[row].gap < NEAR_TIE:
            return
        found = compare(label, self._ours(row, quantity), self._plain(row, quantity), atol, 0.0)
        yield replace(found, is_recorded=False)

    def beside(self, cost: int | None = None) -> Iterator[Comparison]:
        """The rows that shared the case's batches and were recorded by nobody, next to the reference."""
        for is_training in (False, True):
            for row in self.world.rows(is_training=is_training):
                if row.group or not self._is_ours(row):
                    continue
                label = f"{row.adapter.name}{'' if row.has_medium else ', no medium'}"
                for quantity in self._beside_quantities(row, is_training=is_training):
                    if cost is None or COST.get(quantity.kind, 0) == cost:
                        atol = self.case.tolerance(quantity)
                        yield from self._beside_reference(f"{label}: {quantity.kind}", row, quantity, atol)

    def _is_ours(self, row: Asked) -> bool:
        """Rows of nobody's case belong to the first."""
        is_first = self.case is self.world.cases[0]
        return row.adapter.name == self.case.name or (is_first and row.adapter.name in (MADE_UP, BASE_ADAPTER))

    def _beside_quantities(self, row: Asked, *, is_training: bool) -> Iterator[Quantity]:
        if is_training:
            yield Quantity("", "train_logits")
            yield Quantity("", "loss_sum")
            return
        if row.has_medium and row.adapter.slot.schedule is not None:
            yield Quantity("", "connector")
        for layer in range(self.world.dims.layers):
            yield Quantity("", "layer_input", {"layer": layer})
        yield Quantity("", "logits")
        if row in self.world.rankable:
            yield Quantity("", "rank_ids")
            yield Quantity("", "rank_probs")
        for beams in sorted({q.num_beams for q in self.case.claimed.values() if q.kind == "sequences"}):
            yield Quantity("", "sequences", {"beams": beams})
            if beams > 1:
                yield Quantity("", "score", {"beams": beams})


def _loss(text_logits: Tensor, text: Text, reduction: str) -> Tensor:
    """Of the targets behind the first token."""
    targets = torch.tensor(text.labels[1:])
    return torch.nn.functional.cross_entropy(text_logits[:-1], targets, reduction=reduction)
