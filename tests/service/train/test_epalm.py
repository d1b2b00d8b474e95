"""eP-ALM adapters trained on a tiny OPT, from files to answers: packages, what is tuned, resumption, refusals."""

import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters.config import AudioPreprocessing, Preprocessing
from adapters.errors import AdapterBankError, ConversionError, InvalidPackage, MissingPart
from adapters.families.epalm import EPalmOptions, init_tensors
from adapters.package import Package, check_backbone, read_package, write_package
from adapters.training.adapter import TextTraining
from adapters.training.loop import FitOptions, learning_rate
from service import train_commands
from service.backbone.folder import write_backbone
from service.backbone.opt import Opt
from service.backbone.opt_backbone import OptBackbone
from service.config import InvalidSettings, Settings
from service.errors import BadMedia
from service.home import push_package
from service.media import MediaWorkers, decode_image, decode_sound, decode_video
from service.media import Preprocessing as PixelPreprocessing
from service.media.sound import SpectrogramPreprocessing
from service.train import TrainOptions, run
from service.train.batches import Plan
from service.train.epalm import EPalmTraining, OptTexts, default_window
from service.train.examples import Examples, read_examples
from service.train.states import StateStore
from service.types import CaptionQuery, GenerateDecode, MediaBytes, MediaKind, VqaQuery
from tests.service.opt_worlds import ENCODER_WIDTH, MAX_STEPS, NUM_MEL_BINS, RESOLUTION, write_tiny_opt
from tests.service.train.conftest import TONES, manifest
from tests.service.worlds import Service, context, running

QUESTION = "what color"
COLOURS = ("red", "green", "blue")
# name -> task, kind of media, files, and what is learnt of each
SETS: dict[str, tuple[str, MediaKind, list[str], list[str]]] = {
    "see": ("vqa", "image", [f"{name}.png" for name in COLOURS], [*COLOURS]),
    "watch": ("vqa", "video", [f"{name}.mp4" for name in COLOURS], [*COLOURS]),
    "hear": ("caption", "audio", [f"{hz}.wav" for hz in TONES], [f"a {name} circle" for name in COLOURS]),
}
LEARNING: dict[str, Any] = {
    "steps": 180,
    "batch_size": 3,
    "learning_rate": 0.05,
    "prompt_learning_rate": 0.05,
    "start_layer": 0,
    "end_layer": 4,
    "injected_hidden_states": 3,
}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> OptBackbone:
    return write_tiny_opt(tmp_path_factory.mktemp("opt") / "opt")


