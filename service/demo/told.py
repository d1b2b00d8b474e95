"""Training batches of the demo's eP-ALM adapters. A batch depends on (task, seed, step) alone."""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from adapters.training.data import TextBatch
from service.backbone.decoding import pad_ids
from service.backbone.opt_backbone import OptBackbone
from service.demo.corpus import ANSWER
from service.demo.perception import inputs_of
from service.demo.recipes import EpalmRecipe
from service.demo.world import draft


@dataclass(frozen=True)
class ToldBatch:
    """B texts about N media: what their encoder is given, the medium of each text [B], ids and mask [B, L]."""

    inputs: Tensor
    medium_of_text: Tensor
    ids: Tensor
    mask: Tensor

    def batch(self, states: Tensor) -> TextBatch:
        """With the encoder's states [N, blocks, d] of the media."""
        return TextBatch(states[self.medium_of_text], self.ids, self.mask)


def told_batch(recipe: EpalmRecipe, backbone: OptBackbone, step: int) -> ToldBatch:
    """A step's questions with answers, or captions, as eP-ALM's trainers put them."""
    rng = Random(f"{recipe.task}/{recipe.seed}/{step}")
    first, end = step * recipe.batch_size, backbone.config.special_ids.eos
    drafts = [draft(recipe.task, "train", recipe.seed, first + i) for i in range(recipe.batch_size)]
    texts: list[tuple[int, ...]] = []
    owners: list[int] = []
    answer_token = None if recipe.is_caption else backbone.answer_token(ANSWER)
    for owner, made in enumerate(drafts):
        if recipe.is_caption:
            texts.append((*backbone.tokenize(made.caption or "").ids, end))
            owners.append(owner)
            continue
        for asked in rng.sample(made.questions, min(recipe.num_questions, len(made.questions))):
            answer = backbone.tokenize(asked.answer).ids[1:]  # without the start token
            texts.append((*backbone.question(asked.question, answer_token).ids, *answer, end))
            owners.append(owner)
    ids, mask = pad_ids(texts, backbone.config.special_ids.pad, torch.device("cpu"))
    return ToldBatch(inputs_of([made.content for made in drafts]), torch.tensor(owners), ids, mask)
