"""Validation: what is sound passes in every serving dtype, what is not fails by name, and the bank is left as it was."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from adapters.config import BASE_ADAPTER
from adapters.errors import (
    BackboneMismatch,
    InvalidPackage,
    MissingPart,
    NonFiniteTensor,
    ProbeFailed,
    RankTooLarge,
    TensorMismatch,
)
from adapters.families.base import HEADS
from adapters.families.uniadapter import init_tensors
from adapters.package import Package, package_files, parse_package, read_package
from adapters.probe import parse_probe
from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.bank import AdapterBank, fold_package
from service.errors import DeadlineExceeded
from service.home import push_package
from service.lifecycle.validate import (
    EXAGGERATION,
    LAST_DIGIT,
    LEAST_EFFECT,
    NOISE_MARGIN,
    TOLERANCE,
    ProbeReport,
    compute_probe,
    validate,
)
from service.lifecycle.writing import write_probed_package
from service.pipelines.stage_set import AnyStages
from service.types import GenerateDecode, MediaBytes, RankDecode, VqaQuery
from tests.service.lifecycle.packages import KINDS, Kind, forged, package_of, probed, stages_of, zeroed
from tests.service.test_bank import holders, slot_leases
from tests.service.worlds import PATCH, Service, World, context, picture, running, write_tiny_backbone

T = TypeVar("T")

PARTS = [(name, part) for name, kind in KINDS.items() for part in kind.parts]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def residency(bank: AdapterBank) -> dict[str, set[str]]:
    return {tier: set(digests) for tier, digests in bank.residency().items()}


def assert_clean(stages: AnyStages) -> None:
    """Nothing of a validation is left, anywhere."""
    bank = stages.bank
    assert not [digest for tier in residency(bank).values() for digest in tier if not digest.startswith("sha256:")]
    assert holders(bank) == slot_leases(bank) == 0
    assert bank._host_used == sum(bank.residency()["host"].values())


# --- what is sound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_passes_with_the_probe_it_was_written_with(
    name: str, backbone: Backbone, stages: AnyStages
) -> None:
    package = probed(package_of(backbone, KINDS[name]), stages)
    report = run(validate(package, stages))
    assert set(report.changes) == set(KINDS[name].parts)
    assert max(report.errors.values()) < 1e-6
    assert report.noise < 1e-6 < min(report.changes.values())
    assert report.dtype == "float32" and max(report.effects.values()) > LEAST_EFFECT
    assert_clean(stages)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_passes_in_a_lower_precision(
    name: str, backbone: Backbone, stages: AnyStages, lower: AnyStages
) -> None:
    report = run(validate(probed(package_of(backbone, KINDS[name]), stages), lower))
    assert max(report.errors.values()) > 1e-5
    assert_clean(lower)


def test_a_part_that_only_float32_can_see_is_no_failure_in_a_lower_precision(
    backbone: Backbone, stages: AnyStages, lower: AnyStages
) -> None:
    """At the start of training the visual branch moves an answer's score by a few millionths."""
    kind = KINDS["vqa"]
    fresh = init_tensors(kind.config(backbone), backbone.dims(), torch.Generator().manual_seed(0))
    package = probed(package_of(backbone, kind, tensors=fresh), stages)
    assert run(validate(package, stages)).changes["visual"] < 1e-4
    report = run(validate(package, lower))
    if report.dtype == "bfloat16":
        assert report.changes["visual"] == 0


def test_a_head_may_equal_the_backbones(backbone: Backbone, stages: AnyStages) -> None:
    kind = KINDS["retrieval-frames-kv-heads"]
    package = package_of(backbone, kind)
    heads = {name: head.clone() for name, head in backbone.head_tensors().items()}
    same = probed(package_of(backbone, kind, tensors=package.tensors | heads), stages)
    assert set(HEADS) <= set(run(validate(same, stages)).changes)


def test_stored_precision_does_not_matter(backbone: Backbone, stages: AnyStages) -> None:
    half = {name: tensor.half() for name, tensor in package_of(backbone, KINDS["vqa-kv"]).tensors.items()}
    package = probed(package_of(backbone, KINDS["vqa-kv"], tensors=half), stages)
    assert max(run(validate(package, stages)).errors.values()) < 1e-6


