"""Answers of a BLIP's decoder: generated, or chosen among given ones. Source: UniAdapter's `models/blip_vqa.py`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.families.base import Adaptation, join_adaptations
from adapters.training.losses import shifted_nll
from service.backbone.blip import Blip, Decoder, Memory
from service.backbone.decoding import KeepGoing, Start, Writing, pad_ids, shortlist, write_all
from service.types import GenerateOutput, RankOutput

MAX_CANDIDATE_ROWS = 256


def _decoder(model: Blip) -> Decoder:
    assert model.decoder is not None, "the caller checked that there is a decoder. This is a bug."
    return model.decoder


class BlipSteps:
    """Answers of a BLIP's decoder, each from [DEC] on, about what is in its row of the memory."""

    def __init__(
        self, model: Blip, memory: Memory, num_questions: int, adaptation: Adaptation | None, *, max_length: int
    ) -> None:
        """`memory` and `adaptation` have a row per question."""
        self._decoder = _decoder(model)
        self._memory = memory
        self._of_text = adaptation
        self._adaptation = adaptation
        self._num_texts, self._rows_per_text = num_questions, 1
        self._cache = self._decoder.body.new_cache(num_questions, max_length)
        start = torch.full((num_questions,), model.config.special_ids.bos, dtype=torch.long, device=model.device)
        self._logits = self.step(start)

    def logits(self) -> Tensor:
        """See Steps."""
        return self._logits

    def step(self, ids: Tensor) -> Tensor:
        """See Steps."""
        self._logits = self._decoder.step(ids, self._cache, self._memory, self._adaptation)
        return self._logits

    def select(self, rows: Tensor, rows_per_text: int) -> None:
        """See Steps. A text's rows share its row of the memory."""
        self._cache.select(rows)
        texts = rows[::rows_per_text] // self._rows_per_text
        is_same = len(texts) == self._num_texts and bool((texts[1:] == texts[:-1] + 1).all())
        if not is_same:
            self._memory = self._memory.select(texts)
            self._of_text = None if self._of_text is None else self._of_text.expand(texts)
        if not is_same or rows_per_text != self._rows_per_text:
            self._num_texts, self._rows_per_text = len(texts), rows_per_text
            self._adapt_rows()

    def _adapt_rows(self) -> None:
        if self._of_text is not None:
            texts = torch.arange(self._num_texts).repeat_interleave(self._rows_per_text)
            self._adaptation = self._of_text.expand(texts)

    def can_join(self, other: "BlipSteps") -> bool:
        """See Steps."""
        return other._decoder is self._decoder

    def join(self, other: "BlipSteps") -> None:
        """See Steps."""
        self._cache.join(other._cache)
        self._memory = self._memory.join(other._memory)
        self._of_text = join_adaptations(self._of_text, self._num_texts, other._of_text, other._num_texts)
        self._num_texts += other._num_texts
        self._adapt_rows()


def begin_answers(
    model: Blip, memory: Memory, num_questions: int, adaptation: Adaptation | None, *, num_beams: int, max_length: int
) -> Writing:
    """Answers of `num_questions` questions whose states are in `memory`; `adaptation` has one row per question.

    Sequences hold [DEC], at most `max_length` ids in all, and [SEP] where it was reached.
    """
    special = model.config.special_ids
    steps = BlipSteps(model, memory, num_questions, adaptation, max_length=max_length)
    starts = [Start((special.bos,), max_length)] * num_questions
    return Writing(steps, starts, num_beams=num_beams, end=special.sep)


def beam_search(
    model: Blip,
    memory: Memory,
    num_questions: int,
    adaptation: Adaptation | None,
    *,
    num_beams: int,
    max_length: int,
    keep_going: KeepGoing = lambda: True,
) -> list[GenerateOutput]:
    """What `begin_answers` begins, to its end."""
    writing = begin_answers(model, memory, num_questions, adaptation, num_beams=num_beams, max_length=max_length)
    return write_all(writing, keep_going)


def _read_by(memory: Memory, questions: Sequence[int], device: torch.device) -> Memory:
    """The memories of rows that belong to these questions, in ascending order: each question's is there once."""
    readers = Counter(questions)
    distinct = torch.tensor(list(readers), device=device)
    return replace(memory.select(distinct), readers=tuple(readers.values()))


def rank_answers(
    model: Blip,
    memory: Memory,
    adaptation: Adaptation | None,
    candidates: Sequence[Sequence[tuple[int, ...]]],
    ks: Sequence[int],
    *,
    keep_going: KeepGoing = lambda: True,
) -> list[RankOutput]:
    """The best of each question's candidates ([DEC] words [SEP]).

    A candidate's first word decides whether it is among the k looked at (ties: the lower index); those are scored by
    minus their label-smoothed loss, without length normalisation. `memory` and `adaptation` have a row per question.
    Once nobody wants to `keep_going`, what was not scored gets minus infinity.
    """
    decoder, special = _decoder(model), model.config.special_ids
    num_questions = len(candidates)
    steps = BlipSteps(model, memory, num_questions, adaptation, max_length=1)
    probs = steps.logits().float().softmax(-1).cpu()  # [Q, V]
    shortlists = [shortlist(probs[q], candidates[q], ks[q]) for q in range(num_questions)]
    pairs = [(q, index) for q in range(num_questions) for index in shortlists[q]]
    scores: list[float] = []
    for first in range(0, len(pairs), MAX_CANDIDATE_ROWS):
        if not keep_going():
            scores += [float("-inf")] * (len(pairs) - first)
            break
        part = pairs[first : first + MAX_CANDIDATE_ROWS]
        ids, mask = pad_ids([candidates[q][index] for q, index in part], special.pad, model.device)
        of_row = [q for q, _ in part]
        rows = None if adaptation is None else adaptation.expand(torch.tensor(of_row, device=model.device))
        logits = decoder.score(ids, mask, _read_by(memory, of_row, model.device), rows)
        scores += (-shifted_nll(logits, ids, mask)).tolist()
    outputs = []
    for q, chosen in enumerate(shortlists):
        own, scores = scores[: len(chosen)], scores[len(chosen) :]
        first_probs = tuple(float(probs[q, candidates[q][index][1]]) for index in chosen)
        best = max(range(len(own)), key=lambda place: (own[place], -chosen[place]))
        outputs.append(RankOutput(tuple(chosen), tuple(own), first_probs, best))
    return outputs
