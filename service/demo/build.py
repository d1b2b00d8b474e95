"""Rebuild the demo from seeds: the backbone, its adapters, their ablations, the table.

    python -m service.demo.build [--work .demo] [--only STAGE ...] [--threads N]

Every run checkpoints under --work and goes on from there when started again; `--only` names what to do, so that
several runs may share a machine. Stages: backbone, opt.vit, opt.timesformer, opt.ast, opt.language-model, opt (these four
together), TASK, TASK:VARIANT, table.
"""

import argparse
import copy
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import AutoTokenizer

from adapters.config import AdapterConfig
from adapters.training.adapter import AnswerTraining, RetrievalTraining, TrainableAdapter
from adapters.training.data import AnswerBatch, RetrievalBatch
from adapters.training.loop import FitOptions, Objective
from adapters.training.losses import ContrastiveFeatures, contrastive_loss
from adapters.training.objectives import RetrievalSettings, encode_pairs, matching_loss_of, vqa_loss
from service.backbone.blip import Blip
from service.backbone.config import SpecialIds
from service.backbone.folder import load_blip, write_backbone
from service.demo.batches import Texts, answer_batch, draw_items, retrieval_batch
from service.demo.fitting import fit_with_bar
from service.demo.language import LanguageOptions
from service.demo.perception import SENSES
from service.demo.pretrain import Pretraining, PretrainOptions, demo_config, initialise, trainable
from service.demo.recipes import (
    ABLATIONS,
    ASSETS,
    EPALM_RECIPES,
    FULL_LEARNING_RATE,
    MAX_QUERY_TOKENS,
    RECIPES,
    STORED_DTYPE,
    Recipe,
    Variant,
    adapter_config,
)
from service.demo.vocabulary import DECODE_TOKEN, ENCODE_TOKEN, MAX_TEXT_TOKENS, build_tokenizer

log = logging.getLogger(__name__)


