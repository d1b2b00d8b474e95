"""Every recorded quantity by the plain reference, padding seen: what `synthetic` writes, and a check of the reference."""

from functools import cache

import torch
from torch import Tensor

from tests.parity.epalm import reference as plain
from tests.parity.epalm.cases import Case, Quantity
from tests.parity.epalm.reference import Ranking, Read, Reference, Written


@cache
def tokens_of(case: Case) -> Tensor:
    """First tokens [blocks, S, d] of a case's samples, by the library's encoder."""
    return plain.first_tokens(case.encoder, case.samples)


class Recorded:
    """The recorded outputs of one case, in the layout they were recorded in. A method per kind of quantity."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.reference = Reference(
            case.language_model,
            case.document["model"],
            case.document["config"],
            pad=case.special_ids["pad"],
            eos=case.special_ids["eos"],
            leaks_padding=True,
        )
        self._reads: dict[tuple[str, bool], Read] = {}
        self._written: dict[tuple[str, int], list[Written]] = {}
        self._ranked: dict[str, Ranking] = {}

    @torch.no_grad()
    def get(self, quantity: Quantity) -> Tensor:
        """One output."""
        return getattr(self, quantity.kind)(quantity)  # type: ignore[no-any-return]

    def _samples(self, group: str) -> list[int]:
        """Which samples a group's rows are about."""
        return [text.sample for text in self.case.texts(group)]

    def cls(self, quantity: Quantity) -> Tensor:
        return self.reference.perceived(tokens_of(self.case))[:, self._samples(quantity.texts)]

    def connector(self, quantity: Quantity) -> Tensor:
        return self.reference.connected(self.cls(quantity))

    def _read(self, quantity: Quantity, *, is_training: bool) -> Read:
        key = quantity.texts, is_training
        if key not in self._reads:
            ids, mask = self.case.padded(quantity.texts, is_training=is_training)
            self._reads[key] = self.reference.read(ids, mask, self.connector(quantity))
        return self._reads[key]

    def layer_input(self, quantity: Quantity) -> Tensor:
        return self._read(quantity, is_training=False).inputs[quantity.parameters["layer"]]

    def logits(self, quantity: Quantity) -> Tensor:
        return self._read(quantity, is_training=False).logits

    def train_logits(self, quantity: Quantity) -> Tensor:
        return self._read(quantity, is_training=True).logits

    def _losses(self, quantity: Quantity) -> tuple[Tensor, Tensor]:
        labels = self.case.tensors[f"{quantity.texts}.train_labels"]
        return self.reference.losses(self.train_logits(quantity), labels), labels[:, 1:] >= 0

    def loss_sum(self, quantity: Quantity) -> Tensor:
        return self._losses(quantity)[0].sum(dim=1)

    def loss_mean(self, quantity: Quantity) -> Tensor:
        losses, is_target = self._losses(quantity)
        return (losses.sum() / is_target.sum())[None]

    def _write(self, quantity: Quantity) -> list[Written]:
        key = quantity.texts, quantity.num_beams
        if key not in self._written:
            values, found = self.connector(quantity), []
            rows = zip(*self.case.padded(quantity.texts, is_training=False), strict=True)
            for row, (ids, mask) in enumerate(rows):
                own, length = values[:, row], self.case.max_length
                if quantity.num_beams == 1:
                    found.append(self.reference.greedy(ids, mask, own, length))
                else:
                    found.append(self.reference.beams(ids, mask, own, quantity.num_beams, length))
            self._written[key] = found
        return self._written[key]

    def sequences(self, quantity: Quantity) -> Tensor:
        ids = [written.ids for written in self._write(quantity)]
        longest = max(map(len, ids))
        return torch.tensor([[*own, *[self.case.special_ids["pad"]] * (longest - len(own))] for own in ids])

    def score(self, quantity: Quantity) -> Tensor:
        return torch.tensor([written.score for written in self._write(quantity)])

    def _rank(self, quantity: Quantity) -> Ranking:
        if quantity.texts not in self._ranked:
            sample = int(quantity.texts[1:])
            self._ranked[quantity.texts] = self.reference.rank(
                self.case.question_of(self.case.texts(quantity.texts)[0]),
                self.reference.connected(self.reference.perceived(tokens_of(self.case)[:, [sample]]))[:, 0],
                self.case.candidates,
                self.case.num_ranked,
                width=self.case.tensors["rank.answer_ids"].shape[1],
            )
        return self._ranked[quantity.texts]

    def rank_ids(self, quantity: Quantity) -> Tensor:
        return torch.tensor([self._rank(quantity).indices])

    def rank_probs(self, quantity: Quantity) -> Tensor:
        return self._rank(quantity).probs[None]


@cache
def recorded_of(case: Case) -> Recorded:
    """Made once for a case, whatever it is compared with."""
    return Recorded(case)
