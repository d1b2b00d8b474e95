"""Train the demo's small OPT on text alone; after that it is frozen for good."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.base import Injection, Prompt, Schedule
from service.backbone.config import LanguageModelConfig, OptSpecialIds
from service.backbone.decoding import pad_ids
from service.backbone.opt import FIRST_POSITION, LanguageModel
from service.demo.corpus import ANSWER, ATTRIBUTES, MAX_THINGS, Known, condensed, list_text, text
from service.demo.pretrain import sines, trainable
from service.demo.wording import NUMBERS

WIDTH, LAYERS, HEADS, MAX_POSITIONS = 128, 4, 4, 160
POSITION_AMPLITUDE = 0.3  # beside words of 0.1: heads that look one word back are found early, or never
WORD_SCALE = 0.1
SCHEDULE = Schedule(3, (0, 1, 2, 2))  # which vector enters which layer: the adapters' schedule
REGISTERS = NUMBERS[1:5]  # words before condensed texts, without places
SHARE_IN_REGISTERS = 0.25  # of the rows, later on
OUTPUT_SCALE = 0.03  # of the maps that write into the residual stream


@dataclass(frozen=True)
class LanguageOptions:
    """Schedule of the training, in three stages: text; what vectors tell; and that again, with questions asked alone."""

    steps: int = 9000
    lists_until: int = 2500  # steps of lists alone
    learning_rate: float = 6e-4
    batch_size: int = 16
    condensed_steps: int = 4000  # after these
    condensed_batch_size: int = 32
    condensed_lists_until: int = 1000
    in_registers_until: int = 500
    alone_steps: int = 1400  # and after these
    alone_batch_size: int = 64
    alone_learning_rate: float = 1e-3
    seed: int = 3


def language_config(vocab_size: int) -> LanguageModelConfig:
    """The demo's OPT: pre-norm, words as wide as the model."""
    return LanguageModelConfig(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        mlp_width=4 * WIDTH,
        vocab_size=vocab_size,
        max_positions=MAX_POSITIONS,
        word_width=WIDTH,
    )


def initialise(model: LanguageModel, seed: int) -> None:
    """Normal weights, zero biases, sine-cosine positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("words"):
                parameter.normal_(0.0, WORD_SCALE, generator=generator)
            elif parameter.ndim >= 2:
                writes = "proj" in name or "fc2" in name
                parameter.normal_(0.0, OUTPUT_SCALE if writes else model.config.width**-0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        model.positions.weight.copy_(POSITION_AMPLITUDE * sines(MAX_POSITIONS + FIRST_POSITION, model.config.width))


class TextOnlyTraining:
    """Next words of the corpus, lists first; answers and the rest apart."""

    def __init__(self, model: LanguageModel, tokenizer: Any, ids: OptSpecialIds, options: LanguageOptions) -> None:
        self.model = model
        self.options = options
        self._tokenizer = tokenizer
        self._ids = ids
        self._answer = tokenizer.convert_tokens_to_ids(ANSWER)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained."""
        return trainable(self.model)

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        rng = Random(f"language/{self.options.seed}/{step}")
        write = list_text if step < self.options.lists_until else text
        return self.losses_of([write(rng) for _ in range(self.options.batch_size)])

    def losses_of(
        self, texts: Sequence[str], prompt: Prompt | None = None, injection: Injection | None = None
    ) -> dict[str, Tensor]:
        """Mean losses of the words told and of those in answers, scalars, where there are such."""
        encoded: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ids, mask = pad_ids(encoded, self._ids.pad, torch.device("cpu"))
        x, columns = self.model.arrange(ids, mask, prompt, injection)
        logits = self.model.logits(self.model.run(x, columns)[:, -ids.shape[1] :])[:, :-1].float()
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(ids), -1)
        answers = self._in_answers(ids)[:, :-1] & mask[:, 1:]
        told = mask[:, 1:] & ~answers
        parts = {"told": losses[told].mean()}
        return parts | {"answers": losses[answers].mean()} if answers.any() else parts

    def _in_answers(self, ids: Tensor) -> Tensor:
        """[B, L] True where the word that follows belongs to an answer, its end included."""
        places = torch.arange(ids.shape[1])
        opened = torch.where(ids == self._answer, places, -1).cummax(dim=1).values
        closed = torch.where(ids == self._ids.eos, places, -1).cummax(dim=1).values
        return opened > closed

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


