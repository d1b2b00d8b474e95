"""Whole runs on a tiny backbone: packages, resumption, media that cannot be used, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing
from adapters.errors import AdapterBankError, Conflict, ConversionError, InvalidPackage, MissingPart, ProbeFailed
from adapters.families.base import HEADS
from adapters.families.uniadapter import UniAdapterOptions
from adapters.package import Package, check_backbone, read_package
from adapters.probe import parse_probe
from adapters.training.adapter import AnswerTraining, RetrievalTraining
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.folder import load_backbone
from service.config import InvalidSettings
from service.errors import BadMedia
from service.train import TrainOptions, train
from tests.service.train.conftest import COLOURS, manifest

QUESTION = "what color is it ?"
DOCS = Path(__file__).parents[3] / "docs" / "adapters.md"


@pytest.fixture
def questions(media: Path) -> Path:
    lines = [{"file": f"{name}.png", "question": QUESTION, "answer": name} for name in COLOURS]
    return manifest(media, *lines, name="questions.jsonl")


@pytest.fixture
def captions(media: Path) -> Path:
    lines = [{"file": f"{i}.mp4", "caption": f"a {name} circle"} for i, name in enumerate(list(COLOURS)[:3])]
    return manifest(media, *lines, {"file": "0.mp4", "caption": "a square"}, name="captions.jsonl")


def options(backbone: Path, data: Path, out: Path, **changes: Any) -> TrainOptions:
    given = {"backbone": backbone, "data": data, "out": out, "task": "vqa", "rank": 4, "steps": 4, "batch_size": 3}
    return TrainOptions.load(**{**given, "media_workers": 1, "device": "cpu", "num_frames": 2, **changes})


def run(options: TrainOptions) -> tuple[Package, list[str]]:
    said: list[str] = []
    return train(options, said.append), said


def test_a_vqa_run_learns_and_writes_a_package_that_fits(
    backbone_folder: Path, backbone: BlipBackbone, questions: Path, tmp_path: Path
) -> None:
    wanted = options(
        backbone_folder, questions, tmp_path / "colours", kv_rank=2, steps=40, batch_size=4, learning_rate=0.03
    )
    package, said = run(wanted)
    read = read_package(tmp_path / "colours", dims=backbone.dims())
    check_backbone(read.config, backbone.parts)
    assert read.weights_digest == package.weights_digest and read.package_digest == package.package_digest
    assert read.probe is not None and set(parse_probe(read.probe, read.config).outputs) == {"scores", "first_words"}
    config = read.config
    assert config.decoding is not None and set(config.decoding.answers) == set(COLOURS)
    assert (config.decoding.rank_k, config.decoding.max_length) == (4, 10)
    assert config.heads == () and config.options["kv_rank"] == 2 and config.max_text_tokens == 12
    assert config.preprocessing == Preprocessing(resolution=32, num_frames=2)
    assert config.provenance["data"] == {
        "manifest": "questions.jsonl",
        "digest": config.provenance["data"]["digest"],  # type: ignore[index,call-overload]
        "examples": 4,
        "files": 4,
        "quarantined": 0,
    }
    assert said[0] == "questions.jsonl: 4 examples of 4 files"
    assert re.fullmatch(r"tuning [\d,]+ parameters, [\d.]+ % of the backbone's [\d,]+, on cpu", said[1])
    losses = [float(line.split("answer ")[1]) for line in said if line.startswith("step ")]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    assert said[-1].endswith(package.weights_digest)
    card = (tmp_path / "colours" / "README.md").read_text()
    assert "| answers | 4 candidates |" in card and "| last losses | answer " in card


def test_a_retrieval_run_carries_heads_and_leaves_the_backbone_as_it_was(
    backbone_folder: Path, captions: Path, tmp_path: Path
) -> None:
    wanted = options(
        backbone_folder, captions, tmp_path / "clips", task="retrieval", frame_aware=True, queue_size=5, steps=3
    )
    package, said = run(wanted)
    assert package.config.heads == HEADS and package.config.options["frame_aware_attention"] is True
    assert package.config.decoding is None
    assert package.probe is not None and set(parse_probe(package.probe, package.config).outputs) == {
        "frames",
        "texts",
        "match",
    }
    assert set(package.config.backbone.parts) == {"vision", "text_encoder", "tokenizer"}
    assert any(re.match(r"step 3 of 3: itc [\d.]+, itm [\d.]+", line) for line in said)
    loaded = load_backbone(backbone_folder)
    loaded.verify()
    assert not torch.equal(package.tensors["itm_head.weight"], loaded.head_tensors()["itm_head.weight"])


def test_without_heads_of_its_own_an_adapter_names_the_backbones(
    backbone_folder: Path, backbone: BlipBackbone, captions: Path, tmp_path: Path
) -> None:
    package, _ = run(options(backbone_folder, captions, tmp_path / "p", task="retrieval", heads=False, steps=1))
    assert package.config.heads == ()
    assert all(package.config.backbone.parts[head] == backbone.parts[head] for head in HEADS)


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_a_stopped_run_goes_on_to_the_same_package(
    backbone_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    text = {"caption": "a circle"} if task == "retrieval" else {"question": QUESTION, "answer": "red"}
    names = [f"{name}.png" for name in COLOURS] * 5 + ["gone.png"]  # 1 of 5 files: the limit is lifted below
    data = manifest(media, *({"file": name, **text} for name in names), name=f"{task}.jsonl")
    monkeypatch.setattr("service.train.run.MAX_BROKEN_SHARE", 0.5)
    shared: dict[str, Any] = {"task": task, "steps": 6, "checkpoint_every": 2, "cache_mib": 0}
    whole, _ = run(options(backbone_folder, data, tmp_path / "whole", **shared))

    objective = AnswerTraining if task == "vqa" else RetrievalTraining
    follow, steps = objective.after_step, iter(range(4))

    def stop(self: Any) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt
        follow(self)

    halves = options(backbone_folder, data, tmp_path / "halves", **shared)
    with monkeypatch.context() as patched:
        patched.setattr(objective, "after_step", stop)
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            train(halves, said.append)
        assert said[-1] == f"stopped; the same command goes on from {halves.checkpoint_file}"
    assert not halves.out.exists() and halves.checkpoint_file == tmp_path / "halves.ckpt"
    resumed, said = run(halves)
    assert resumed.weights_digest == whole.weights_digest
    assert any(line.startswith("going on from") for line in said)
    assert [line.split(" of ")[0] for line in said if line.startswith("step ")] == [f"step {n}" for n in (3, 4, 5, 6)]
    assert not any("left out" in line for line in said)  # the list beside the checkpoint is believed


def test_a_run_that_left_a_part_as_it_began_writes_no_package_and_keeps_its_checkpoint(
    backbone_folder: Path, captions: Path, tmp_path: Path
) -> None:
    """A learning rate that moves nothing: the text branch of a retrieval adapter starts at zero and stays there."""
    wanted = options(backbone_folder, captions, tmp_path / "p", task="retrieval", steps=1, learning_rate=1e-30)
    with pytest.raises(ProbeFailed, match=r"change nothing: textual"):
        run(wanted)
    assert not wanted.out.exists() and wanted.checkpoint_file.exists()


def test_a_checkpoint_of_other_options_is_refused(backbone_folder: Path, questions: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.ckpt"
    run(options(backbone_folder, questions, tmp_path / "first", checkpoint=state, steps=2))
    with pytest.raises(InvalidPackage, match=r"state\.ckpt belongs to another run \(seed: 0, now 1\)"):
        run(options(backbone_folder, questions, tmp_path / "second", checkpoint=state, steps=2, seed=1))


def test_a_few_broken_media_are_left_out_and_listed(backbone_folder: Path, media: Path, tmp_path: Path) -> None:
    for number in range(40):
        (media / f"copy-{number}.png").write_bytes((media / "red.png").read_bytes())
    lines = [{"file": f"copy-{number}.png", "question": QUESTION, "answer": "red"} for number in range(40)]
    for name in ("broken.png", "gone.png", "gone.png"):
        lines.insert(5, {"file": name, "question": QUESTION, "answer": "blue"})
    wanted = options(backbone_folder, manifest(media, *lines, name="few.jsonl"), tmp_path / "few", steps=1)
    package, said = run(wanted)
    assert sum(line.startswith("left out: ") for line in said) == 2
    assert f"2 of 42 files are left out and listed in {wanted.quarantine_file}" in said
    listed = json.loads(wanted.quarantine_file.read_text())["quarantined"]
    assert [(Path(entry["file"]).name, entry["lines"]) for entry in listed] == [
        ("gone.png", [6, 7]),
        ("broken.png", [8]),
    ]
    assert package.config.provenance["data"]["quarantined"] == 2  # type: ignore[index,call-overload]
    assert "| data | few.jsonl, 40 examples |" in (tmp_path / "few" / "README.md").read_text()


def test_too_many_broken_media_end_the_run(backbone_folder: Path, media: Path, tmp_path: Path) -> None:
    lines = [{"file": f"{name}.png", "question": QUESTION, "answer": "red"} for name in (*COLOURS, "broken")]
    wanted = options(backbone_folder, manifest(media, *lines, name="many.jsonl"), tmp_path / "many")
    with pytest.raises(BadMedia, match="1 of 5 files cannot be used, more than 5 %"):
        run(wanted)
    assert wanted.quarantine_file.exists() and not wanted.out.exists()


def test_what_cannot_be_done_is_said_before_anything_is_decoded(
    backbone_folder: Path, questions: Path, captions: Path, media: Path, tmp_path: Path
) -> None:
    def refused(error: type[AdapterBankError], match: str, data: Path = questions, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            run(options(backbone_folder, data, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()

    refused(InvalidSettings, "33 is no multiple of the patch size 16", resolution=33)
    refused(InvalidSettings, "'tpu9' is no device", device="tpu9")
    refused(ConversionError, "line 1", data=captions)
    refused(MissingPart, "a BLIP is not served for caption", data=captions, task="caption", rank=None)
    refused(
        InvalidSettings,
        "only for the adapters of an OPT, and this backbone is a BLIP: shared_connector, prompt_length",
        shared_connector=False,
        prompt_length=10,
    )
    one = manifest(media, {"file": "red.png", "caption": "a"}, {"file": "red.png", "caption": "red"}, name="one.jsonl")
    refused(ConversionError, "at least 2 files", data=one, task="retrieval")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(Conflict, match="taken"):
        run(options(backbone_folder, questions, tmp_path / "taken"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank: "),
        ({"steps": 0}, "steps: "),
        ({"learning_rate": float("nan")}, "learning_rate: "),
        ({"task": "rerank"}, "task: "),
        ({"frame_aware": True}, "belong to retrieval"),
        ({"queue_size": 8}, "belong to retrieval"),
        ({"task": "retrieval", "batch_size": 1}, "batch_size must be at least 2"),
        ({"task": "caption", "answer_token": "</a>"}, "answer_token belongs to vqa"),
        ({"start_layer": 3, "end_layer": 3}, "start_layer must be below end_layer"),
        ({"prompt_length": 0, "prompt_mlp": False}, "no use without a prompt"),
        ({"prompt_length": 0, "prompt_learning_rate": 1e-5}, "no use without a prompt"),
        ({"prompt_length": 129}, "prompt_length: "),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        options(tmp_path, tmp_path, tmp_path, **changes)


def test_options_that_are_not_given_have_their_defaults(tmp_path: Path) -> None:
    given = options(tmp_path, tmp_path, tmp_path / "out", rank=None, queue_size=None, checkpoint=None)
    assert (given.rank, given.queue_size, given.prompt_length, given.answer_token) == (128, 0, 10, "</a>")
    assert not given.is_given("rank") and given.is_given("steps")
    assert given.checkpoint_file == tmp_path / "out.ckpt"


def test_the_guide_names_every_field_and_every_option() -> None:
    guide = DOCS.read_text()
    models = (AdapterConfig, BackboneRef, Preprocessing, AnswerDecoding, UniAdapterOptions)
    fields = {name for model in models for name in model.model_fields}
    assert {name for name in fields if f"`{name}`" not in guide} == set()
    flags = {f"--{name.replace('_', '-')}" for name in TrainOptions.model_fields}
    assert {flag for flag in flags if flag not in guide} == set()
