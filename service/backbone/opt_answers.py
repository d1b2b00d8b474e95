"""Texts that a language model with a perceptual encoder goes on with: generated, or chosen among given ones.

Source: eP-ALM's `models/epalm.py` (`generate`, `rank_answer`), at batch size 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import Adaptation
from service.backbone.decoding import KeepGoing, Start, Writing, pad_ids, shortlist, write_all
from service.backbone.opt import Opt
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
) -> Writing:
    """What follows each start; `features` holds each row's encoder states [blocks, d], or None.

    A start that is as long as it may come to be, or longer, is followed by one token.
    """
    starts = [Start(start.ids, max(start.max_length, len(start.ids) + 1)) for start in starts]
    special = model.config.special_ids
    ids, mask = pad_ids([start.ids for start in starts], special.pad, model.device)
    most = max(start.max_length - len(start.ids) for start in starts)
    steps = model.decode(ids, mask, features, adaptation, max_new_tokens=most)
    return Writing(steps, starts, num_beams=num_beams, end=special.eos)


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
    """
    log_probs = _first_words(model, questions, features, adaptation)
    shortlists = [shortlist(log_probs[q], candidates[q], ks[q]) for q in range(len(questions))]
    pairs = [(q, index) for q, own in enumerate(shortlists) for index in own]
    longest = max(len(questions[q]) + len(candidates[q][index]) for q, index in pairs)
    part_size = max(1, MAX_LOGITS // (longest * model.config.language_model.vocab_size))
    scores: list[float] = []
    for first in range(0, len(pairs), part_size):
        if not keep_going():
            scores += [float("-inf")] * (len(pairs) - first)
            break
        part = pairs[first : first + part_size]
        texts = [(*questions[q], *candidates[q][index]) for q, index in part]
        rows = torch.tensor([q for q, _ in part], device=model.device)
        adapted = None if adaptation is None else adaptation.expand(rows)
        scores += _log_likelihoods(model, texts, [features[q] for q, _ in part], adapted)
    outputs = []
    for q, own in enumerate(shortlists):
        likelihoods, scores = scores[: len(own)], scores[len(own) :]
        priors = [float(log_probs[q, candidates[q][index][1]]) for index in own]
        totals = [prior + likelihood for prior, likelihood in zip(priors, likelihoods, strict=True)]
        best = max(range(len(own)), key=lambda place: (totals[place], -own[place]))
        outputs.append(RankOutput(tuple(own), tuple(totals), tuple(map(math.exp, priors)), best))
    return outputs


def _first_words(
    model: Opt, questions: Sequence[tuple[int, ...]], features: Sequence[Tensor | None], adaptation: Adaptation | None
) -> Tensor:
    """Log-probabilities [Q, V] of the word behind each question."""
    ids, mask = pad_ids(questions, model.config.special_ids.pad, model.device)
    logits = model.decode(ids, mask, features, adaptation, max_new_tokens=0).logits()
    return logits.float().log_softmax(-1).cpu()


def _log_likelihoods(
    model: Opt, texts: Sequence[tuple[int, ...]], features: Sequence[Tensor | None], adaptation: Adaptation | None
) -> list[float]:
    """The summed log-probability of each text behind its start token."""
    ids, mask = pad_ids(texts, model.config.special_ids.pad, model.device)
    logits = model.score(ids, mask, features, adaptation)[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
    return (-(losses * mask[:, 1:]).sum(dim=1)).tolist()