class Readers(nn.Module):
    """How what is known becomes vectors for a language model of a width: used while it learns, and to align adapters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attributes = nn.EmbeddingBag(len(ATTRIBUTES), width, mode="sum")
        self.maps = nn.ModuleList(nn.Linear(MAX_THINGS * width, width) for _ in range(SCHEDULE.num_features))

    def things(self, known: Sequence[Known]) -> Tensor:
        """[B, MAX_THINGS, D]: the sum of each thing's attributes, 0 for one that is not there."""
        bags = [things[place] if place < len(things) else () for things in known for place in range(MAX_THINGS)]
        places = torch.tensor([ATTRIBUTES.index(attribute) for bag in bags for attribute in bag])
        starts = torch.tensor([0, *accumulate(len(bag) for bag in bags[:-1])])
        things: Tensor = self.attributes(places, starts)
        return torch.unflatten(things, 0, (len(known), MAX_THINGS))

    def vectors(self, things: Tensor) -> Tensor:
        """What is injected for things [B, MAX_THINGS, D]: [B, vectors of SCHEDULE, D]."""
        return torch.stack([layer(things.flatten(1)) for layer in self.maps], dim=1)


class CondensedTraining(TextOnlyTraining):
    """The corpus, and texts about what one vector a layer tells: what an eP-ALM adapter will give it, learned without one.

    The vectors are made by Readers. Before the text stand REGISTERS, into which the model sorts what the vectors hold. That
    it sorts one thing into one register is learned within minutes if a thing's words enter its register themselves at first,
    and hardly ever otherwise. After AutoCompressors (Chevalier et al., 2023), which train an OPT to read summary vectors of
    text.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        ids: OptSpecialIds,
        options: LanguageOptions,
        readers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`readers`: what an earlier stage left; without lists at first, and with questions asked alone, it goes on."""
        super().__init__(model, tokenizer, ids, options)
        self.goes_on = readers is not None
        self.readers = Readers(model.config.width)
        self._registers = torch.tensor(tokenizer.convert_tokens_to_ids(list(REGISTERS)))
        generator = torch.Generator().manual_seed(options.seed)
        with torch.no_grad():
            for name, parameter in self.readers.named_parameters():
                scale = OUTPUT_SCALE if name.startswith("maps") else WORD_SCALE
                parameter.normal_(0.0, scale, generator=generator)
        if readers is not None:
            self.readers.load_state_dict(dict(readers))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained."""
        return super().parameters | dict(self.readers.named_parameters())

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        options, rng = self.options, Random(f"condensed/{self.options.seed}/{self.goes_on}/{step}")
        plain = self.losses_of([text(rng) for _ in range(options.batch_size // 2)])
        if self.goes_on:
            drawn = [condensed(rng, asked_alone=True) for _ in range(options.alone_batch_size)]
            share = SHARE_IN_REGISTERS
        else:
            only_lists = step < options.condensed_lists_until
            drawn = [condensed(rng, only_lists=only_lists) for _ in range(options.condensed_batch_size)]
            share = 1.0 if step < options.in_registers_until else SHARE_IN_REGISTERS
        in_registers = torch.tensor([rng.random() < share for _ in drawn])
        prompt, injection = self.given([known for known, _ in drawn], in_registers)
        about = self.losses_of([told for _, told in drawn], prompt, injection)
        return plain | {f"condensed.{name}": loss for name, loss in about.items()}

    def given(self, known: Sequence[Known], in_registers: Tensor) -> tuple[Prompt, Injection]:
        """Registers and vectors of B rows' things; in the rows `in_registers`, bool [B], the vectors are 0."""
        num_rows, things = len(known), self.readers.things(known)
        there = in_registers[:, None, None].to(things.dtype)
        registers = self.model.words(self._registers).expand(num_rows, -1, -1)
        registers = torch.cat([registers[:, :MAX_THINGS] + there * things, registers[:, MAX_THINGS:]], dim=1)
        values = self.readers.vectors(things) * (1 - there)
        return Prompt(registers, (registers.shape[1],) * num_rows), Injection(values, (SCHEDULE,) * num_rows)
