"""The whole way of a rebuild at a tiny length: backbone, adapter, ablation, fine-tuned copy, table."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.package import read_package
from adapters.probe import parse_probe
from adapters.training.loop import Progress
from service.backbone.folder import load_backbone
from service.demo import build, fitting
from service.demo.evaluate import Contender, evaluate, evaluate_task, table
from service.demo.pretrain import PretrainOptions
from service.demo.recipes import RECIPES, Recipe, Variant
from service.demo.samples import write_samples
from service.errors import BadQuery

SHORT = PretrainOptions(steps=4, batch_size=4, num_questions=2, second_object_at=2, third_object_at=3)


def short(task: str) -> Recipe:
    return replace(RECIPES[task], steps=2, batch_size=3, rank=8, kv_rank=4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    build.build_backbone(work, work / "backbone", SHORT)
    return work / "backbone"


def test_the_backbone_ships_as_float16_with_a_tokenizer_and_every_part(backbone: Path) -> None:
    loaded = load_backbone(backbone)
    assert set(loaded.parts) == {
        "vision",
        "text_encoder",
        "decoder",
        "vision_proj",
        "text_proj",
        "itm_head",
        "tokenizer",
    }
    weight = loaded.model.vision.patch_embed.weight
    assert torch.equal(weight, weight.half().float())
    assert loaded.tokenize("what colour is the star?").unknown == ()


class Interrupted(Exception):
    """The run is cut off here."""


def test_an_interrupted_pretraining_goes_on_to_the_same_weights(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fitting.fit

    def interrupted(*arguments: Any, report: Callable[[Progress], None], **rest: Any) -> int:
        def cut_off(progress: Progress) -> None:
            report(progress)
            if progress.step == 3:
                raise Interrupted

        parameters, objective, options = arguments
        return real(parameters, objective, replace(options, checkpoint_every=2), report=cut_off, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit", interrupted)
        with pytest.raises(Interrupted):
            build.build_backbone(tmp_path, tmp_path / "out", SHORT)
    build.build_backbone(tmp_path, tmp_path / "out", SHORT)
    resumed, whole = load_backbone(tmp_path / "out"), load_backbone(backbone)
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], tensor, atol=1e-3), name


@pytest.mark.parametrize("task", ["demo-video-retrieval", "demo-image-vqa"])
def test_a_task_is_trained_packaged_and_measured(task: str, backbone: Path, tmp_path: Path) -> None:
    variants: list[Variant] = ["no-query-residual"] if task == "demo-image-vqa" else []
    contenders = [Contender("frozen", backbone)]
    trained: list[Variant] = ["adapter", *variants]
    for variant in trained:
        build.build_adapter(short(task), variant, tmp_path, backbone, tmp_path / variant)
        contenders.append(Contender(variant, backbone, tmp_path / variant))
    build.build_fine_tuned(short(task), tmp_path, backbone, tmp_path / "tuned")
    contenders.append(Contender("full-fine-tuning", tmp_path / "tuned"))
    row = evaluate_task(task, 3, 6, contenders)
    assert row["scenes_in_training_split"] == 0
    assert 0 < row["adapter"]["tunable_share"] < 0.1
    assert row["frozen"]["tunable_share"] == 0
    printed = table({"seed": 3, "items": 6, "tasks": {task: row}})
    assert all(f"| {task} | {contender.name} |" in printed for contender in contenders)


def test_the_options_of_an_ablation_are_in_its_package(backbone: Path, tmp_path: Path) -> None:
    build.build_adapter(short("demo-video-retrieval"), "no-frame-aware-attention", tmp_path, backbone, tmp_path / "p")
    package = read_package(tmp_path / "p")
    assert package.config.options["frame_aware_attention"] is False
    assert package.probe is not None
    parse_probe(package.probe, package.config)


def test_samples_are_files_with_their_questions_or_captions(tmp_path: Path) -> None:
    asked = write_samples("demo-video-qa", 5, 3, tmp_path / "asked").read_text().splitlines()
    told = write_samples("demo-image-retrieval", 5, 3, tmp_path / "told").read_text().splitlines()
    assert len(asked) == len(told) == 3
    assert all('"question"' in line and '"answer"' in line and ".mp4" in line for line in asked)
    assert all('"caption"' in line and ".png" in line for line in told)
    with pytest.raises(BadQuery, match="demo-image-vqa"):
        write_samples("nothing", 1, 1, tmp_path)


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    with pytest.raises(Exception, match="demo-chart-vqa"):
        evaluate(1, 1, tasks=["nothing"])
