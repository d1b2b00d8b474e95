"""Fit parameters to an objective: AdamW, warm-up, cosine decay, checkpoints that resume to the same numbers.

A step's batch depends on the step's number alone, so a run that resumes from a checkpoint sees the batches it would
have seen, and nothing about data loading has to be saved.
"""

import math
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from adapters.errors import InvalidPackage, NonFiniteTensor


@dataclass(frozen=True)
class FitOptions:
    """How long and how fast. `learning_rate` is the peak after `warmup_steps`; it decays to `final_ratio` of itself."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 50
    final_ratio: float = 0.02
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100


class Objective(Protocol):
    """What `fit` minimises."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Named scalar losses of step `step`; their sum is minimised."""

    def after_step(self) -> None:
        """Called after the optimizer's step (momentum copies follow here)."""

    def state(self) -> dict[str, Tensor]:
        """Everything beside the parameters that a resumed run needs."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


@dataclass(frozen=True)
class Progress:
    """One report: the step just done and its losses."""

    step: int
    steps: int
    losses: dict[str, float]


def learning_rate(step: int, options: FitOptions) -> float:
    """Linear warm-up, then cosine from `learning_rate` to `learning_rate * final_ratio`."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    floor = options.final_ratio
    return options.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def fit(
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    options: FitOptions,
    *,
    checkpoint: Path | None = None,
    settings: Mapping[str, JsonValue] | None = None,
    report: Callable[[Progress], None] | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> int:
    """Minimise the objective over `parameters`; returns the step it started from (0, or the checkpoint's).

    LayerNorm gains, biases and scales take no weight decay. A checkpoint is replaced atomically, and resumed only where
    the options, and `settings` (whatever else decides the numbers), are those it was written with.
    `context` surrounds every forward pass (autocast, a choice of attention kernel). `rate_of` is what a parameter's
    learning rate is multiplied by.
    Raises: InvalidPackage for a checkpoint that cannot be read or belongs to another run; NonFiniteTensor when a loss or
    gradient is no longer finite, before the parameters take it in.
    """
    optimizer = torch.optim.AdamW(_groups(parameters, options, rate_of), lr=options.learning_rate)
    settings = asdict(options) | dict(settings or {})
    start = _resume(checkpoint, parameters, objective, optimizer, settings)
    for step in range(start, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = group.get("rate", 1.0) * learning_rate(step, options)
        with context():
            losses = objective.losses(step)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), options.max_grad_norm)
        _check_finite(step, losses, norm)
        optimizer.step()
        objective.after_step()
        last = step + 1 == options.steps
        if checkpoint is not None and (last or (step + 1) % options.checkpoint_every == 0):
            _save(checkpoint, step + 1, parameters, objective, optimizer, settings)
        if report is not None:
            report(Progress(step + 1, options.steps, {name: loss.item() for name, loss in losses.items()}))
    return start


def _groups(
    parameters: Mapping[str, nn.Parameter], options: FitOptions, rate_of: Callable[[str], float]
) -> list[dict[str, Any]]:
    """The parameters by learning rate, and of each rate those that decay before those that do not."""
    groups: list[dict[str, Any]] = []
    for rate in sorted({rate_of(name) for name in parameters}, reverse=True):
        own = [p for name, p in parameters.items() if rate_of(name) == rate]
        decayed, plain = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
        groups += [
            {"params": decayed, "weight_decay": options.weight_decay, "rate": rate},
            {"params": plain, "weight_decay": 0.0, "rate": rate},
        ]
    return groups


def _check_finite(step: int, losses: Mapping[str, Tensor], norm: Tensor) -> None:
    values = {name: loss.item() for name, loss in losses.items()} | {"gradient": norm.item()}
    if not all(math.isfinite(value) for value in values.values()):
        listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise NonFiniteTensor(f"training diverged at step {step + 1} ({listed}); a lower learning rate may help")


def _save(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, JsonValue],
) -> None:
    state = {
        "step": step,
        "settings": dict(settings),
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "objective": objective.state(),
        "optimizer": optimizer.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(scratch, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _resume(
    path: Path | None,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, JsonValue],
) -> int:
    if path is None or not path.exists():
        return 0
    state = _read(path)
    _check_same_run(path, state, parameters, settings)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    objective.load_state(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a dozen kinds of bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidPackage(f"cannot read the checkpoint {path.name}: {reason}", param="checkpoint") from error
    if not isinstance(state, dict) or not {"step", "parameters", "objective", "optimizer"} <= state.keys():
        raise InvalidPackage(f"{path.name} is no checkpoint of a training run", param="checkpoint")
    return state


def _check_same_run(
    path: Path, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], settings: Mapping[str, JsonValue]
) -> None:
    """Raises: InvalidPackage naming what differs from the run that wrote the checkpoint."""
    written = state.get("settings", settings)  # early checkpoints have none
    differing = [
        f"{name}: {written.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted((written.keys() | settings.keys()) - {"checkpoint_every"})
        if written.get(name) != settings.get(name)
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in state["parameters"].items()}
    if not differing and shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        differing = ["its parameters have other names or shapes"]
    if differing:
        raise InvalidPackage(
            f"the checkpoint {path.name} belongs to another run ({'; '.join(differing)}); repeat that run's options, or "
            "remove the file to start anew",
            param="checkpoint",
        )
