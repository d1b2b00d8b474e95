"""Rebuild the language-model half of the demo: encoders and language model, each alone, then the adapters that join them.

Stages: opt.vit, opt.timesformer, opt.ast, opt.language-model, opt (the backbone folder of all four), the tasks, and
TASK:full-fine-tuning.
"""

import copy
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters.families.epalm import PROMPT
from adapters.training.adapter import TextTraining, TrainableAdapter
from adapters.training.data import TextBatch
from adapters.training.loop import FitOptions
from adapters.training.objectives import text_loss
from service.backbone.base import load_tokenizer
from service.backbone.config import OptConfig, OptSpecialIds
from service.backbone.encoders import Encoder
from service.backbone.folder import load_backbone, write_backbone
from service.backbone.opt import LanguageModel, Opt
from service.backbone.opt_backbone import OptBackbone
from service.demo.fitting import fit_with_bar
from service.demo.language import (
    REGISTERS,
    CondensedTraining,
    LanguageOptions,
    Readers,
    TextOnlyTraining,
    initialise,
    language_config,
)
from service.demo.perception import PerceptionTraining, Sense, inputs_of, known_of
from service.demo.pretrain import trainable
from service.demo.recipes import FULL_LEARNING_RATE, STORED_DTYPE, EpalmRecipe, epalm_config
from service.demo.told import ToldBatch, told_batch
from service.demo.vocabulary import build_language_tokenizer
from service.demo.world import draft
from service.lifecycle.writing import write_probed_package

log = logging.getLogger(__name__)

ALIGNED_AT_ONCE = 100
RIDGE = 1.0  # beside sums over all contents
READERS = "opt.language-model.readers.pt"  # of the work folder: what the language model was given vectors by


# --- the frozen parts, each trained on its own modality alone --------------------------------------------------------------


def build_encoder(sense: Sense, work: Path) -> Encoder:
    """Train an encoder on its own modality, or take what was trained already under `work`."""
    encoder: Encoder | None = None
    for name, ordered, steps in (
        (f"opt.{sense.encoder}.named", False, sense.named_steps),
        (f"opt.{sense.encoder}", True, sense.steps),
    ):
        if not steps:
            continue
        training, stored = PerceptionTraining(sense, ordered=ordered), work / f"{name}.pt"
        if encoder is not None:
            training.encoder.load_state_dict(encoder.state_dict())
        encoder = training.encoder
        if stored.exists():
            encoder.load_state_dict(torch.load(stored, weights_only=True))
            continue
        schedule = FitOptions(steps=steps, learning_rate=sense.learning_rate, weight_decay=0.01, warmup_steps=100)
        fit_with_bar(name, training.parameters, training, schedule, work / f"{name}.ckpt")
        validated = [
            draft(sense.world, "validation", sense.seed, index).content for index in range(sense.num_validated)
        ]
        log.info("%s: all labels read rightly, from each of the last blocks: %s", name, training.accuracy(validated))
        torch.save(encoder.state_dict(), stored)
    assert encoder is not None, "every sense has steps. This is a bug."
    return encoder


