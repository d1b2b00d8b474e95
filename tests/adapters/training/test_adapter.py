"""An adapter in training: its start, its gradients, its momentum copy and queue, and what the bank makes of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.config import Task
from adapters.families.base import UniformAdaptation
from adapters.families.uniadapter import MEMORY_TERMS, SCALE, init_tensors
from adapters.package import write_package
from adapters.training.adapter import AnswerTraining, RetrievalTraining, TrainableAdapter
from adapters.training.loop import FitOptions, fit
from adapters.training.objectives import RetrievalSettings, encode_pairs, match_logits, retrieval_loss, vqa_loss
from service.backbone.blip import Blip
from service.bank import AdapterBank, fold_package
from service.metrics import Metrics
from tests.adapters.training.tiny import (
    DIMS,
    EMBED,
    WIDTH,
    adapter,
    answer_batch,
    blip,
    config,
    heads_of,
    retrieval_batch,
)

TASKS: tuple[Task, ...] = ("retrieval", "vqa")
FROZEN = RetrievalSettings(alpha=0.4, frame_aware=True)


def training(
    model: Blip, tuned: TrainableAdapter, *, queue_size: int = 0, ramp_steps: int = 0
) -> RetrievalTraining | AnswerTraining:
    if tuned.config.task == "vqa":
        return AnswerTraining(model, tuned, answer_batch)
    return RetrievalTraining(model, tuned, retrieval_batch, FROZEN, queue_size=queue_size, ramp_steps=ramp_steps)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_starts_as_the_released_trainers_start_it(task: Task) -> None:
    wide = replace(DIMS, width=256)
    large = config(task, rank=64, kv_rank=32)
    large = large.model_copy(update={"backbone": large.backbone.model_copy(update={"width": 256})})
    for name, tensor in init_tensors(large, wide, torch.Generator().manual_seed(0)).items():
        part, kind = name.split(".")[-2:]
        if name.endswith(".scale") or ("norm" in part and kind == "weight"):
            assert bool((tensor == 1).all()), name
        elif kind == "bias" or (task == "retrieval" and name.startswith("adapters.") and part == "up_proj"):
            assert bool((tensor == 0).all()), name
        elif task == "retrieval" and name.startswith("adapters.") and part == "down_proj":
            bound = 1 / math.sqrt(256)  # Kaiming uniform, a = sqrt(5), fan-in 256
            assert tensor.abs().max().item() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(tensor.mean().item()) < 0.002, name


@pytest.mark.parametrize("task", TASKS)
def test_a_fresh_adapter_is_not_the_identity(task: Task) -> None:
    """The cross-modal branch ends in a LayerNorm: its size is the scale, 0.1, however small the weights before it."""
    model = blip()
    fresh = adapter(model, task).adaptation()
    batch = answer_batch(0)
    y = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(3, 5, dtype=torch.bool)
    plain = model.encode_multimodal(batch.question_ids, batch.question_mask, y, seen, None)
    adapted = model.encode_multimodal(batch.question_ids, batch.question_mask, y, seen, fresh)
    change = (adapted - plain).square().mean().sqrt().item()
    assert 0.5 * SCALE < change < 5 * SCALE


def test_heads_start_as_the_backbones_and_are_its_own_copies() -> None:
    model = blip()
    tuned = adapter(model, "retrieval")
    for name, tensor in heads_of(model).items():
        assert torch.equal(tuned.tensors[name], tensor)
        assert tuned.tensors[name].data_ptr() != tensor.data_ptr()
    assert not {name for name in adapter(model, "vqa").tensors if "proj.weight" in name} & heads_of(model).keys()


def test_the_seed_decides_the_start() -> None:
    model = blip()
    first, again, other = (adapter(model, "vqa", seed=seed).package_tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_only_adapter_and_heads_get_gradients_and_the_backbone_stays_untouched(task: Task) -> None:
    model = blip()
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in model.named_parameters()}
    tuned = adapter(model, task, frame_aware=task == "retrieval")
    start = tuned.package_tensors()
    fit(tuned.parameters, training(model, tuned), FitOptions(steps=3, learning_rate=0.01, warmup_steps=0))

    assert set(tuned.parameters) == {name for name in tuned.tensors if "cross_modal" not in name}
    assert tuned.num_parameters == sum(p.numel() for p in tuned.parameters.values())
    for name, tensor in tuned.tensors.items():
        is_tuned = name in tuned.parameters
        assert (tensor.grad is not None) == is_tuned, name
        assert torch.equal(tensor, start[name]) == (not is_tuned), name
    for name, parameter in model.named_parameters():
        address, version, values = before[name]
        assert parameter.grad is None and parameter.data_ptr() == address and parameter._version == version, name
        assert torch.equal(parameter, values), name


def test_switched_off_parts_hold_nothing_to_train() -> None:
    model = blip()
    options = {"visual": False, "textual": True, "multimodal": False, "query_residual": True}
    small = config("vqa", kv_rank=None).model_copy(update={"options": options})
    tuned = TrainableAdapter(small, DIMS, heads_of(model), seed=0)
    assert {name.split(".")[2] for name in tuned.tensors} == {"adapter_layer_norm_before", "down_proj", "up_proj"}
    assert all(p.grad is None for p in tuned.parameters.values())
    vqa_loss(model, answer_batch(0), tuned.adaptation()).backward()
    assert all(p.grad is not None for p in tuned.parameters.values())


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_problem_that_repeats_falls(task: Task) -> None:
    model = blip()
    tuned = adapter(model, task)
    objective: RetrievalTraining | AnswerTraining
    if task == "vqa":
        objective = AnswerTraining(model, tuned, lambda step: answer_batch(0))
    else:
        settings = RetrievalSettings(alpha=0.0)
        objective = RetrievalTraining(model, tuned, lambda step: retrieval_batch(0), settings, momentum=0.5)
    totals: list[float] = []
    options = FitOptions(steps=60, learning_rate=0.02, warmup_steps=5)
    fit(tuned.parameters, objective, options, report=lambda progress: totals.append(sum(progress.losses.values())))
    assert sum(totals[-5:]) / 5 < 0.7 * totals[0]


# --- momentum, queue, ramp -------------------------------------------------------------------------------------------


def test_the_copy_follows_at_0_995() -> None:
    model = blip()
    tuned = adapter(model, "retrieval")
    objective = RetrievalTraining(model, tuned, retrieval_batch, RetrievalSettings())
    expected = {name: p.detach().double().clone() for name, p in tuned.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, tensor in tuned.tensors.items():
            with torch.no_grad():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            expected[name] = 0.995 * expected[name] + 0.005 * tensor.detach().double()
        objective.after_step()
    for name, tensor in objective.copy.tensors.items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_soft_targets_are_the_copys_and_carry_no_gradient_to_it() -> None:
    model = blip()
    tuned = adapter(model, "retrieval")
    objective = RetrievalTraining(model, tuned, retrieval_batch, RetrievalSettings(alpha=0.4))
    with torch.no_grad():
        for tensor in objective.copy.tensors.values():
            tensor.mul_(1.5)
    losses = objective.losses(0)
    with torch.no_grad():
        copy = encode_pairs(model, retrieval_batch(0), objective.copy.adaptation())
    generator = torch.Generator().manual_seed(0)
    expected = retrieval_loss(
        model, retrieval_batch(0), tuned.adaptation(), copy, RetrievalSettings(), alpha=0.4, generator=generator
    )
    assert torch.equal(losses["itc"], expected["itc"])
    sum(losses.values(), torch.zeros(())).backward()
    assert all(tensor.grad is None for tensor in objective.copy.tensors.values())


def test_alpha_ramps_up_linearly() -> None:
    model = blip()
    objective = RetrievalTraining(
        model, adapter(model, "retrieval"), retrieval_batch, RetrievalSettings(), ramp_steps=10
    )
    assert [objective.alpha(step) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    flat = RetrievalTraining(model, adapter(model, "retrieval"), retrieval_batch, RetrievalSettings())
    assert flat.alpha(0) == pytest.approx(0.4)


@pytest.mark.parametrize("size, batch", [(5, 2), (4, 4), (3, 8), (1, 3)])
def test_the_queue_is_a_ring_of_the_last_pairs(size: int, batch: int) -> None:
    model = blip()
    objective = RetrievalTraining(
        model, adapter(model, "retrieval"), retrieval_batch, RetrievalSettings(), queue_size=size
    )
    history: list[int] = []
    for step in range(4):
        ids = torch.arange(step * batch, (step + 1) * batch)
        rows = ids[:, None].float().expand(-1, EMBED)
        objective._enqueue(rows, -rows, ids)
        history += ids.tolist()
        state = objective.state()
        kept = sorted(state["queue.ids"][: min(size, len(history))].tolist())
        assert kept == history[-size:]
        filled = state["queue.ids"][: len(kept), None].float().expand(-1, EMBED)
        assert torch.equal(state["queue.clips"][: len(kept)], filled)
        assert torch.equal(state["queue.texts"][: len(kept)], -filled)
        assert int(state["queue.filled"]) == len(history)


def test_earlier_pairs_meet_a_batch_through_the_queue() -> None:
    model = blip()
    tuned = adapter(model, "retrieval")
    with_queue = RetrievalTraining(model, tuned, retrieval_batch, RetrievalSettings(), queue_size=4)
    without = RetrievalTraining(model, tuned, retrieval_batch, RetrievalSettings())
    assert torch.equal(with_queue.losses(0)["itc"], without.losses(0)["itc"])  # still empty
    later, alone = with_queue.losses(1)["itc"], without.losses(1)["itc"]
    assert later.item() > alone.item()  # four more columns, none of them a match


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_goes_on_to_bit_identical_parameters(tmp_path: Path, task: Task) -> None:
    model = blip()
    options = FitOptions(steps=7, learning_rate=0.01, warmup_steps=2, checkpoint_every=2)

    def run(stop_at: int | None, checkpoint: Path | None) -> tuple[int, dict[str, Tensor]]:
        tuned = adapter(model, task)
        objective = training(model, tuned, queue_size=6, ramp_steps=5)
        objective.batches = interrupted(objective.batches, stop_at)  # type: ignore[assignment]
        started = fit(tuned.parameters, objective, options, checkpoint=checkpoint)
        return started, tuned.package_tensors() | objective.state()

    _, whole = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(5, tmp_path / "run.ckpt")
    started, resumed = run(None, tmp_path / "run.ckpt")
    assert started == 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupted(batches: Callable[[int], object], stop_at: int | None) -> Callable[[int], object]:
    def batch(step: int) -> object:
        if step == stop_at:
            raise KeyboardInterrupt
        return batches(step)

    return batch


# --- served ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_bank_serves_what_was_trained(tmp_path: Path, task: Task) -> None:
    model = blip()
    tuned = adapter(model, task, frame_aware=task == "retrieval")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in tuned.tensors.values():  # the frozen norms too: a fold that forgot them would show
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    package = write_package(tmp_path / "package", tuned.config, tuned.package_tensors(), "# it\n", None)
    bank = AdapterBank(
        DIMS,
        heads_of(model),
        device=torch.device("cpu"),
        dtype=torch.float32,
        buckets=((8, 1),),
        host_bytes=2**20,
        metrics=Metrics(),
    )
    bank.put(fold_package(package, DIMS, torch.float32))
    lease = bank.lease(package.weights_digest)
    served, trained = (
        logits(model, task, UniformAdaptation(lease.view)),
        logits(model, task, tuned.adaptation()),
    )
    torch.testing.assert_close(served, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(served, logits(model, task, adapter(model, task).adaptation()), atol=1e-3)
    lease.release()


@torch.no_grad()
def logits(model: Blip, task: Task, adaptation: UniformAdaptation) -> Tensor:
    if task == "retrieval":
        batch = retrieval_batch(3)
        pairs = encode_pairs(model, batch, adaptation)
        order = torch.arange(4)
        return match_logits(model, batch.ids, batch.mask, pairs, order, order.flip(0), adaptation, True)
    asked = answer_batch(3)
    y = model.encode_vision(asked.pixels.flatten(0, 1), adaptation)[asked.clip_of_question]
    seen = torch.ones(y.shape[:2], dtype=torch.bool)
    states = model.encode_multimodal(asked.question_ids, asked.question_mask, y, seen, adaptation)
    return model.score_answers(
        states, asked.question_mask, asked.answer_ids, asked.answer_mask, asked.question_of_answer, adaptation
    )


def test_memory_terms_take_part() -> None:
    """The key and value adapters of both stacks are reached by a VQA step."""
    model = blip()
    tuned = adapter(model, "vqa")
    vqa_loss(model, answer_batch(0), tuned.adaptation()).backward()
    for stack in ("text", "decoder"):
        for term in MEMORY_TERMS:
            grad = tuned.tensors[f"{stack}.{term}.scale"].grad
            assert grad is not None and float(grad.abs().sum()) > 0
