"""Answers of a BLIP's decoder: generated, or chosen among given ones. Source: UniAdapter's `models/blip_vqa.py`."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.families.base import Adaptation, join_adaptations
from adapters.training.losses import word_nll
from service.backbone.blip import Blip, Decoder, Memory
from service.backbone.decoding import KeepGoing, Start, Steps, Writing, pad_ids, shortlist, write_all
from service.backbone.rows import told
from service.types import GenerateOutput, RankOutput

MAX_CANDIDATE_ROWS = 256


def _decoder(model: Blip) -> Decoder:
    assert model.decoder is not None, "the caller checked that there is a decoder. This is a bug."
    return model.decoder


class BlipSteps(Steps):
    """Answers of a BLIP's decoder, each from [DEC] on, about what is in its row of the memory.

    `cache` and what adapts them have a row for each of a text's rows, `memory` and `of_text` one for each text.
    """

    def __init__(
        self, model: Blip, memory: Memory, num_questions: int, adaptation: Adaptation | None, *, max_length: int
    ) -> None:
        """`memory` and `adaptation` have a row per question."""
        self.decoder = _decoder(model)
        self.memory = memory
        self.of_text = adaptation
        self._adaptation = adaptation
        self.num_texts, self.rows_per_text = num_questions, 1
        self.cache = self.decoder.body.new_cache(num_questions, max_length)
        start = torch.full((num_questions,), model.config.special_ids.bos, dtype=torch.long, device=model.device)
        self._logits = self.step(start)

    @property
    def device(self) -> torch.device:
        """See Steps."""
        return self._logits.device

    @property
    def num_rows(self) -> int:
        """See Steps."""
        return self.num_texts * self.rows_per_text

    def logits(self) -> Tensor:
        """See Steps."""
        return self._logits

    def step(self, ids: Tensor) -> Tensor:
        """See Steps."""
        self._logits = self.decoder.step(ids, self.cache, self.memory, self._adaptation)
        return self._logits

    def read_on(self, rows: Sequence[int], ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [N, V] behind every token, text by text, of texts ids [R, L], mask [R, L], that go on from these rows.

        `rows` ascend and leave none out between them. The rows stay as they are; each is still its text's only one.
        """
        index = torch.tensor(rows)
        adaptation = None if self._adaptation is None else self._adaptation.expand(index)
        cache = self.cache.fork(index.to(ids.device), ids.shape[1])
        return self.decoder.append(ids, mask, cache, _read_by(self.memory, rows), adaptation)

    def select(self, rows: Sequence[int], rows_per_text: int) -> None:
        """See Steps. A text's rows share its row of the memory."""
        device = self._logits.device
        self.cache.select(told(device, rows))
        texts = [row // self.rows_per_text for row in rows[::rows_per_text]]
        is_same = texts == list(range(self.num_texts))
        if not is_same:
            self.memory = self.memory.select(told(device, texts))
            self.of_text = None if self.of_text is None else self.of_text.expand(torch.tensor(texts))
        if not is_same or rows_per_text != self.rows_per_text:
            self.num_texts, self.rows_per_text = len(texts), rows_per_text
            self._adapt_rows()

    def _adapt_rows(self) -> None:
        if self.of_text is not None:
            texts = torch.arange(self.num_texts).repeat_interleave(self.rows_per_text)
            self._adaptation = self.of_text.expand(texts)

    def can_join(self, other: "BlipSteps") -> bool:
        """See Steps."""
        return other.decoder is self.decoder

    def join(self, other: "BlipSteps") -> None:
        """See Steps."""
        self.cache.join(other.cache)
        self.memory = self.memory.join(other.memory)
        self.of_text = join_adaptations(self.of_text, self.num_texts, other.of_text, other.num_texts)
        self.num_texts += other.num_texts
        self._adapt_rows()


def begin_answers(
    model: Blip,
    memory: Memory,
    num_questions: int,
    adaptation: Adaptation | None,
    *,
    num_beams: int,
    max_length: int,
    writer: Callable[[BlipSteps], Steps] = lambda steps: steps,
) -> Writing:
    """Answers of `num_questions` questions whose states are in `memory`; `adaptation` has one row per question.

    `writer` may put something in front of the steps that writes by them. Sequences hold [DEC], at most `max_length` ids in all, and [SEP] where it was reached.
    """
    special = model.config.special_ids
    steps = BlipSteps(model, memory, num_questions, adaptation, max_length=max_length)
    starts = [Start((special.bos,), max_length)] * num_questions
    return Writing(writer(steps), starts, num_beams=num_beams, end=special.sep)


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


def _read_by(memory: Memory, questions: Sequence[int]) -> Memory:
    """The memories of rows that belong to these questions, which ascend and leave none out: no copies."""
    own = slice(questions[0], questions[-1] + 1)
    readers = tuple(Counter(questions).values())
    return Memory([k[own] for k in memory.keys], [v[own] for v in memory.values], memory.mask[own], readers)


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

    All candidates of a question go on from its one [DEC]; nothing is computed behind their last token.
    """
    steps = BlipSteps(model, memory, len(candidates), adaptation, max_length=1)
    probs = steps.logits().float().softmax(-1).cpu()  # [Q, V]
    shortlists = [shortlist(probs[q], candidates[q], ks[q]) for q in range(len(candidates))]
    pairs = [(q, index) for q, chosen in enumerate(shortlists) for index in chosen]
    first_losses = _first_losses(
        steps.logits(), [[candidates[q][i][1] for i in own] for q, own in enumerate(shortlists)]
    )
    scores: list[float] = []
    for first in range(0, len(pairs), MAX_CANDIDATE_ROWS):
        if not keep_going():
            scores += [float("-inf")] * (len(pairs) - first)
            break
        part = pairs[first : first + MAX_CANDIDATE_ROWS]
        later_losses = _later_losses(steps, [q for q, _ in part], [candidates[q][index] for q, index in part])
        own_first = first_losses[first : first + len(part)]
        scores += [-(one + later) for one, later in zip(own_first, later_losses, strict=True)]
    outputs = []
    for q, chosen in enumerate(shortlists):
        own, scores = scores[: len(chosen)], scores[len(chosen) :]
        first_probs = tuple(float(probs[q, candidates[q][index][1]]) for index in chosen)
        best = max(range(len(own)), key=lambda place: (own[place], -chosen[place]))
        outputs.append(RankOutput(tuple(chosen), tuple(own), first_probs, best))
    return outputs


def _first_losses(logits: Tensor, words: Sequence[Sequence[int]]) -> list[float]:
    """The losses of each question's candidate first words, logits [Q, V]; question by question."""
    ids, _ = pad_ids(words, 0, logits.device)
    rows = word_nll(logits, ids).tolist()
    return [loss for row, own in zip(rows, words, strict=True) for loss in row[: len(own)]]


def _later_losses(steps: BlipSteps, questions: Sequence[int], texts: Sequence[tuple[int, ...]]) -> list[float]:
    """The summed losses of each candidate's tokens behind its first word; `questions` names each one's question."""
    if all(len(text) == 2 for text in texts):  # [DEC] [SEP]
        return [0.0] * len(texts)
    device = steps.logits().device
    ids, mask = pad_ids([text[1:-1] for text in texts], 0, device)
    targets, _ = pad_ids([text[2:] for text in texts], 0, device)
    losses = torch.zeros(mask.shape, device=device)
    losses[mask] = word_nll(steps.read_on(questions, ids, mask), targets[mask].unsqueeze(-1)).squeeze(-1)
    return losses.sum(dim=1).tolist()
