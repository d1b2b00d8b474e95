"""Sets that nobody recorded: other models, sizes, options and names, written by the plain reference.

python -m tests.parity.epalm.synthetic OUT      then      PARITY_DATA=OUT python -m pytest tests/parity/test_epalm.py
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.epalm.cases import IGNORED_LABEL, meaning, read_set
from tests.parity.epalm.recorded import Recorded
from tests.service.backbone.opt_library import POST_NORM, WIDTH, write_library_model

PROMPT = "prompt_module.prefix_embedding"
TOLERANCE = {"logits": 2e-4, "layer_input": 2e-4, "cls": 2e-5, "connector": 5e-5, "loss_sum": 1e-3, "loss_mean": 2e-4}
TOLERANCE |= {"beam3_score": 2e-4, "beam2_score": 2e-4, "rank_probs": 1e-4}
SPECIAL = {"bos": 2, "eos": 2, "pad": 1, "answer_token": 59}


@dataclass(frozen=True)
class Recipe:
    """One case: its frozen models, its settings, the lengths of its questions, and which beams and rankings to record."""

    language_model: str
    encoder: str
    settings: dict[str, Any]
    lengths: tuple[int, ...] = (5, 8, 3)
    beams: tuple[int, ...] = (3,)
    num_candidates: int = 0
    max_length: int = 16


@dataclass(frozen=True)
class Recipes:
    """One set: the library's folders by name, and its cases."""

    models: dict[str, tuple[str, dict[str, Any]]]
    cases: dict[str, Recipe] = field(default_factory=dict)


_ASKED = {"special_answer_token": "</a>", "prompt_tuning": True, "prompt_len": 2, "injected_hidden_states": 2}
_WINDOW = {"start_layer_idx": 1, "end_layer_idx": 3}
_CAPTION = {"append_eos_token": True, "prompt_tuning": True, "prompt_len": 3, "mlp": False}
SETS = {
    "several": Recipes(
        {
            "lm_before": ("OPT", {}),
            "lm_behind": ("OPT", {**POST_NORM, "num_hidden_layers": 5, "seed": 3}),
            "eyes": ("ViT", {"hidden_size": 18, "num_hidden_layers": 4}),
            "other_eyes": ("ViT", {"image_size": 12, "layer_norm_eps": 1e-12, "seed": 4}),
            "clips": ("Timesformer", {}),
            "ears": ("AST", {}),
        },
        {
            "asked": Recipe("lm_behind", "eyes", _ASKED | _WINDOW, num_candidates=5),
            "asked_to_the_end": Recipe(
                "lm_before",
                "other_eyes",
                _ASKED
                | {"start_layer_idx": 0, "end_layer_idx": 3, "injected_hidden_states": 3, "shared_connector": True},
                lengths=(4, 7),
                beams=(2, 3),
                num_candidates=4,
            ),
            "asked_of_the_same": Recipe("lm_behind", "other_eyes", _ASKED | _WINDOW | {"text_step": 2}, lengths=(2, 6)),
            "clip": Recipe("lm_behind", "clips", _ASKED | {"start_layer_idx": 0, "end_layer_idx": 4, "mlp": False}),
            "sound": Recipe("lm_before", "ears", _CAPTION | _WINDOW | {"injected_hidden_states": 1}, lengths=(1, 1, 1)),
            "plain_question": Recipe(
                "lm_behind",
                "eyes",
                {"start_layer_idx": 1, "end_layer_idx": 4, "select_higher_step": True, "prompt_tuning": False},
                num_candidates=6,
            ),
        },
    ),
    "alone": Recipes(
        {"lm": ("OPT", {"do_layer_norm_before": False, "seed": 9}), "vit": ("ViT", {"seed": 8})},
        {"only": Recipe("lm", "vit", _ASKED | _WINDOW, lengths=(6,), beams=())},
    ),
}


def write_sets(root: Path) -> list[Path]:
    """Write all sets below `root/epalm`; returns their folders."""
    return [_write_set(root / "epalm" / name, recipes) for name, recipes in SETS.items()]