def test_an_adapter_for_pictures_alone_has_a_probe_of_one_frame(backbone: Backbone, stages: AnyStages) -> None:
    config = KINDS["vqa"].config(backbone)
    config = config.model_copy(update={"preprocessing": config.preprocessing.model_copy(update={"num_frames": 1})})
    package = parse_package(package_files(config, package_of(backbone, KINDS["vqa"]).tensors, ""))
    single = probed(package, stages)
    assert single.probe is not None and len(single.probe["pixels"]) == 1
    run(validate(single, stages))


# --- what is dead --------------------------------------------------------------------------------------------


def without(backbone: Backbone, name: str, part: str) -> Package:
    return zeroed(package_of(backbone, KINDS[name]), KINDS[name].tensors_of(part, backbone))


@pytest.mark.parametrize("name, part", PARTS)
def test_a_dead_part_is_named(name: str, part: str, backbone: Backbone, stages: AnyStages) -> None:
    """Whether the probe is being written, or was written by somebody who did not look."""
    package = without(backbone, name, part)
    with pytest.raises(ProbeFailed, match=rf"change nothing: .*\b{part} \(0\)|does what the backbone does") as refused:
        run(compute_probe(package, stages))
    with pytest.raises(ProbeFailed) as failed:
        run(validate(forged(package, stages), stages))
    assert failed.value.message == refused.value.message
    assert_clean(stages)


@pytest.mark.parametrize("part", ["visual", "decoder.video_key_adapter", "multimodal"])
def test_a_dead_part_is_named_in_a_lower_precision(
    part: str, backbone: Backbone, stages: AnyStages, lower: AnyStages
) -> None:
    package = without(backbone, "vqa-kv", part)
    with pytest.raises(ProbeFailed, match=rf"change nothing: .*\b{part} \(0\)"):
        run(validate(forged(package, stages), lower))
    assert_clean(lower)


@pytest.mark.parametrize("name", ["vqa", "retrieval-frames"])
def test_an_adapter_that_adds_nothing_equals_the_backbone(name: str, backbone: Backbone, stages: AnyStages) -> None:
    package = package_of(backbone, KINDS[name])
    package = zeroed(package, package.tensors)
    with pytest.raises(ProbeFailed, match="does what the backbone does without it"):
        run(compute_probe(package, stages))
    with pytest.raises(ProbeFailed, match="does what the backbone does without it"):
        run(validate(forged(package, stages), stages))


def test_a_retrieval_adapter_that_was_never_trained_is_told_from_a_trained_one(
    backbone: Backbone, stages: AnyStages
) -> None:
    """Its text up-projections start at zero; the cross-modal norm makes it differ from the backbone all the same."""
    kind = KINDS["retrieval"]
    fresh = init_tensors(kind.config(backbone), backbone.dims(), torch.Generator().manual_seed(0))
    with pytest.raises(ProbeFailed, match=r"change nothing: textual \(0\)\. "):
        run(compute_probe(package_of(backbone, kind, tensors=fresh), stages))


def test_a_part_that_its_own_options_cut_off_is_dead(backbone: Backbone, stages: AnyStages) -> None:
    """No text is read without a picture in vqa: without the query residual the text branch has nowhere to act."""
    cut_off = Kind(options={"multimodal": False, "query_residual": False})
    with pytest.raises(ProbeFailed, match=r"change nothing: textual \(0\)\. "):
        run(compute_probe(package_of(backbone, cut_off), stages))


def test_a_head_that_the_task_never_runs_is_dead(backbone: Backbone, stages: AnyStages) -> None:
    with pytest.raises(ProbeFailed, match=r"change nothing: itm_head \(0\)\. "):
        run(compute_probe(package_of(backbone, Kind(heads=("itm_head",))), stages))


# --- what is not what its probe says -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vqa-kv", "retrieval-frames-kv-heads"])
def test_weights_that_changed_after_the_probe_was_written_fail(
    name: str, backbone: Backbone, stages: AnyStages
) -> None:
    package = probed(package_of(backbone, KINDS[name]), stages)
    other = {**package.tensors, "adapters.1.up_proj.weight": -package.tensors["adapters.1.up_proj.weight"]}
    output = "scores" if KINDS[name].task == "vqa" else "match"
    with pytest.raises(ProbeFailed, match=rf"{output} by 0\.\d+.*; 0\.001 is allowed in float32"):
        run(validate(replace(package, tensors=other), stages))
    assert_clean(stages)


def test_the_probe_of_another_adapter_fails_in_every_precision(
    backbone: Backbone, stages: AnyStages, lower: AnyStages
) -> None:
    mine, yours = (package_of(backbone, KINDS["retrieval-kv"], seed=seed) for seed in (1, 2))
    package = replace(mine, probe=probed(yours, stages).probe)
    for each in (stages, lower):
        with pytest.raises(ProbeFailed, match="does not give what its probe expects"):
            run(validate(package, each))


