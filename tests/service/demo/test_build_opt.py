"""The whole way of a rebuild of the language-model half at a tiny length: four parts, adapters, a fine-tuned copy, table."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.families.epalm import PROMPT, EPalm
from adapters.package import read_package
from service.backbone.folder import load_backbone
from service.backbone.opt_backbone import OptBackbone
from service.demo.build_opt import build_epalm, build_fine_tuned_epalm, build_opt_backbone, linear_fit
from service.demo.evaluate import Contender, evaluate_task, table
from service.demo.language import SCHEDULE, LanguageOptions
from service.demo.perception import SENSES
from service.demo.recipes import EPALM_RECIPES, EpalmRecipe, epalm_config
from service.demo.samples import write_samples
from service.demo.told import told_batch

LANGUAGE = LanguageOptions(
    steps=4,
    lists_until=2,
    batch_size=3,
    condensed_steps=2,
    condensed_lists_until=1,
    condensed_batch_size=3,
    alone_steps=2,
    alone_batch_size=3,
)
SHORT_SENSES = [
    replace(sense, steps=2, named_steps=min(sense.named_steps, 2), batch_size=3, num_validated=8)
    for sense in SENSES.values()
]


def short(task: str) -> EpalmRecipe:
    return replace(EPALM_RECIPES[task], steps=2, batch_size=3, num_aligned=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    build_opt_backbone(LANGUAGE, SHORT_SENSES, work, work / "backbone")
    return work / "backbone"


@pytest.fixture(scope="module")
def backbone(folder: Path) -> OptBackbone:
    loaded = load_backbone(folder)
    assert isinstance(loaded, OptBackbone)
    return loaded


def test_the_backbone_ships_as_float16_with_every_part(backbone: OptBackbone) -> None:
    assert set(backbone.parts) == {"language_model", "vit", "timesformer", "ast", "tokenizer"}
    weight = backbone.model.language_model.words.weight
    assert torch.equal(weight, weight.half().float())


@pytest.mark.parametrize("task", EPALM_RECIPES)
def test_texts_are_put_as_the_service_puts_them(task: str, backbone: OptBackbone) -> None:
    recipe = short(task)
    told = told_batch(recipe, backbone, 3)
    end = backbone.config.special_ids.eos
    for ids, mask in zip(told.ids, told.mask, strict=True):
        text = ids[mask].tolist()
        assert text[0] == text[-1] == end
        assert text.count(4) == (0 if recipe.is_caption else 1)  # the answer token
    assert told.inputs.shape[0] == recipe.batch_size == told.medium_of_text.max() + 1
    again = told_batch(recipe, backbone, 3)
    assert torch.equal(told.ids, again.ids) and torch.equal(told.inputs, again.inputs)


@pytest.mark.parametrize("task", EPALM_RECIPES)
def test_a_task_is_trained_packaged_and_measured(task: str, folder: Path, tmp_path: Path) -> None:
    build_epalm(short(task), folder.parent, folder, tmp_path / "adapter")
    contenders = [
        Contender("frozen, perceiving nothing", folder, tmp_path / "adapter", perceives=False),
        Contender("adapter", folder, tmp_path / "adapter"),
    ]
    if task == "demo-epalm-video-qa":
        build_fine_tuned_epalm(short(task), folder.parent, folder, tmp_path / "tuned")
        tuned = tmp_path / "tuned"
        contenders.append(Contender("full-fine-tuning", tuned / "backbone", tuned / "adapter"))
    row = evaluate_task(task, 3, 6, contenders)
    assert row["scenes_in_training_split"] == 0
    assert 0 < row["adapter"]["tunable_share"] < 0.1
    assert row["frozen, perceiving nothing"]["tunable_share"] == 0
    printed = table({"seed": 3, "items": 6, "tasks": {task: row}})
    assert all(f"| {task} | {contender.name} |" in printed for contender in contenders)


@pytest.mark.parametrize("task", EPALM_RECIPES)
def test_vectors_enter_where_the_language_model_learned_to_read_them(task: str, backbone: OptBackbone) -> None:
    config = epalm_config(EPALM_RECIPES[task], backbone)
    assert EPalm().schedule(config, backbone.dims()) == SCHEDULE


def test_the_fit_that_connectors_start_from_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(4000, 6, generator=generator), torch.randn(3, 6, generator=generator)
    bias = torch.randn(3, generator=generator)
    found_weight, found_bias = linear_fit(inputs, inputs @ weight.T + bias)
    torch.testing.assert_close(found_weight, weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found_bias, bias, rtol=1e-2, atol=1e-2)


def test_fine_tuning_moves_every_part_that_it_perceives_and_tells_with(folder: Path, tmp_path: Path) -> None:
    task = "demo-epalm-vqa"
    build_fine_tuned_epalm(short(task), folder.parent, folder, tmp_path / "tuned")
    frozen, tuned = load_backbone(folder), load_backbone(tmp_path / "tuned" / "backbone")
    moved = {part for part in frozen.parts if frozen.parts[part] != tuned.parts[part]}
    assert moved == {"language_model", "vit"}
    package = read_package(tmp_path / "tuned" / "adapter")
    assert package.config.backbone.parts.items() <= tuned.parts.items()
    assert any(name.startswith(PROMPT) for name in package.tensors)


def test_samples_of_sounds_are_files_of_both_kinds_with_their_captions(tmp_path: Path) -> None:
    lines = write_samples("demo-epalm-audio-caption", 5, 4, tmp_path).read_text().splitlines()
    assert [line.split('"')[3].rpartition(".")[2] for line in lines] == ["wav", "m4a", "wav", "m4a"]
    assert all('"caption"' in line for line in lines)