def build_backbone(work: Path, out: Path, options: PretrainOptions) -> None:
    """Pre-train on the plain world and write the frozen backbone, unless that was done."""
    if (out / "backbone.json").exists():
        return
    build_tokenizer(work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    ids = SpecialIds(
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
        bos=tokenizer.convert_tokens_to_ids(DECODE_TOKEN),
        enc=tokenizer.convert_tokens_to_ids(ENCODE_TOKEN),
    )
    model = Blip(demo_config(len(tokenizer), ids, MAX_TEXT_TOKENS))
    initialise(model, options.seed)
    objective = Pretraining(model, Texts(tokenizer, ids.bos), options)
    schedule = FitOptions(steps=options.steps, learning_rate=options.learning_rate, weight_decay=0.01, warmup_steps=100)
    fit_with_bar("backbone", trainable(model), objective, schedule, work / "backbone.ckpt")
    shutil.rmtree(out, ignore_errors=True)
    provenance: dict[str, JsonValue] = {"world": "plain", "seed": options.seed, "steps": options.steps}
    write_backbone(out, model.to(STORED_DTYPE), tokenizer, provenance, max_text_tokens=MAX_QUERY_TOKENS)


def build_adapter(recipe: Recipe, variant: Variant, work: Path, backbone_folder: Path, out: Path) -> None:
    """Train one adapter (or an ablation of it) on the frozen backbone and write its package, unless that was done."""
    if (out / "adapter_config.json").exists():
        return
    backbone = load_blip(backbone_folder)
    config = adapter_config(recipe, backbone, variant)
    adapter = TrainableAdapter(config, backbone.dims(), backbone.head_tensors(), seed=recipe.seed)
    frozen = sum(p.numel() for p in backbone.model.parameters())
    share = adapter.num_parameters / frozen
    log.info(
        "%s %s: %d of %d parameters tuned, %.2f %%", recipe.task, variant, adapter.num_parameters, frozen, 100 * share
    )
    texts = Texts(backbone.tokenizer, backbone.config.special_ids.bos)
    objective: Objective
    if recipe.is_retrieval:
        settings = RetrievalSettings(frame_aware=bool(config.options["frame_aware_attention"]))
        objective = RetrievalTraining(
            backbone.model, adapter, _pairs(recipe, texts), settings, ramp_steps=recipe.steps // 4, seed=recipe.seed
        )
    else:
        objective = AnswerTraining(backbone.model, adapter, _questions(recipe, texts))
    schedule = FitOptions(steps=recipe.steps, learning_rate=recipe.learning_rate, weight_decay=0.01)
    name = f"{recipe.task}.{variant}"
    fit_with_bar(name, adapter.parameters, objective, schedule, work / f"{name}.ckpt")
    stored = {name: tensor.to(STORED_DTYPE) for name, tensor in adapter.package_tensors().items()}
    shutil.rmtree(out, ignore_errors=True)
    from service.lifecycle.writing import write_probed_package  # the parts that serve, which training does without

    write_probed_package(out, config, stored, _card(recipe, config, share), backbone)


def build_fine_tuned(recipe: Recipe, work: Path, backbone_folder: Path, out: Path) -> None:
    """Train a full copy of the backbone on a task and write it as a backbone folder, unless that was done.

    The contrastive loss has hard targets here: a momentum copy of everything would double the cost of the comparison.
    """
    if (out / "backbone.json").exists():
        return
    backbone = load_blip(backbone_folder)
    model = copy.deepcopy(backbone.model)
    texts = Texts(backbone.tokenizer, backbone.config.special_ids.bos)
    objective = FineTuning(model, recipe, texts)
    schedule = FitOptions(steps=recipe.steps, learning_rate=FULL_LEARNING_RATE, weight_decay=0.01)
    name = f"{recipe.task}.full-fine-tuning"
    fit_with_bar(name, trainable(model), objective, schedule, work / f"{name}.ckpt")
    shutil.rmtree(out, ignore_errors=True)
    provenance: dict[str, JsonValue] = {"fine_tuned_on": recipe.task}
    write_backbone(out, model.to(STORED_DTYPE), backbone.tokenizer, provenance, max_text_tokens=MAX_QUERY_TOKENS)


class FineTuning:
    """A task's losses with every weight of the model free and no adapter."""

    def __init__(self, model: Blip, recipe: Recipe, texts: Texts) -> None:
        self.model = model
        self.recipe = recipe
        self._pairs = _pairs(recipe, texts)
        self._questions = _questions(recipe, texts)
        self._settings = RetrievalSettings()

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        if not self.recipe.is_retrieval:
            return {"answer": vqa_loss(self.model, self._questions(step), None)}
        batch = self._pairs(step)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        encoded = encode_pairs(self.model, batch, None)
        features = ContrastiveFeatures(encoded.clips, encoded.texts)
        temperature = self._settings.temperature
        itc = contrastive_loss(features, features, batch.pair_ids, None, None, temperature=temperature, alpha=0.0)
        return {"itc": itc, "itm": matching_loss_of(self.model, batch, None, encoded, self._settings, generator)}

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


def _pairs(recipe: Recipe, texts: Texts) -> Callable[[int], RetrievalBatch]:
    return lambda step: retrieval_batch(draw_items(recipe.task, recipe.seed, step, recipe.batch_size), texts)


def _questions(recipe: Recipe, texts: Texts) -> Callable[[int], AnswerBatch]:
    def batch(step: int) -> AnswerBatch:
        items = draw_items(recipe.task, recipe.seed, step, recipe.batch_size)
        return answer_batch(items, texts, recipe.num_questions, Random(f"{recipe.task}/{recipe.seed}/{step}"))

    return batch


def _card(recipe: Recipe, config: AdapterConfig, share: float) -> str:
    return (
        f"# {recipe.task}\n\n"
        f"A UniAdapter of rank {config.rank} for the demo's drawn world; {100 * share:.2f} % of the backbone's size is "
        "tuned.\nIt knows that world and nothing else. Trained by `python -m service.demo.build`.\n"
    )


SMALL_VARIANTS: dict[str, Variant] = {
    "no-query-residual": "no-query-residual",
    "no-frame-aware-attention": "no-frame-aware-attention",
}


def run_stage(stage: str, work: Path) -> None:
    """Do one stage, or what is left of it."""
    backbone = ASSETS / "backbone"
    if stage == "backbone":
        build_backbone(work, backbone, PretrainOptions())
        return
    if stage.startswith("opt") or stage.partition(":")[0] in EPALM_RECIPES:
        _run_opt_stage(stage, work)
        return
    if stage == "table":
        from service.demo.evaluate import record_table

        record_table(work)
        return
    task, _, variant = stage.partition(":")
    recipe = RECIPES[task]
    if not variant:
        build_adapter(recipe, "adapter", work, backbone, ASSETS / "adapters" / task)
    elif variant == "full-fine-tuning":
        build_fine_tuned(recipe, work, backbone, work / "fine-tuned" / task)
    elif variant in SMALL_VARIANTS:
        build_adapter(recipe, SMALL_VARIANTS[variant], work, backbone, ASSETS / "ablations" / f"{task}.{variant}")
    else:
        raise SystemExit(f"unknown variant {variant!r} of {task}")


def _run_opt_stage(stage: str, work: Path) -> None:
    from service.demo import build_opt  # as the parts that serve, which most stages do without

    backbone = ASSETS / "opt"
    part = stage.removeprefix("opt.")
    if stage == "opt":
        build_opt.build_opt_backbone(LanguageOptions(), list(SENSES.values()), work, backbone)
    elif part == "language-model":
        build_opt.build_language_model(LanguageOptions(), work)
    elif part in SENSES:
        build_opt.build_encoder(SENSES[part], work)
    else:
        task, _, variant = stage.partition(":")
        recipe = EPALM_RECIPES[task]
        if variant == "full-fine-tuning":
            build_opt.build_fine_tuned_epalm(recipe, work, backbone, work / "fine-tuned" / task)
        elif variant:
            raise SystemExit(f"unknown variant {variant!r} of {task}")
        else:
            build_opt.build_epalm(recipe, work, backbone, ASSETS / "adapters" / task)


def stages() -> list[str]:
    """Every stage of a full rebuild, in order."""
    ablations = [f"{task}:{variant}" for task, variants in ABLATIONS.items() for variant in variants]
    opt = [*(f"opt.{part}" for part in (*SENSES, "language-model")), "opt", *EPALM_RECIPES]
    return ["backbone", *RECIPES, *opt, *ablations, "table"]


def main() -> None:
    """Rebuild the demo, or the named stages of it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="checkpoints and ablations")
    parser.add_argument("--only", nargs="+", default=stages(), metavar="STAGE", help="stages to do; default all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the library's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.only:
        run_stage(stage, arguments.work)


if __name__ == "__main__":
    main()