def test_frame_weights_are_part_of_what_is_checked(backbone: Backbone, stages: AnyStages) -> None:
    weighed = probed(package_of(backbone, KINDS["retrieval-frames-kv-heads"]), stages)
    unweighed = weighed.config.model_copy(
        update={"options": {**weighed.config.options, "frame_aware_attention": False}}
    )
    with pytest.raises(ProbeFailed, match=r"match by 0\.\d+; "):
        run(validate(replace(weighed, config=unweighed), stages))


def test_the_backbone_in_the_adapters_place_fails(backbone: Backbone, stages: AnyStages) -> None:
    """A server that forgot the adapter: the probe is the backbone's, the weights are not."""
    package = package_of(backbone, KINDS["vqa"])
    nothing = forged(zeroed(package, package.tensors), stages)
    with pytest.raises(ProbeFailed, match="does not give what its probe expects"):
        run(validate(replace(package, probe=nothing.probe), stages))


def test_a_package_without_a_probe_fails(backbone: Backbone, stages: AnyStages) -> None:
    with pytest.raises(ProbeFailed, match="carries no probe; `adapter-bank probe` computes one"):
        run(validate(package_of(backbone, KINDS["vqa"]), stages))


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    "error, change, message",
    [
        (NonFiniteTensor, lambda t: t["expected.scores"].fill_(float("nan")), r"expected\.scores"),
        (TensorMismatch, lambda t: t.pop("answer_ids"), "lacks answer_ids"),
        (TensorMismatch, lambda t: t.update(more=torch.ones(1)), "holds more"),
        (InvalidPackage, lambda t: t.update(pixels=t["pixels"][..., :1, :1]), "1 squares a side"),
        (
            InvalidPackage,
            lambda t: t["text_ids"].__setitem__((0, 1), 10**6),
            "text_ids are not what this backbone reads",
        ),
        (InvalidPackage, lambda t: t["text_ids"].__setitem__((0, 1), -1), "text_ids are not what this backbone reads"),
        (InvalidPackage, lambda t: t["answer_ids"].__setitem__((1, 2), 10**6), "answer_ids are not what"),
        (InvalidPackage, lambda t: t.update(answer_ids=t["answer_ids"].repeat(1, 9)), "answer_ids are not what"),
    ],
)
def test_what_could_not_be_run_is_refused_before_it_runs(
    error: type[InvalidPackage], change: Change, message: str, backbone: Backbone, stages: AnyStages
) -> None:
    probe = {
        name: tensor.clone()
        for name, tensor in (probed(package_of(backbone, KINDS["vqa"]), stages).probe or {}).items()
    }
    change(probe)
    last = stages.engine.last_forward_at
    with pytest.raises(error, match=message):
        run(validate(replace(package_of(backbone, KINDS["vqa"]), probe=probe), stages))
    assert stages.engine.last_forward_at == last


def test_expected_features_of_another_size_are_told(backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["retrieval"]), stages)
    assert package.probe is not None
    narrow = {n: t[:, :5] if n in ("expected.frames", "expected.texts") else t for n, t in package.probe.items()}
    with pytest.raises(ProbeFailed, match=r"expects frames of shape \[2, 5\], and the adapter gives \[2, 8\]"):
        run(validate(replace(package, probe=narrow), stages))


def test_what_cannot_be_served_is_refused_as_the_loader_refuses_it(
    backbone: Backbone, stages: AnyStages, tmp_path: Path
) -> None:
    package = probed(package_of(backbone, KINDS["vqa"]), stages)
    with stages_of(backbone, ((2, 1),)) as narrow:
        with pytest.raises(RankTooLarge, match="rank 4"):
            run(validate(package, narrow))
    broken = {name: tensor for name, tensor in package.tensors.items() if name != "adapters.0.down_proj.bias"}
    with pytest.raises(TensorMismatch, match=r"missing: adapters\.0\.down_proj\.bias"):
        run(validate(replace(package, tensors=broken), stages))
    write_tiny_backbone(tmp_path / "other", with_decoder=False)
    with stages_of(load_backbone(tmp_path / "other")) as other:
        with pytest.raises((MissingPart, BackboneMismatch)):
            run(validate(package, other))


