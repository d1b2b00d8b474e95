"""Training an eP-ALM adapter: what gets gradients, what is minimised, and that it learns."""

import math

import pytest
import torch
from torch.nn import functional

from adapters.families.base import EncoderDims, OptDims, SlotView, UniformAdaptation
from adapters.families.epalm import EPalm
from adapters.training.adapter import TextTraining, TrainableAdapter
from adapters.training.data import TextBatch
from adapters.training.loop import FitOptions, fit
from adapters.training.objectives import TEXT_LOSS_WEIGHT, text_loss, text_losses
from service.backbone.config import OptSpecialIds
from service.backbone.opt import Opt
from tests.service.opt_worlds import BLOCKS, ENCODER_WIDTH, opt_config, random_opt
from tests.service.opt_worlds import opt_adapter_config as config_of

VOCABULARY, BOS, EOS, PAD = 30, 2, 3, 1


class Parts:
    """What a config wants to know of a backbone."""

    parts = dict.fromkeys(("language_model", "vit", "tokenizer"), f"sha256:{'0' * 64}")

    @staticmethod
    def answer_token(text: str) -> int:
        return 4


class Bench:
    """A random language model and batches that name what was perceived."""

    def __init__(self) -> None:
        config = opt_config(OptSpecialIds(pad=PAD, bos=BOS, eos=EOS), VOCABULARY)
        self.model = random_opt(config).eval().requires_grad_(False)

        language_model = config.language_model
        self.dims = OptDims(
            language_model.width,
            language_model.layers,
            language_model.word_width,
            {"vit": EncoderDims(ENCODER_WIDTH, BLOCKS)},
        )
        self.config = config_of(Parts())  # type: ignore[arg-type]
        self.kinds = torch.randn(4, BLOCKS, ENCODER_WIDTH, generator=torch.Generator().manual_seed(9))

    def adapter(self, seed: int = 0) -> TrainableAdapter:
        return TrainableAdapter(self.config, self.dims, {}, seed=seed)

    def batch(self, step: int) -> TextBatch:
        """Four kinds of things, called 10 to 13; one text is longer than the others."""
        words = [[BOS, 5, 4, 10 + kind, *([14] if kind == 3 else []), EOS] for kind in range(4)]
        longest = max(map(len, words))
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in words])
        return TextBatch(self.kinds, ids, ids != PAD)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_connectors_and_prompt_get_gradients_and_the_model_none(bench: Bench) -> None:
    adapter = bench.adapter()
    text_loss(bench.model, bench.batch(0), adapter.adaptation()).backward()  # type: ignore[no-untyped-call]
    assert set(adapter.parameters) == set(adapter.tensors)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_the_loss_is_that_of_every_token_but_the_first_and_none_of_the_padding(bench: Bench) -> None:
    batch, adaptation = bench.batch(0), bench.adapter().adaptation()
    losses = text_losses(bench.model, batch, adaptation).detach()
    for row in range(4):
        length = int(batch.mask[row].sum())
        alone = batch.ids[row : row + 1, :length]
        logits = bench.model.score(alone, torch.ones_like(alone, dtype=torch.bool), [batch.states[row]], adaptation)
        expected = functional.cross_entropy(logits[0, :-1], alone[0, 1:], reduction="sum")
        torch.testing.assert_close(losses[row], expected, atol=1e-4, rtol=1e-4)
    assert float(text_loss(bench.model, batch, adaptation).detach()) == pytest.approx(
        TEXT_LOSS_WEIGHT * float(losses.mean()), rel=1e-5
    )


def test_what_is_trained_is_what_is_served(bench: Bench) -> None:
    """The fold of the raw parameters gives the numbers that the fold of the package's tensors gives."""
    adapter, batch = bench.adapter(3), bench.batch(0)
    raw = adapter.adaptation()
    family = EPalm()
    folded = family.fold(bench.config, adapter.package_tensors(), bench.dims)
    served = UniformAdaptation(SlotView(family, folded, family.schedule(bench.config, bench.dims)))
    scored = [bench.model.score(batch.ids, batch.mask, list(batch.states), one) for one in (raw, served)]
    assert torch.equal(scored[0], scored[1])


def accuracy(model: Opt, batch: TextBatch, adapter: TrainableAdapter) -> float:
    with torch.no_grad():
        logits = model.score(batch.ids, batch.mask, list(batch.states), adapter.adaptation())
    return float((logits[:, 2].argmax(-1) == batch.ids[:, 3]).float().mean())


def test_it_learns_to_name_what_is_perceived(bench: Bench) -> None:
    adapter = bench.adapter(1)
    objective = TextTraining(bench.model, adapter, bench.batch)
    before = float(objective.losses(0)["text"].detach())
    options = FitOptions(steps=150, learning_rate=2e-2, weight_decay=0.0, warmup_steps=10)
    fit(adapter.parameters, objective, options)
    assert float(objective.losses(0)["text"].detach()) < before / 2
    assert accuracy(bench.model, bench.batch(0), adapter) == 1.0


def test_the_prompt_may_learn_at_a_rate_of_its_own(bench: Bench) -> None:
    adapter, still = bench.adapter(2), bench.adapter(2)
    options = FitOptions(steps=3, learning_rate=1e-2, warmup_steps=1)
    fit(
        adapter.parameters,
        TextTraining(bench.model, adapter, bench.batch),
        options,
        rate_of=lambda name: 0.0 if name.startswith("prompt_module") else 1.0,
    )
    for name, tensor in adapter.tensors.items():
        moved = float((tensor - still.tensors[name]).detach().abs().max())
        assert (moved == 0) == name.startswith("prompt_module"), (name, moved)
        assert math.isfinite(moved)
