"""How the demo's language model learns to read: from text, and from one vector that is left of a text."""

from pathlib import Path
from random import Random

import pytest
import torch

from service.backbone.base import load_tokenizer
from service.backbone.config import OptSpecialIds
from service.backbone.opt import LanguageModel
from service.demo.corpus import condensed
from service.demo.language import CondensedTraining, LanguageOptions, initialise, language_config
from service.demo.vocabulary import build_language_tokenizer


@pytest.fixture
def training(tmp_path: Path) -> CondensedTraining:
    build_language_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = LanguageModel(language_config(len(tokenizer)))
    initialise(model, 0)
    ids = OptSpecialIds(pad=tokenizer.pad_token_id, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    return CondensedTraining(
        model, tokenizer, ids, LanguageOptions(batch_size=4, condensed_batch_size=4, alone_batch_size=6)
    )


def test_every_weight_learns_from_what_is_left_of_a_description(training: CondensedTraining) -> None:
    parts = training.losses(training.options.condensed_lists_until)
    assert set(parts) == {"told", "answers", "condensed.told", "condensed.answers"}
    (parts["condensed.told"] + parts["condensed.answers"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in training.parameters.values())


def test_lists_come_first(training: CondensedTraining) -> None:
    assert "condensed.answers" not in training.losses(0)


def test_it_goes_on_where_an_earlier_stage_ended(training: CondensedTraining) -> None:
    left = {name: tensor + 1 for name, tensor in training.readers.state_dict().items()}
    later = CondensedTraining(training.model, training._tokenizer, training._ids, training.options, left)
    assert all(torch.equal(tensor, left[name]) for name, tensor in later.readers.state_dict().items())
    assert set(later.losses(0)) == {"told", "answers", "condensed.told", "condensed.answers"}, "no lists first"


def test_what_is_known_of_a_row_enters_whatever_is_beside_it(training: CondensedTraining) -> None:
    rng = Random(1)
    known = [known for known, _ in (condensed(rng) for _ in range(12))]
    in_registers = torch.arange(len(known)) % 2 == 0
    with torch.no_grad():
        prompt, injection = training.given(known, in_registers)
        for row, things in enumerate(known):
            alone_prompt, alone = training.given([things], in_registers[row : row + 1])
            torch.testing.assert_close(injection.values[row], alone.values[0])
            torch.testing.assert_close(prompt.embeddings[row], alone_prompt.embeddings[0])
    assert (injection.values[in_registers] == 0).all(), "either the registers hold the things or the vectors do"
    told = injection.values[~in_registers]
    assert (told[0] - told[1:]).abs().amax(dim=(1, 2)).min() > 1e-3
    bare = prompt.embeddings[~in_registers]
    torch.testing.assert_close(bare, bare[:1].expand_as(bare))