def _write_set(folder: Path, recipes: Recipes) -> Path:
    models = {
        name: write_library_model(folder / name, kind, **{"vocab_size": 60, **options} if kind == "OPT" else options)
        for name, (kind, options) in recipes.models.items()
    }
    facts: dict[str, Any] = {"set": folder.name, "special_ids": SPECIAL, "cases": {}}
    for seed, (name, recipe) in enumerate(recipes.cases.items()):
        generator = torch.Generator().manual_seed(seed)
        language_model, encoder = models[recipe.language_model].config, models[recipe.encoder].config
        state = _state(recipe.settings, language_model, encoder, generator)
        torch.save({"model": state, "config": recipe.settings, "epoch": 1}, folder / f"{name}.pth")
        tensors = _inputs(recipe, language_model.vocab_size, encoder, generator)
        save_file(tensors, folder / f"{name}.safetensors")
        facts["cases"][name] = {
            "lm": recipe.language_model,
            "encoder": recipe.encoder,
            "checkpoint": f"{name}.pth",
            "tensors_file": f"{name}.safetensors",
            "generation": {"max_length": recipe.max_length},
            "tolerance": {f"{kind}_abs": atol for kind, atol in TOLERANCE.items()},
            "tensors": {},
        }
    (folder / "cases.json").write_text(json.dumps(facts))
    for case in read_set(folder):
        recipe = recipes.cases[case.name]
        recorded = Recorded(case)
        layers = models[recipe.language_model].config.num_hidden_layers
        names = {name: recorded.get(meaning(name)).contiguous() for name in _names(recipe, layers)}
        everything = {**case.tensors, **names}
        save_file(everything, folder / case.facts["tensors_file"])
        facts["cases"][case.name]["tensors"] = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in everything.items()
        }
    (folder / "cases.json").write_text(json.dumps(facts, indent=1))
    return folder


def _names(recipe: Recipe, layers: int) -> list[str]:
    beams = [name for count in recipe.beams for name in (f"beam{count}", f"beam{count}_score")]
    own = ["cls", "connector", "logits", "train_logits", "loss_sum", "loss_mean", "greedy", *beams]
    names = [f"s{sample}.{name}" for sample in range(len(recipe.lengths)) for name in own]
    names += [f"s0.debug.layer_input.{layer}" for layer in range(layers)]
    names += [f"batch.{name}" for name in ("logits", "train_logits", "loss_sum", "greedy", *beams)]
    if recipe.num_candidates:
        names += [f"rank.s{s}.topk_{kind}" for s in range(len(recipe.lengths)) for kind in ("ids", "probs")]
    return names


def _state(
    settings: Mapping[str, Any], language_model: Any, encoder: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=generator)

    state: dict[str, Tensor] = {}
    for k in range(1 if settings.get("shared_connector") else settings.get("injected_hidden_states", 1)):
        state[f"connector.{k}.weight"] = random(WIDTH, encoder.hidden_size)
        state[f"connector.{k}.bias"] = random(WIDTH)
    if settings["prompt_tuning"]:
        words = language_model.word_embed_proj_dim
        state[f"{PROMPT}.0.weight"] = random(settings["prompt_len"], words)
        for index in (1, 3) if settings.get("mlp", True) else ():
            state[f"{PROMPT}.{index}.weight"] = random(words, words)
            state[f"{PROMPT}.{index}.bias"] = random(words)
    return state


def _inputs(recipe: Recipe, vocabulary: int, encoder: Any, generator: torch.Generator) -> dict[str, Tensor]:
    def words(count: int) -> list[int]:
        return torch.randint(3, vocabulary - 1, (count,), generator=generator).tolist()

    shapes = {
        "vit": lambda: (3, encoder.image_size, encoder.image_size),
        "timesformer": lambda: (encoder.num_frames, 3, encoder.image_size, encoder.image_size),
        "audio-spectrogram-transformer": lambda: (encoder.max_length, encoder.num_mel_bins),
    }
    shape = shapes[encoder.model_type]()
    tensors = {"inputs": torch.randn(len(recipe.lengths), *shape, generator=generator)}
    questions = [[SPECIAL["bos"], *words(length - 1)] for length in recipe.lengths]
    answers = [[*question, *words(1 + row), SPECIAL["eos"]] for row, question in enumerate(questions)]
    for row in range(len(questions)):
        tensors |= _padded(f"s{row}.", questions[row : row + 1]) | _padded(f"s{row}.train_", answers[row : row + 1])
    tensors |= _padded("batch.", questions) | _padded("batch.train_", answers)
    if recipe.num_candidates:
        own = [[SPECIAL["bos"], *words(1 + row % 3), SPECIAL["eos"]] for row in range(recipe.num_candidates)]
        candidates = _padded("", own)
        tensors |= {"rank.answer_ids": candidates["input_ids"], "rank.answer_atts": candidates["attention_mask"]}
        for row in range(len(questions)):
            tensors[f"rank.s{row}.topk_ids"] = torch.zeros(1, recipe.num_candidates - 1, dtype=torch.long)
    return tensors


def _padded(prefix: str, rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[SPECIAL["pad"]] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    tensors = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    if prefix.endswith("train_"):
        tensors[f"{prefix}labels"] = torch.where(mask == 1, ids, IGNORED_LABEL)
    return tensors


if __name__ == "__main__":
    for written in write_sets(Path(sys.argv[1])):
        print(written)