def build_language_model(options: LanguageOptions, work: Path) -> tuple[LanguageModel, Any, OptSpecialIds]:
    """Train the language model on text alone, or take what was trained already under `work`."""
    build_language_tokenizer(work / "opt.tokenizer")
    tokenizer = load_tokenizer(work / "opt.tokenizer")
    ids = OptSpecialIds(pad=tokenizer.pad_token_id, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    model = LanguageModel(language_config(len(tokenizer)))
    initialise(model, options.seed)
    readers: dict[str, Tensor] | None = None
    for name, steps, rate in (
        ("opt.language-model.told", options.steps, options.learning_rate),
        ("opt.language-model.condensed", options.condensed_steps, options.learning_rate),
        ("opt.language-model", options.alone_steps, options.alone_learning_rate),
    ):
        stored, left = work / f"{name}.pt", work / f"{name}.readers.pt"
        if not stored.exists():
            objective: TextOnlyTraining = TextOnlyTraining(model, tokenizer, ids, options)
            if not name.endswith("told"):
                objective = CondensedTraining(model, tokenizer, ids, options, readers)
            schedule = FitOptions(steps=steps, learning_rate=rate, weight_decay=0.01, warmup_steps=100)
            fit_with_bar(name, objective.parameters, objective, schedule, work / f"{name}.ckpt")
            if isinstance(objective, CondensedTraining):
                torch.save(objective.readers.state_dict(), left)
            torch.save(model.state_dict(), stored)
        model.load_state_dict(torch.load(stored, weights_only=True))
        readers = torch.load(left, weights_only=True) if left.exists() else None
    return model, tokenizer, ids


def build_opt_backbone(language: LanguageOptions, senses: Sequence[Sense], work: Path, out: Path) -> None:
    """Write the frozen backbone of a language model and these encoders, unless that was done."""
    if (out / "backbone.json").exists():
        return
    language_model, tokenizer, ids = build_language_model(language, work)
    configs: dict[str, Any] = {sense.encoder: sense.config for sense in senses}
    model = Opt(OptConfig(language_model=language_model.config, special_ids=ids, **configs))
    model.language_model.load_state_dict(language_model.state_dict())
    for sense in senses:
        model.encoder(sense.encoder).load_state_dict(build_encoder(sense, work).state_dict())
    shutil.rmtree(out, ignore_errors=True)
    provenance: dict[str, JsonValue] = {
        "language_model": {
            "seed": language.seed,
            "steps": [language.steps, language.condensed_steps, language.alone_steps],
        },
        **{
            sense.encoder: {"world": sense.world, "seed": sense.seed, "steps": [sense.named_steps, sense.steps]}
            for sense in senses
        },
    }
    write_backbone(out, model.to(STORED_DTYPE), tokenizer, provenance)


# --- adapters -------------------------------------------------------------------------------------------------------------


def build_epalm(recipe: EpalmRecipe, work: Path, backbone_folder: Path, out: Path) -> None:
    """Train one adapter on the frozen backbone and write its package, unless that was done."""
    if (out / "adapter_config.json").exists():
        return
    backbone = _load(backbone_folder)
    adapter = _aligned_adapter(recipe, backbone, work)
    share = adapter.num_parameters / num_parameters(backbone.model, recipe)
    log.info("%s: %d parameters tuned, %.2f %%", recipe.task, adapter.num_parameters, 100 * share)

    def batch(step: int) -> TextBatch:
        told = told_batch(recipe, backbone, step)
        with torch.no_grad():
            return told.batch(backbone.model.perceive(recipe.encoder, told.inputs))

    _fit(f"{recipe.task}.adapter", recipe, adapter.parameters, TextTraining(backbone.model, adapter, batch), work)
    _write_package(out, recipe, adapter, backbone, share)


def build_fine_tuned_epalm(recipe: EpalmRecipe, work: Path, backbone_folder: Path, out: Path) -> None:
    """Train a full copy of language model and encoder together with connectors and prompt, unless that was done.

    Written are `out/backbone` and `out/adapter`: without its connectors the copy would perceive nothing.
    """
    if (out / "adapter" / "adapter_config.json").exists():
        return
    frozen = _load(backbone_folder)
    model = copy.deepcopy(frozen.model)
    tuned = {"language_model": model.language_model, recipe.encoder: model.encoder(recipe.encoder)}
    weights = {f"{part}.{n}": p for part, module in tuned.items() for n, p in trainable(module).items()}
    adapter = _aligned_adapter(recipe, frozen, work)
    objective = FineTuning(model, adapter, recipe, frozen)
    _fit(f"{recipe.task}.full-fine-tuning", recipe, adapter.parameters | weights, objective, work)
    shutil.rmtree(out, ignore_errors=True)
    write_backbone(out / "backbone", model.to(STORED_DTYPE), frozen.tokenizer, {"fine_tuned_on": recipe.task})
    backbone = _load(out / "backbone")
    adapter.config = epalm_config(recipe, backbone)
    _write_package(out / "adapter", recipe, adapter, backbone, 1.0)


class FineTuning:
    """The trainers' loss with every weight of the language model and of the encoder free."""

    def __init__(self, model: Opt, adapter: TrainableAdapter, recipe: EpalmRecipe, frozen: OptBackbone) -> None:
        self.model = model
        self.adapter = adapter
        self.recipe = recipe
        self._frozen = frozen

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        told: ToldBatch = told_batch(self.recipe, self._frozen, step)
        batch = told.batch(self.model.perceive(self.recipe.encoder, told.inputs))
        return {"text": text_loss(self.model, batch, self.adapter.adaptation())}

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


def num_parameters(model: Opt, recipe: EpalmRecipe) -> int:
    """Of the language model and of the encoder that the task perceives with."""
    return sum(p.numel() for part in (model.language_model, model.encoder(recipe.encoder)) for p in part.parameters())


def _load(folder: Path) -> OptBackbone:
    backbone = load_backbone(folder)
    assert isinstance(backbone, OptBackbone), "the demo's language model was written there. This is a bug."
    return backbone


def _aligned_adapter(recipe: EpalmRecipe, backbone: OptBackbone, work: Path) -> TrainableAdapter:
    """An adapter that starts near what the language model learned to read; training by answers goes on from there.

    Its prompt starts from the words that stood for it, its connectors from the least-squares fit of the encoder's states to
    the vectors that Readers make of the same contents: a stage of alignment, as LLaVA (Liu et al., 2023) has one.
    """
    adapter = TrainableAdapter(epalm_config(recipe, backbone), backbone.dims(), {}, seed=recipe.seed)
    assert backbone.tokenizer is not None, "the demo ships one. This is a bug."
    words = torch.tensor(backbone.tokenizer.convert_tokens_to_ids(list(REGISTERS)))
    readers = Readers(backbone.dims().width)
    readers.load_state_dict(torch.load(work / READERS, weights_only=True))
    contents = [draft(recipe.task, "train", recipe.seed, index).content for index in range(recipe.num_aligned)]
    with torch.no_grad():
        states = torch.cat(
            [
                backbone.model.perceive(recipe.encoder, inputs_of(contents[first : first + ALIGNED_AT_ONCE]))
                for first in range(0, recipe.num_aligned, ALIGNED_AT_ONCE)
            ]
        )
        wanted = readers.vectors(readers.things([known_of(content) for content in contents]))
        for place in range(recipe.injected_hidden_states):
            weight, bias = linear_fit(states[:, place - recipe.injected_hidden_states], wanted[:, place])
            adapter.parameters[f"connector.{place}.weight"].copy_(weight)
            adapter.parameters[f"connector.{place}.bias"].copy_(bias)
        adapter.parameters[f"{PROMPT}.0.weight"].copy_(backbone.model.language_model.words(words))
    return adapter


def linear_fit(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] of the linear map that takes inputs [N, D] nearest to outputs [N, E], slightly damped."""
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    fit = torch.linalg.solve(inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1]), inputs.T @ outputs)
    return fit[:-1].T, fit[-1]


def _fit(name: str, recipe: EpalmRecipe, parameters: Any, objective: Any, work: Path) -> None:
    """Prompt and free weights have rates of their own."""

    def rate_of(parameter: str) -> float:
        if parameter.startswith("connector"):
            return 1.0
        if parameter.startswith(PROMPT):
            return recipe.prompt_rate
        return FULL_LEARNING_RATE / recipe.learning_rate

    schedule = FitOptions(steps=recipe.steps, learning_rate=recipe.learning_rate, weight_decay=0.0)
    fit_with_bar(name, parameters, objective, schedule, work / f"{name}.ckpt", rate_of=rate_of)


def _write_package(
    out: Path, recipe: EpalmRecipe, adapter: TrainableAdapter, backbone: OptBackbone, share: float
) -> None:
    stored = {name: tensor.to(STORED_DTYPE) for name, tensor in adapter.package_tensors().items()}
    shutil.rmtree(out, ignore_errors=True)
    card = (
        f"# {recipe.task}\n\n"
        f"An eP-ALM adapter for the demo's drawn and synthesised world; {100 * share:.2f} % of the size of the language "
        f"model and the {recipe.encoder} are tuned.\nIt knows that world and nothing else. Trained by `python -m "
        "service.demo.build`.\n"
    )
    write_probed_package(out, adapter.config, stored, card, backbone)