def test_retrieval_without_projections_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path / "headless", with_heads=False)
    headless = load_backbone(tmp_path / "headless")
    kind = Kind("retrieval", heads=HEADS)
    config = kind.config(headless)
    shapes = {"vision_proj": 1, "text_proj": 1, "itm_head": 2}
    package = package_of(headless, Kind("retrieval"))
    tensors = dict(package.tensors)
    for head, size in shapes.items():
        tensors |= {f"{head}.weight": torch.ones(size, 16), f"{head}.bias": torch.ones(size)}
    whole = parse_package(package_files(config, tensors, ""))
    with stages_of(headless) as stages, pytest.raises(MissingPart, match="no projections"):
        run(compute_probe(whole, stages))


def test_probes_are_computed_in_float32_alone(backbone: Backbone, lower: AnyStages) -> None:
    with pytest.raises(ProbeFailed, match=r"a probe is computed in float32, not in b?float16"):
        run(compute_probe(package_of(backbone, KINDS["vqa"]), lower))


def test_numbers_that_run_away_are_told(backbone: Backbone, stages: AnyStages) -> None:
    package = package_of(backbone, KINDS["vqa"])
    huge = {name: tensor * (1e38 if "cross_modal" in name else 1.0) for name, tensor in package.tensors.items()}
    with pytest.raises(ProbeFailed, match="come out as NaN or infinite"):
        run(compute_probe(package_of(backbone, KINDS["vqa"], tensors=huge), stages))


def test_the_guide_names_every_threshold() -> None:
    guide = " ".join((Path(__file__).parents[3] / "docs" / "adapters.md").read_text().split())
    for dtype, tolerance in TOLERANCE.items():
        assert f"| `{str(dtype).removeprefix('torch.')}` | {tolerance:g} |" in guide
    assert f"at least differs by {LEAST_EFFECT:g} from" in guide
    assert f"by more than {LAST_DIGIT:g}, and by more than {NOISE_MARGIN:g} times".replace("1e-07", "1e-7") in guide
    assert f"exaggerated {EXAGGERATION:g} times" in guide


# --- what is left of it --------------------------------------------------------------------------------------


def resident(backbone: Backbone, bank: AdapterBank, *seeds: int) -> list[str]:
    """Adapters on the host that nobody holds."""
    digests = []
    for seed in seeds:
        adapter = fold_package(package_of(backbone, KINDS["vqa"], seed=seed), backbone.dims(), bank.dtype)
        bank.put(adapter)
        digests.append(adapter.digest)
    return digests


def test_one_slot_is_enough_and_whoever_had_it_is_served_again(backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["vqa-kv"]), stages)
    with stages_of(backbone, ((4, 1),)) as tight:
        bank = tight.bank
        (digest,) = resident(backbone, bank, 5)
        bank.lease(digest).release()
        run(validate(package, tight))
        assert_clean(tight)
        assert residency(bank)["host"] == {digest}
        bank.lease(digest).release()
        assert residency(bank)["device"] == {digest}


def test_empty_slots_are_used_before_anybodys(backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["vqa-kv"]), stages)
    with stages_of(backbone, ((4, 2),)) as roomy:
        (digest,) = resident(backbone, roomy.bank, 5)
        roomy.bank.lease(digest).release()
        run(validate(package, roomy))
        assert residency(roomy.bank) == {"device": {digest}, "host": {digest}}


def test_a_slot_in_use_is_waited_for_and_never_taken(backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["vqa"]), stages)

    async def story(tight: AnyStages) -> None:
        bank = tight.bank
        (digest,) = resident(backbone, bank, 5)
        assert bank.hold(digest)
        lease = bank.lease(digest)
        before = {name: tensor.clone() for name, tensor in lease.view.tensors.items()}
        task = asyncio.create_task(validate(package, tight))
        await asyncio.sleep(0.2)
        assert not task.done()
        assert residency(bank)["device"] == {digest}
        assert all(torch.equal(lease.view.tensors[name], tensor) for name, tensor in before.items())
        lease.release()
        await task
        bank.release(digest)

    with stages_of(backbone, ((4, 1),)) as tight:
        asyncio.run(story(tight))
        assert_clean(tight)


def test_a_validation_that_takes_too_long_ends_and_leaves_nothing(backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["vqa"]), stages)
    with pytest.raises(DeadlineExceeded):
        run(validate(package, stages, timeout_s=0.0))
    assert_clean(stages)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.03])
