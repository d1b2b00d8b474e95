"""Whether an adapter computes here what its probe says, and whether every tuned part of it does something.

All comparisons are of outputs by name: the largest difference, relative to the output's scale (its largest magnitude).
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.config import BASE_ADAPTER
from adapters.errors import ProbeFailed
from adapters.families import family_of
from adapters.package import PROBE_FILE, WEIGHTS_FILE, Package, check_tensors
from adapters.probe import Probe, ProbeInputs, parse_probe
from service.lifecycle.probe import Outputs, check_inputs, inputs_for, lodged, outputs_of
from service.loader import Pin, check_servable
from service.pipelines.stage_set import AnyStages
from service.types import BASE_INFO, RequestContext

# How far outputs may be from the expected ones, by serving dtype; the expected ones are float32.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The backbone alone must be this far away in every dtype: clearly more than float32's tolerance.
LEAST_EFFECT = 2e-3
# Without a part that matters an output changes by more than float32's last digit, and by more than so many times what two
# runs of the same adapter differ by.
LAST_DIGIT = 1e-7
NOISE_MARGIN = 4.0
# A lower precision may hide a small part that float32 shows: there it is exaggerated instead. A power of two is exact.
EXAGGERATION = 1024.0
LEAST_SCALE = {"match": 1.0, "scores": 1.0, "first_words": 1.0}  # logits and log-probabilities: 1 is no small change
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ProbeReport:
    """How a package fared. All figures are differences relative to the scale of the output.

    errors       by output: from the expected
    effects      by output: from the backbone alone
    changes      by tuned part (groups of sites, heads): the largest over all outputs, when the part is taken away
    noise        the largest over all outputs: between two runs of the adapter
    """

    dtype: str
    errors: Mapping[str, float]
    effects: Mapping[str, float]
    changes: Mapping[str, float]
    noise: float


async def validate(package: Package, stages: AnyStages, *, timeout_s: float = TIMEOUT_S) -> ProbeReport:
    """Check a package on the engine that would serve it. Runs as background work and leaves nothing in the bank.

    Raises: ProbeFailed naming the output or the part and by how much it is off; InvalidPackage and its other kinds,
    MissingPart, RankTooLarge for what cannot be served at all; DeadlineExceeded and NotReady when the engine could not
    run it, which says nothing about the package; EngineFailed when a stage broke down on it.
    """
    _check_servable(package, stages)
    if package.probe is None:
        raise ProbeFailed("the package carries no probe; `adapter-bank probe` computes one", param=PROBE_FILE)
    probe = parse_probe(package.probe, package.config)
    trial = _Trial(package, probe.inputs, stages, timeout_s)
    own = await trial.run(package)
    return await trial.examine(own, _checked_errors(own, probe.outputs, stages.backbone.dtype))


async def compute_probe(package: Package, stages: AnyStages, *, timeout_s: float = TIMEOUT_S) -> Probe:
    """A new probe of a package, whatever probe it carries. The engine's backbone must be float32.

    Raises: ProbeFailed when the adapter, or a tuned part of it, does nothing; what `validate` raises.
    """
    if stages.backbone.dtype != torch.float32:
        raise ProbeFailed(f"a probe is computed in float32, not in {_name(stages.backbone.dtype)}", param=PROBE_FILE)
    _check_servable(package, stages)
    inputs = inputs_for(package.config, stages.backbone)
    trial = _Trial(package, inputs, stages, timeout_s)
    own = await trial.run(package)
    await trial.examine(own, dict.fromkeys(own, 0.0))
    return Probe(inputs, own)


def _check_servable(package: Package, stages: AnyStages) -> None:
    dims = stages.backbone.dims()
    check_servable(package.config, stages.backbone, stages.bank)
    check_tensors(package.config, package.tensors, dims)


class _Trial:
    """A package and its variants on one set of inputs, one after another."""

    def __init__(self, package: Package, inputs: ProbeInputs, stages: AnyStages, timeout_s: float) -> None:
        check_inputs(inputs, package.config, stages.backbone)
        self._package = package
        self._inputs = inputs
        self._stages = stages
        self._dtype = stages.backbone.dtype
        self._deadline = time.monotonic() + timeout_s

    async def run(self, variant: Package | None) -> Outputs:
        """Outputs of a variant; of the backbone alone for None."""
        if variant is None:
            return await self._run(Pin(BASE_INFO, BASE_ADAPTER, None, self._stages.hosted.name))
        async with lodged(variant, self._stages) as pin:
            return await self._run(pin)

    async def _run(self, pin: Pin) -> Outputs:
        context = RequestContext(self._deadline, client="probe", background=True, alone=True)
        return await outputs_of(self._inputs, self._package.config, pin, self._stages, context)

    async def examine(self, own: Outputs, errors: Mapping[str, float]) -> ProbeReport:
        """Compare the adapter's `own` outputs, off by `errors`, with the backbone's and with those of every variant.

        Raises: ProbeFailed.
        """
        for name, output in own.items():
            if not bool(torch.isfinite(output).all()):
                raise ProbeFailed(f"the probe's {name} come out as NaN or infinite", param=WEIGHTS_FILE)
        effects = _differences(await self.run(None), own)
        self._check_effects(effects)
        noise = _largest(await self.run(self._package), own)
        changes = await self._changes(own, max(LAST_DIGIT, NOISE_MARGIN * noise))
        return ProbeReport(_name(self._dtype), errors, effects, changes, noise)

    def _check_effects(self, effects: Mapping[str, float]) -> None:
        if max(effects.values()) < LEAST_EFFECT:
            found = ", ".join(f"{name} by {effect:.2g}" for name, effect in effects.items())
            raise ProbeFailed(
                f"the adapter does what the backbone does without it. Of their scale the probe's outputs differ: {found}; "
                f"one of them must by {LEAST_EFFECT:g}",
                param=WEIGHTS_FILE,
            )

    async def _changes(self, own: Outputs, least: float) -> dict[str, float]:
        """By tuned part, how much changes without it. Raises: ProbeFailed naming those that change nothing."""
        changes: dict[str, float] = {}
        dead = []
        for part, names in self._tuned_parts().items():
            changes[part] = _largest(await self.run(self._scaled(names, 0.0)), own)
            is_alive = changes[part] > least
            if not is_alive and self._dtype != torch.float32:
                is_alive = _largest(await self.run(self._scaled(names, EXAGGERATION)), own) > least
            if not is_alive:
                dead.append(f"{part} ({changes[part]:.2g})")
        if dead:
            raise ProbeFailed(
                f"tuned parts of the adapter that change nothing: {', '.join(dead)}. In brackets, by how much of its "
                f"scale an output of the probe changes without the part; {least:.2g} is no change",
                param=WEIGHTS_FILE,
            )
        return changes

    def _tuned_parts(self) -> dict[str, tuple[str, ...]]:
        """Names of tensors by tuned part: the family's groups of sites, and every head.

        Heads are held to be alive as groups are, by zeroing, and not by putting the backbone's in their place: whoever
        imports backbone and adapter from one checkpoint has two equal heads, and nothing is wrong with them.
        """
        config = self._package.config
        groups = family_of(config.family).site_groups(config, self._stages.backbone.dims())
        return groups | {head: (f"{head}.weight", f"{head}.bias") for head in config.heads}

    def _scaled(self, names: Iterable[str], factor: float) -> Package:
        """The package with these tensors times `factor`."""
        scaled = {name: factor * self._package.tensors[name].float() for name in names}
        return replace(self._package, tensors=self._package.tensors | scaled)


def _checked_errors(own: Outputs, expected: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """By how much each output is off. Raises: ProbeFailed."""
    for name, output in expected.items():
        if own[name].shape != output.shape:
            raise ProbeFailed(
                f"the probe expects {name} of shape {list(output.shape)}, and the adapter gives {list(own[name].shape)}",
                param=PROBE_FILE,
            )
    errors = _differences(own, expected)
    off = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCE[dtype]]
    if off:
        raise ProbeFailed(
            f"the adapter does not give what its probe expects. Of their scale are off: {', '.join(off)}; "
            f"{TOLERANCE[dtype]:g} is allowed in {_name(dtype)}",
            param=PROBE_FILE,
        )
    return errors


def _differences(outputs: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, float]:
    """By output, max |output - reference| / scale of the reference; infinite where one of them is not finite."""
    differences: dict[str, float] = {}
    for name, reference in references.items():
        scale = max(float(reference.abs().max()), LEAST_SCALE.get(name, torch.finfo(torch.float32).tiny))
        value = float((outputs[name] - reference).abs().max()) / scale
        differences[name] = math.inf if math.isnan(value) else value
    return differences


def _largest(outputs: Outputs, references: Outputs) -> float:
    return max(_differences(outputs, references).values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
