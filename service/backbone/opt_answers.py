"""Texts that a language model with a perceptual encoder goes on with: generated, or chosen among given ones.

Source: eP-ALM's `models/epalm.py` (`generate`, `rank_answer`), at batch size 1.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import Adaptation
from service.backbone.decoding import KeepGoing, Start, Steps, Writing, pad_ids, shortlist, write_all
from service.backbone.opt import Decoding, Opt
from service.types import GenerateOutput, RankOutput

MAX_LOGITS = 1 << 26  # numbers held at once when candidates are scored


def generate_texts(
    model: Opt,
    starts: Sequence[Start],
    features: Sequence[Tensor | None],
    adaptation: Adaptation | None,
    *,
    num_beams: int,
    keep_going: KeepGoing = lambda: True,
) -> list[GenerateOutput]:
    """What `begin_texts` begins, to its end."""
    return write_all(begin_texts(model, starts, features, adaptation, num_beams=num_beams), keep_going)


def begin_texts(
    model: Opt,
    starts: Sequence[Start],
    features: Sequence[Tensor | None],
    adaptation: Adaptation | None,
    *,
    num_beams: int,
    writer: Callable[[Decoding], Steps] = lambda steps: steps,
) -> Writing:
    """What follows each start; `features` holds each row's encoder states [blocks, d], or None.

    `writer` may put something in front of the steps that writes by them.

    A start that is as long as it may come to be, or longer, is followed by one token.
    """
    starts = [Start(start.ids, max(start.max_length, len(start.ids) + 1)) for start in starts]
    special = model.config.special_ids
    ids, mask = pad_ids([start.ids for start in starts], special.pad, model.device)
    most = max(start.max_length - len(start.ids) for start in starts)
    steps = model.decode(ids, mask, features, adaptation, max_new_tokens=most)
    return Writing(writer(steps), starts, num_beams=num_beams, end=special.eos)


def rank_texts(
    model: Opt,
    questions: Sequence[tuple[int, ...]],
    features: Sequence[Tensor | None],
    adaptation: Adaptation | None,
    candidates: Sequence[Sequence[tuple[int, ...]]],
    ks: Sequence[int],
    *,
    keep_going: KeepGoing = lambda: True,
) -> list[RankOutput]:
    """The best of each question's candidates, which start with the start token.

    A candidate's first word decides whether it is among the k looked at. Its score is the log-probability of that word
    plus that of the whole text, question, start token and candidate: the first word counts twice.
    Once nobody wants to `keep_going`, what was not scored gets minus infinity.

    A question is read once; its candidates go on from there, and where they change it, from the tail on, it is read with each.
    """
    ids, mask = pad_ids(questions, model.config.special_ids.pad, model.device)
    steps = model.decode(ids, mask, features, adaptation, max_new_tokens=0)
    log_probs = steps.logits().float().log_softmax(-1).cpu()  # [Q, V] of the word behind each question
    shortlists = [shortlist(log_probs[q], candidates[q], ks[q]) for q in range(len(questions))]
    pairs = [(q, index) for q, own in enumerate(shortlists) for index in own]
    longest = max(len(questions[q]) + len(candidates[q][index]) for q, index in pairs)
    part_size = max(1, MAX_LOGITS // (longest * model.config.language_model.vocab_size))
    alone = [] if steps.rereads else _score_questions(model, steps, mask, questions)
    scores: list[float] = []
    for first in range(0, len(pairs), part_size):
        if not keep_going():
            scores += [float("-inf")] * (len(pairs) - first)
            break
        part = pairs[first : first + part_size]
        rows, texts = [q for q, _ in part], [candidates[q][index] for q, index in part]
        if steps.rereads:
            scores += _score_with_questions(model, steps, rows, mask, [questions[q] for q in rows], texts)
        else:
            later = _score_behind_questions(model, steps, rows, texts)
            starts = [float(log_probs[q, text[0]]) for q, text in zip(rows, texts, strict=True)]
            scores += [alone[q] + one + other for q, one, other in zip(rows, starts, later, strict=True)]
    outputs = []
    for q, own in enumerate(shortlists):
        likelihoods, scores = scores[: len(own)], scores[len(own) :]
        priors = [float(log_probs[q, candidates[q][index][1]]) for index in own]
        totals = [prior + likelihood for prior, likelihood in zip(priors, likelihoods, strict=True)]
        best = max(range(len(own)), key=lambda place: (totals[place], -own[place]))
        outputs.append(RankOutput(tuple(own), tuple(totals), tuple(map(math.exp, priors)), best))
    return outputs


def _score_questions(model: Opt, steps: Decoding, mask: Tensor, questions: Sequence[tuple[int, ...]]) -> list[float]:
    """The log-probability of each question behind its start token, as it was read."""
    return _log_likelihoods(model, steps.as_read, _all_but_last(mask), [question[1:] for question in questions])


def _score_behind_questions(
    model: Opt, steps: Decoding, rows: Sequence[int], texts: Sequence[tuple[int, ...]]
) -> list[float]:
    """The log-probability of each text behind its start token and the question of that row."""
    ids, mask = pad_ids([text[:-1] for text in texts], model.config.special_ids.pad, model.device)
    hidden = steps.fork(rows, ids.shape[1]).append(ids, mask)
    return _log_likelihoods(model, hidden, mask, [text[1:] for text in texts])


def _score_with_questions(
    model: Opt,
    steps: Decoding,
    rows: Sequence[int],
    question_mask: Tensor,
    questions: Sequence[tuple[int, ...]],
    texts: Sequence[tuple[int, ...]],
) -> list[float]:
    """The log-probability of each text and its question, which sees it, behind the question's start token."""
    ids, mask = pad_ids(texts, model.config.special_ids.pad, model.device)
    scored = torch.cat([question_mask[torch.tensor(rows, device=model.device)], _all_but_last(mask)], dim=1)
    hidden = steps.fork(rows, ids.shape[1]).append(ids, mask)[:, -scored.shape[1] :]
    whole = [(*question[1:], *text) for question, text in zip(questions, texts, strict=True)]
    return _log_likelihoods(model, hidden, scored, whole)


def _all_but_last(mask: Tensor) -> Tensor:
    """The mask [B, L] of texts padded on the right without each one's last token."""
    return functional.pad(mask[:, 1:], (0, 1), value=False)


def _log_likelihoods(model: Opt, hidden: Tensor, mask: Tensor, words: Sequence[Sequence[int]]) -> list[float]:
    """The summed log-probability of each row's words: one follows each state in hidden [B, L, D] that mask [B, L] names."""
    logits = model.language_model.logits(hidden[mask]).float()
    targets = torch.tensor([word for own in words for word in own], dtype=torch.long, device=logits.device)
    log_probs = -functional.cross_entropy(logits, targets, reduction="none")
    return [float(own.sum()) for own in log_probs.cpu().split([len(own) for own in words])]