def test_a_validation_that_is_cancelled_leaves_nothing(after_s: float, backbone: Backbone, stages: AnyStages) -> None:
    package = probed(package_of(backbone, KINDS["retrieval-frames-kv-heads"]), stages)

    async def story() -> None:
        task = asyncio.create_task(validate(package, stages))
        await asyncio.sleep(after_s)
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(outcome, (asyncio.CancelledError, ProbeReport))

    asyncio.run(story())
    while slot_leases(stages.bank):  # of the batch that was running
        time.sleep(0.001)
    assert_clean(stages)


def test_several_validations_at_once_do_not_meet(backbone: Backbone, stages: AnyStages) -> None:
    packages = [probed(package_of(backbone, kind), stages) for kind in KINDS.values()]

    async def story() -> list[ProbeReport]:
        return await asyncio.gather(*[validate(package, stages) for package in (*packages, *packages)])

    reports = asyncio.run(story())
    assert all(max(report.errors.values()) < 1e-5 for report in reports)
    assert_clean(stages)


def test_answers_given_meanwhile_are_those_given_before(
    world: World, backbone: Backbone, stages: AnyStages, tmp_path: Path
) -> None:
    """Few slots, so that validations and requests take them from each other all the time."""
    packages = [probed(package_of(backbone, KINDS[name], seed=9), stages) for name in ("vqa-kv", "retrieval-frames")]
    decodes = (RankDecode(), GenerateDecode())
    queries = [
        VqaQuery(adapter, "what is red?", MediaBytes("image", picture(number)), decode)
        for number, adapter in enumerate(("ask", "tell", "look", BASE_ADAPTER))
        for decode in (decodes[number % 2],)
        if not (adapter == BASE_ADAPTER and isinstance(decode, RankDecode))
    ]

    async def answers(service: Service) -> list[tuple[str, float]]:
        found = [service.runtime.vqa.answer(query, context()) for query in queries]
        return [(answer.answer, answer.score) for answer in await asyncio.gather(*found)]

    async def both(service: Service) -> tuple[list[list[tuple[str, float]]], list[ProbeReport]]:
        tasks = [asyncio.create_task(validate(package, service.runtime.stages.on(""))) for package in packages * 2]
        rounds = []
        while not all(task.done() for task in tasks):
            rounds.append(await answers(service))
        return rounds, [await task for task in tasks]

    with running(world.copy(tmp_path, slots="4:1,8:1").settings) as service:
        before = service.call(answers(service))
        rounds, reports = service.call(both(service))
        assert len(reports) == 4 and len(rounds) > 1
        for each in rounds:
            assert [answer for answer, _ in each] == [answer for answer, _ in before]
            torch.testing.assert_close(
                torch.tensor([score for _, score in each]), torch.tensor([s for _, s in before]), rtol=1e-5, atol=1e-5
            )
        assert_clean(service.runtime.stages.on(""))


def test_a_probe_says_what_a_request_is_answered(
    world: World, backbone: Backbone, stages: AnyStages, tmp_path: Path
) -> None:
    """Its clip as a picture, its words as text: the ranked answers of the running service have the expected scores."""
    config = KINDS["vqa"].config(backbone)
    preprocessing = config.preprocessing.model_copy(update={"num_frames": 1})
    config = config.model_copy(update={"preprocessing": preprocessing})
    tensors = package_of(backbone, KINDS["vqa"]).tensors
    write_probed_package(tmp_path / "package", config, tensors, "# A test\n", backbone)
    probe = parse_probe(read_package(tmp_path / "package").probe or {}, config)
    squares = probe.inputs.medium[0].repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    file = BytesIO()
    Image.fromarray(squares.permute(1, 2, 0).numpy()).save(file, "PNG")
    candidates = tuple(backbone.detokenize(ids) for ids in probe.inputs.answers())
    questions = [backbone.detokenize(ids) for ids in probe.inputs.texts()]
    assert [backbone.tokenize(question).ids for question in questions] == list(probe.inputs.texts())
    copied = world.copy(tmp_path)
    push_package(copied.settings, tmp_path / "package", "probed")
    with running(copied.settings) as service:
        for row, question in enumerate(questions):
            query = VqaQuery("probed", question, MediaBytes("image", file.getvalue()), RankDecode(candidates, 4))
            answer = service.call(service.runtime.vqa.answer(query, context()))
            scores = {answer.index: answer.score} | {other.index: other.score for other in answer.alternatives}
            found = torch.tensor([scores[index] for index in range(4)])
            torch.testing.assert_close(found, probe.outputs["scores"][row], rtol=1e-5, atol=1e-5)
