"""The optimiser's loop on a model of a few numbers: schedule, checkpoints, resumption, refusals."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.errors import InvalidPackage, NonFiniteTensor
from adapters.training.loop import FitOptions, Progress, fit, learning_rate

OPTIONS = FitOptions(steps=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=3)


class Line:
    """Fit weight * x + bias to noise that depends on the step; counts its steps as a state of its own."""

    def __init__(self, stop_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 2, generator=generator)
        self.parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(torch.zeros(3))}
        self.count = torch.zeros(())
        self.stop_at = stop_at

    def losses(self, step: int) -> dict[str, Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(5, 2, generator=generator), torch.randn(5, 3, generator=generator)
        error = x @ self.parameters["weight"].t() + self.parameters["bias"] - y
        return {"square": error.square().mean(), "mean": error.mean().square() * (1 + self.count)}

    def after_step(self) -> None:
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.count.copy_(state["count"])


def run(line: Line, checkpoint: Path | None = None, options: FitOptions = OPTIONS) -> int:
    return fit(line.parameters, line, options, checkpoint=checkpoint, settings={"seed": 1})


def test_the_rate_warms_up_linearly_and_decays_as_a_cosine_to_its_floor() -> None:
    options = FitOptions(steps=110, learning_rate=2.0, warmup_steps=10, final_ratio=0.1)
    assert [learning_rate(step, options) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(60, options) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(110, options) == learning_rate(500, options) == pytest.approx(0.2)
    quarter = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(35, options) == pytest.approx(quarter)


def test_a_resumed_run_ends_with_bit_identical_parameters(tmp_path: Path) -> None:
    whole = Line()
    assert run(whole) == 0
    path = tmp_path / "deep" / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        run(Line(stop_at=7), path)
    assert [file.name for file in path.parent.iterdir()] == ["run.ckpt"]
    resumed = Line()
    with torch.no_grad():
        resumed.parameters["weight"].zero_()  # all of it comes from the checkpoint
    assert run(resumed, path) == 6
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    assert torch.equal(whole.count, resumed.count)
    assert run(Line(), path) == OPTIONS.steps  # nothing is left to do


def test_matrices_decay_and_vectors_do_not() -> None:
    """Without gradient the one thing AdamW does is decay: weight <- weight * (1 - rate * decay)."""
    line = Line()
    start = {name: p.detach().clone() for name, p in line.parameters.items()}

    class Still(Line):
        def losses(self, step: int) -> dict[str, Tensor]:
            return {"zero": 0.0 * (line.parameters["weight"].sum() + line.parameters["bias"].sum())}

    with torch.no_grad():
        line.parameters["bias"].fill_(1.0)
    fit(line.parameters, Still(), FitOptions(steps=1, learning_rate=0.5, weight_decay=0.1, warmup_steps=0))
    torch.testing.assert_close(line.parameters["weight"].detach(), start["weight"] * 0.95)
    assert torch.equal(line.parameters["bias"].detach(), torch.ones(3))


def test_every_step_is_reported_after_its_checkpoint(tmp_path: Path) -> None:
    line, reports = Line(), list[Progress]()
    seen: list[bool] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        seen.append((tmp_path / "c").exists())

    fit(line.parameters, line, OPTIONS, checkpoint=tmp_path / "c", report=report)
    assert [r.step for r in reports] == list(range(1, 9)) and {r.steps for r in reports} == {8}
    assert reports[0].losses.keys() == {"square", "mean"}
    assert seen == [False, False, True, True, True, True, True, True]


def test_another_runs_checkpoint_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run(Line(), path)
    with pytest.raises(InvalidPackage, match="steps: 8, now 9"):
        run(Line(), path, replace(OPTIONS, steps=9))
    line = Line()
    with pytest.raises(InvalidPackage, match="seed: 1, now 2"):
        fit(line.parameters, line, OPTIONS, checkpoint=path, settings={"seed": 2})
    wider = Line()
    wider.parameters["bias"] = nn.Parameter(torch.zeros(4))
    with pytest.raises(InvalidPackage, match="other names or shapes"):
        run(wider, path)
    assert run(Line(), path, replace(OPTIONS, checkpoint_every=1)) == 8  # does not touch the numbers


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.ckpt"
    if content is None:
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidPackage, match=r"run\.ckpt"):
        run(Line(), path)


def test_a_diverging_run_stops_before_the_parameters_take_it_in() -> None:
    class Diverging(Line):
        def losses(self, step: int) -> dict[str, Tensor]:
            losses = super().losses(step)
            return {"square": losses["square"] * (float("nan") if step == 2 else 1.0)}

    line = Diverging()
    with pytest.raises(NonFiniteTensor, match="step 3"):
        run(line)
    assert all(bool(torch.isfinite(p).all()) for p in line.parameters.values())
    assert line.count.item() == 2