@pytest.fixture(scope="module")
def opt_folder(opt: OptBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "opt"
    write_backbone(folder, opt.model, opt.tokenizer, {})
    return folder


def lines_of(name: str) -> list[dict[str, Any]]:
    task, _, files, learnt = SETS[name]
    if task == "caption":
        return [{"file": file, "caption": text} for file, text in zip(files, learnt, strict=True)]
    return [{"file": file, "question": QUESTION, "answer": text} for file, text in zip(files, learnt, strict=True)]


def options(folder: Path, data: Path, out: Path, **changes: Any) -> TrainOptions:
    given = {"backbone": folder, "data": data, "out": out, "task": "vqa", "steps": 4, "batch_size": 4}
    return TrainOptions.load(**{**given, "media_workers": 1, "device": "cpu", **changes})


def trained(wanted: TrainOptions) -> tuple[Package, list[str]]:
    said: list[str] = []
    return run.train(wanted, said.append), said


# --- whole runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """Adapters of every kind of media, trained and fresh, in a service."""

    service: Service
    media: Path
    packages: dict[str, Package]
    said: dict[str, list[str]]

    def answers(self, name: str, adapter: str) -> list[str]:
        """What an adapter makes of the files of a set, greedily."""
        task, kind, files, _ = SETS[name]
        return [self._answer(adapter, task, MediaBytes(kind, (self.media / file).read_bytes())) for file in files]

    def _answer(self, adapter: str, task: str, medium: MediaBytes) -> str:
        vqa, greedy = self.service.runtime.vqa, GenerateDecode(1)
        if task == "caption":
            return self.service.call(vqa.caption(CaptionQuery(adapter, medium, greedy), context())).answer
        return self.service.call(vqa.answer(VqaQuery(adapter, QUESTION, medium, greedy), context())).answer


@pytest.fixture(scope="module")
def learnt(
    opt: OptBackbone, opt_folder: Path, media: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Learnt]:
    folder = tmp_path_factory.mktemp("learnt")
    settings = Settings(home=folder / "home", backbone=opt_folder, device="cpu", media_workers=1, threads=1)
    packages, said = {}, {}
    for name, (task, *_) in SETS.items():
        data = manifest(media, *lines_of(name), name=f"{name}.jsonl")
        packages[name], said[name] = trained(options(opt_folder, data, folder / name, task=task, **LEARNING))
        config = packages[name].config
        tensors = init_tensors(config, opt.dims(), torch.Generator().manual_seed(0))  # what the run began with
        write_package(folder / f"fresh-{name}", config, tensors, "# fresh\n", None)
        for pushed in (name, f"fresh-{name}"):
            push_package(settings, folder / pushed, pushed)
    with running(settings) as service:
        yield Learnt(service, media, packages, said)


@pytest.mark.parametrize("name", SETS)
def test_a_trained_adapter_says_what_it_was_taught_and_a_fresh_one_does_not(learnt: Learnt, name: str) -> None:
    wanted = SETS[name][3]
    assert learnt.answers(name, name) == wanted
    assert not {*learnt.answers(name, f"fresh-{name}")} & {*wanted}
    losses = [float(line.split("text ")[1]) for line in learnt.said[name] if line.startswith("step ")]
    assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", SETS)
def test_a_package_says_how_to_serve_it(learnt: Learnt, opt: OptBackbone, name: str) -> None:
    task, kind, _, texts = SETS[name]
    package = read_package(learnt.packages[name].path, dims=opt.dims())  # type: ignore[arg-type]
    check_backbone(package.config, opt.parts)
    assert package.weights_digest == learnt.packages[name].weights_digest and package.probe is not None
    config = package.config
    encoder = {"image": "vit", "video": "timesformer", "audio": "ast"}[kind]
    assert (config.family, config.task, config.rank, config.heads) == ("epalm", task, 3, ())
    assert set(config.backbone.parts) == {"language_model", encoder, "tokenizer"}
    token = opt.answer_token("</a>") if task == "vqa" else None
    assert EPalmOptions.model_validate(config.options) == EPalmOptions(
        encoder=encoder,
        start_layer_idx=0,
        end_layer_idx=4,
        injected_hidden_states=3,
        prompt_len=10,
        answer_token_id=token,
    )
    pictures = Preprocessing(resolution=RESOLUTION, num_frames=3 if kind == "video" else 1)
    sounds = AudioPreprocessing(num_mel_bins=NUM_MEL_BINS, max_steps=MAX_STEPS)
    assert config.preprocessing == (sounds if kind == "audio" else pictures)
    assert config.max_text_tokens == 32
    assert config.decoding is not None and config.decoding.num_beams == 3 and config.decoding.max_length == 30
    assert set(config.decoding.answers) == ({*texts} if task == "vqa" else set())
    assert config.provenance["prompt_learning_rate"] == config.provenance["learning_rate"] == 0.05
    card = (package.path / "README.md").read_text()  # type: ignore[operator]
    assert f"epalm, the last 3 blocks of {encoder} into layers 0 to 3, 3 connectors" in card
    assert "| prompt | 10 tokens, through the network" in card


def test_only_connector_and_prompt_are_tuned(
    opt: OptBackbone, opt_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_backbone", lambda *_, **__: opt)
    data = manifest(media, *lines_of("see"), name="tuned.jsonl")
    package, _ = trained(options(opt_folder, data, tmp_path / "p", learning_rate=0.01, prompt_learning_rate=1e-9))
    opt.verify()
    assert all(p.grad is None and not p.requires_grad for p in opt.model.parameters())
    fresh = init_tensors(package.config, opt.dims(), torch.Generator().manual_seed(0))
    moved = {name: float((package.tensors[name] - fresh[name]).abs().max()) for name in fresh}
    assert set(moved) == set(package.tensors)
    assert all((change > 1e-3) == name.startswith("connector.") for name, change in moved.items()), moved


ANSWERS: list[dict[str, Any]] = [
    {"answers": ["red", "green", "blue"], "weights": [3, 2, 1]},
    {"answer": "red"},
    {"answers": ["blue", "red"]},
]


@pytest.mark.parametrize("name", ["see", "hear"])
def test_a_stopped_run_goes_on_to_the_same_package(
    opt_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Answers are drawn, and what was perceived is kept or not: neither may depend on where the run was stopped."""
    lines = lines_of(name)
    if name == "see":
        lines = [{"file": one["file"], "question": QUESTION, **more} for one, more in zip(lines, ANSWERS, strict=True)]
    data = manifest(media, *lines, name=f"stopped-{name}.jsonl")
    shared: dict[str, Any] = {"task": SETS[name][0], "steps": 6, "checkpoint_every": 2, "learning_rate": 0.01}
    whole, _ = trained(options(opt_folder, data, tmp_path / "whole", **shared))

    follow, steps = TextTraining.after_step, iter(range(4))

    def stop(self: Any) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt
        follow(self)

    halves = options(opt_folder, data, tmp_path / "halves", cache_mib=0, **shared)
    with monkeypatch.context() as patched:
        patched.setattr(TextTraining, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(halves, lambda line: None)
    resumed, said = trained(halves)
    assert f"going on from {halves.checkpoint_file}" in said
    assert [line.split(" of ")[0] for line in said if line.startswith("step ")] == [f"step {n}" for n in (3, 4, 5, 6)]
    assert resumed.weights_digest == whole.weights_digest
    other = options(opt_folder, data, tmp_path / "other", checkpoint=halves.checkpoint_file, text_step=2, **shared)
    with pytest.raises(InvalidPackage, match=r"belongs to another run .*text_step: 1, now 2"):
        trained(other)


def test_bfloat16_changes_the_products_and_not_what_is_perceived(
    opt_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perceived: list[torch.Tensor] = []
    perceive = Opt.perceive

    def noted(self: Opt, encoder: str, inputs: torch.Tensor) -> torch.Tensor:
        perceived.append(perceive(self, encoder, inputs))
        return perceived[-1]

    monkeypatch.setattr(Opt, "perceive", noted)
    data = manifest(media, *lines_of("see"), name="bfloat16.jsonl")
    digests = set()
    for precision in ("float32", "bfloat16"):
        wanted = options(opt_folder, data, tmp_path / precision, precision=precision, cache_mib=0, learning_rate=0.01)
        digests.add(trained(wanted)[0].weights_digest)
    assert len(digests) == 2 and {states.dtype for states in perceived} == {torch.float32}


def test_every_file_is_perceived_once(
    opt_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_perceived, make = Counter[str](), StateStore.make

    def counted(self: StateStore, values: Any) -> torch.Tensor:
        num_perceived[self.kind] += 1
        return make(self, values)

    monkeypatch.setattr(StateStore, "make", counted)
    data = manifest(media, *lines_of("see"), *lines_of("see"), name="once.jsonl")
    trained(options(opt_folder, data, tmp_path / "p", steps=8, learning_rate=0.01))
    assert num_perceived == {"image": 3}


def test_a_few_broken_sounds_are_left_out_and_listed(opt_folder: Path, media: Path, tmp_path: Path) -> None:
    for number in range(20):
        (media / f"copy-{number}.wav").write_bytes((media / "440.wav").read_bytes())
    lines = [{"file": f"copy-{number}.wav", "caption": "a circle"} for number in range(20)]
    lines.insert(4, {"file": "broken.wav", "caption": "a square"})
    wanted = options(opt_folder, manifest(media, *lines, name="few.jsonl"), tmp_path / "few", task="caption", steps=1)
    package, _ = trained(wanted)
    listed = json.loads(wanted.quarantine_file.read_text())["quarantined"]
    assert [(Path(entry["file"]).name, entry["lines"]) for entry in listed] == [("broken.wav", [5])]
    assert package.config.provenance["data"]["quarantined"] == 1  # type: ignore[index,call-overload]
    lines.insert(0, {"file": "gone.wav", "caption": "a square"})
    wanted = options(opt_folder, manifest(media, *lines, name="many.jsonl"), tmp_path / "many", task="caption")
    with pytest.raises(BadMedia, match="2 of 22 files cannot be used, more than 5 %"):
        trained(wanted)
    nothing = manifest(media, {"file": "gone.wav", "caption": "a square"}, name="nothing.jsonl")
    with pytest.raises(BadMedia, match="1 of 1 files cannot be used"):
        trained(options(opt_folder, nothing, tmp_path / "nothing", task="caption"))


# --- texts, windows, rates -----------------------------------------------------------------------------------


def read(opt: OptBackbone, folder: Path, task: Any, *lines: dict[str, Any], token: str | None = "</a>") -> Examples:
    return read_examples(manifest(folder, *lines), task, OptTexts(opt, opt.answer_token(token)))


def test_a_text_is_what_the_service_puts_with_what_it_should_say(opt: OptBackbone, tmp_path: Path) -> None:
    ids = opt.config.special_ids
    line = {"file": "a.png", "question": "what is it ?", "answer": "a red circle"}
    token, words = opt.answer_token("</a>"), opt.tokenize("a red circle").ids[1:]
    (asked,) = read(opt, tmp_path, "vqa", line).examples
    assert asked.ids == opt.question("what is it ?", token).ids == (*opt.tokenize("what is it ??").ids, token)
    assert asked.answers == ((*words, ids.eos),)
    assert opt.tokenize_answers(["a red circle"]) == [(ids.bos, *asked.answers[0])]
    (asked,) = read(opt, tmp_path, "vqa", line, token=None).examples
    assert asked.ids == (*opt.tokenize("what is it ?").ids, ids.eos) and asked.answers == ((*words, ids.eos),)
    end = opt.tokenizer.convert_ids_to_tokens(ids.eos)  # type: ignore[union-attr]
    (told,) = read(opt, tmp_path, "caption", {"file": "a.png", "caption": f"a red{end} circle"}).examples
    assert told.ids == (ids.bos, *words, ids.eos) and told.answers == ()


def test_a_text_over_its_limit_is_named(opt: OptBackbone, tmp_path: Path) -> None:
    long = "red " * 70
    with pytest.raises(ConversionError, match="line 1: 'caption' has 72 tokens; at most 64"):
        read(opt, tmp_path, "caption", {"file": "a.png", "caption": long})
    for name in ("question", "answer"):
        with pytest.raises(ConversionError, match=rf"line 1: '{name}' has \d+ tokens; at most 32"):
            read(opt, tmp_path, "vqa", {"file": "a.png", "question": "what", "answer": "red"} | {name: long})


def test_an_answer_is_drawn_in_proportion_to_its_weight(
    opt: OptBackbone, opt_folder: Path, media: Path, workers: MediaWorkers
) -> None:
    data = manifest(media, {"file": "red.png", "question": QUESTION, **ANSWERS[0]}, name="drawn.jsonl")
    family = EPalmTraining(options(opt_folder, data, media / "out"), opt)
    examples = read_examples(data, "vqa", family.texts)
    store = family.store(family.config(examples, "image"), examples.files, "image", workers)
    batches = family.batches(examples.examples, store, Plan(1, 40, seed=5))
    drawn = Counter(int(row[len(examples.examples[0].ids)]) for step in range(20) for row in batches(step).ids)
    shares = [drawn[words[0]] / 800 for words in examples.examples[0].answers]
    assert shares == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=0.05)
    assert torch.equal(batches(3).ids, batches(3).ids) and not torch.equal(batches(3).ids, batches(4).ids)


@pytest.mark.parametrize("name", SETS)
def test_states_are_the_encoders_of_the_last_blocks(
    opt: OptBackbone, opt_folder: Path, media: Path, workers: MediaWorkers, name: str
) -> None:
    task, kind, files, _ = SETS[name]
    data = manifest(media, *lines_of(name), name="states.jsonl")
    given = options(opt_folder, data, media / "out", task=task, start_layer=0, end_layer=4, num_frames=None)
    family = EPalmTraining(given, opt)
    examples = read_examples(data, given.task, family.texts)
    config = family.config(examples, kind)
    store = family.store(config, examples.files, kind, workers)
    path, prep = media / files[1], PixelPreprocessing(RESOLUTION)
    if kind == "audio":
        values = decode_sound(path, SpectrogramPreprocessing(NUM_MEL_BINS, MAX_STEPS)).banks
    else:
        values = decode_image(path, prep) if kind == "image" else decode_video(path, prep, 3).frames
    with torch.inference_mode():
        expected = opt.model.perceive(str(config.options["encoder"]), torch.from_numpy(values)[None])[0]
    states = store.states([1, 0, 1])
    assert states.shape == (3, 2, ENCODER_WIDTH) and not states.is_inference()
    assert torch.equal(states[0], expected[-2:]) and torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    "given, expected",
    [
        ((32, 12), (19, 31, 6)),  # OPT-2.7B and 6.7B: the authors'
        ((24, 12), (14, 23, 4)),
        ((12, 12), (7, 11, 2)),
        ((4, 3), (2, 3, 1)),
        ((2, 3), (1, 2, 1)),
        ((1, 3), (0, 1, 1)),
        ((32, 3), (19, 31, 3)),
        ((32, 12, 8), (8, 31, 11)),
        ((32, 12, None, 10), (9, 10, 1)),
        ((4, 3, 3), (3, 4, 1)),
    ],
)
def test_the_usual_window_has_the_authors_proportions(given: Any, expected: tuple[int, int, int]) -> None:
    assert default_window(*given) == expected


def test_connector_and_prompt_have_the_authors_rates(opt: OptBackbone, opt_folder: Path, tmp_path: Path) -> None:
    def rates(**changes: Any) -> tuple[float, float]:
        family = EPalmTraining(options(opt_folder, tmp_path, tmp_path / "out", **changes), opt)
        peak = learning_rate(0, FitOptions(steps=1, learning_rate=family.learning_rate, warmup_steps=1))
        return peak * family.rate_of("connector.0.bias"), peak * family.rate_of(
            "prompt_module.prefix_embedding.0.weight"
        )

    assert rates() == pytest.approx((2e-5, 1e-5))
    assert rates(prompt_mlp=False) == pytest.approx((2e-4, 1e-3))
    assert rates(learning_rate=1e-3) == pytest.approx((1e-3, 5e-4))
    assert rates(learning_rate=1e-3, prompt_learning_rate=1e-2) == pytest.approx((1e-3, 1e-2))
    assert rates(prompt_length=0) == pytest.approx((2e-5, 1e-5))


# --- refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said_before_anything_is_decoded(
    opt_folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MediaWorkers, "submit", lambda *_: pytest.fail("decoded"))
    data = {name: manifest(media, *lines_of(name), name=f"{name}.jsonl") for name in SETS}

    def refused(error: type[AdapterBankError], match: str, name: str = "see", **changes: Any) -> None:
        with pytest.raises(error, match=match):
            trained(
                options(
                    opt_folder,
                    data[name],
                    tmp_path / "out",
                    **{"task": "caption" if name == "hear" else "vqa", **changes},
                )
            )
        assert not (tmp_path / "out").exists()

    refused(
        InvalidSettings,
        "only for the adapters of a BLIP, and this backbone is an OPT: rank, heads",
        rank=128,
        heads=True,
    )
    refused(MissingPart, "a language model does not retrieve", "hear", task="retrieval")
    refused(ConversionError, "line 1: question", "hear", task="vqa")
    refused(InvalidSettings, "the window ends at layer 5; the language model has 4", end_layer=5)
    refused(InvalidSettings, "4 blocks are injected; vit has 3", injected_hidden_states=4, start_layer=0)
    refused(InvalidSettings, "of 3 injected hidden states 2 would enter", injected_hidden_states=3, start_layer=1)
    refused(InvalidSettings, "of 1 injected hidden states 0 would enter", text_step=3)
    refused(InvalidSettings, "20 is no multiple of the patch size 8", resolution=20)
    refused(InvalidSettings, "resolution belongs to pictures and clips", "hear", resolution=16)
    refused(InvalidSettings, "num_frames belongs to pictures and clips", "hear", num_frames=8)
    data["mixed"] = manifest(media, *lines_of("see"), *lines_of("watch"), name="mixed.jsonl")
    refused(ConversionError, "a picture in line 1 and a clip in line 4: ", "mixed", task="vqa")


def test_an_encoder_that_is_not_there_is_named(opt: OptBackbone, media: Path, tmp_path: Path) -> None:
    config = opt.config.model_copy(update={"ast": None})
    smaller = Opt(config)
    smaller.load_state_dict({k: v for k, v in opt.model.state_dict().items() if not k.startswith("ast.")})
    write_backbone(tmp_path / "deaf", smaller, opt.tokenizer, {})
    data = manifest(media, *lines_of("hear"), name="deaf.jsonl")
    with pytest.raises(MissingPart, match="this backbone has no ast, which perceives sounds"):
        trained(options(tmp_path / "deaf", data, tmp_path / "out", task="caption"))


# --- command line --------------------------------------------------------------------------------------------


def test_the_command_takes_every_option(opt_folder: Path, media: Path, tmp_path: Path) -> None:
    assert set(inspect.signature(train_commands.train).parameters) == set(TrainOptions.model_fields)
    data = manifest(media, *lines_of("watch"), name="command.jsonl")
    words = ["train", "--backbone", opt_folder, "--task", "vqa", "--data", data, "--out", tmp_path / "p", "--steps", 1]
    words += ["--start-layer", 0, "--end-layer", 4, "--injected-hidden-states", 2, "--shared-connector"]
    words += ["--text-step", 2, "--prompt-length", 2, "--no-prompt-mlp", "--answer-token", "", "--num-frames", 2]
    words += ["--device", "cpu", "--media-workers", 1, "--batch-size", 2]
    done = CliRunner().invoke(train_commands.app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    assert f"next: adapter-bank push {tmp_path / 'p'}" in done.output
    config = read_package(tmp_path / "p").config
    assert EPalmOptions.model_validate(config.options) == EPalmOptions(
        encoder="timesformer",
        start_layer_idx=0,
        end_layer_idx=4,
        injected_hidden_states=2,
        shared_connector=True,
        text_step=2,
        prompt_len=2,
        prompt_mlp=False,
        answer_token_id=None,
    )
    assert (config.rank, config.pixels.num_frames) == (1, 2)
    assert math.isclose(config.provenance["prompt_learning_rate"], 1e-3)  # type: ignore[arg-type]
