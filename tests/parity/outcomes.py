"""What breaking one detail on purpose does: a line of a table for each."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity.sets import Comparison

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
MAX_NAMED = 4


@dataclass(frozen=True)
class Mutation:
    """A detail as a set names it, or one of ours; what is changed; and the change."""

    detail: str
    changed: str
    apply: Callable[..., None]


@dataclass(frozen=True)
class Outcome:
    """What a mutation did: how many comparisons ran, and which failed, by case."""

    mutation: Mutation
    num_comparisons: int
    failed: tuple[tuple[str, Comparison], ...]

    @property
    def recorded(self) -> list[str]:
        """The recorded outputs that failed, each once."""
        return list(dict.fromkeys(c.name.partition(" (")[0] for _, c in self.failed if c.is_recorded))

    @property
    def worst(self) -> tuple[str, Comparison] | None:
        """The number that is off by most; ids and choices are right or wrong."""
        numbers = [item for item in self.failed if not item[1].is_exact and math.isfinite(item[1].excess)]
        return max(numbers, key=lambda item: item[1].excess, default=None)


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, and no log."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def table(outcomes: Iterable[Outcome]) -> str:
    """One line per mutation."""
    lines = [
        "| detail | what was changed | comparisons that failed | of them recorded | recorded outputs that failed | largest excess over tolerance |",
        "|---|---|--:|--:|---|---|",
    ]
    for outcome in outcomes:
        names, worst = outcome.recorded, outcome.worst
        listed = ", ".join(f"`{name}`" for name in names[:MAX_NAMED])
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        counts = f"{len(outcome.failed)} | {sum(c.is_recorded for _, c in outcome.failed)}"
        excess = "" if worst is None else f"{worst[1].excess:.1e} (`{worst[0]}`, {worst[1].name})"
        lines.append(
            f"| {outcome.mutation.detail} | {outcome.mutation.changed} | {counts} | {listed}{more} | {excess} |"
        )
    total = max(outcome.num_comparisons for outcome in outcomes)
    lines += ["", f"Each line is out of {total} comparisons, all of which hold without a change."]
    return "\n".join(lines)


def write(text: str, name: str) -> None:
    """Put a table between its marks in docs/parity.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = PAGE.read_text().split(begin)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")
