"""`fit` as the demo's builds use it: with a progress bar, in the demo's precision."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from adapters.training.loop import FitOptions, Objective, Progress, fit


def fit_with_bar(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    options: FitOptions,
    checkpoint: Path,
    **settings: Any,
) -> None:
    """`fit` with a progress bar of running mean losses; `settings` are further arguments of it."""
    means: dict[str, float] = {}
    with tqdm(total=options.steps, desc=name, unit="step", mininterval=10.0) as bar:

        def report(progress: Progress) -> None:
            for key, loss in progress.losses.items():
                means[key] = means.get(key, loss) + 0.02 * (loss - means.get(key, loss))
            bar.n = progress.step
            bar.set_postfix({key: f"{mean:.3f}" for key, mean in means.items()}, refresh=False)
            bar.update(0)

        fit(parameters, objective, options, checkpoint=checkpoint, report=report, context=training_context, **settings)


def training_context() -> AbstractContextManager[None]:
    """What surrounds a forward pass while training on the CPU: bfloat16 products, and attention by plain products.

    At these lengths (17 to 150 tokens) the fused kernel's backward pass takes most of a step; plain products do not.
    """
    return _training_context()


@contextmanager
def _training_context() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        yield
