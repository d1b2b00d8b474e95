"""What every benchmark shares: its arguments, its turns, a table for people and the last line JSON."""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16")


class Spread(NamedTuple):
    """What several runs of one thing took, seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Of at least one run."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def take_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, calls: int = 1
) -> dict[str, Spread]:
    """Seconds a call of each run, over so many turns of so many calls; the runs take turns, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                synchronize(device)
                if turn:
                    seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Spread.of(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Table:
    """Rows of cells under a title; the first column is text, the others are numbers or short texts."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The table as text."""
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        yield f"\n{self.title}\n"
        for row in cells:
            first = row[0].ljust(widths[0])
            yield "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


class Bench:
    """One benchmark's name, what it measures, and its arguments. Make one, add arguments to `parser`, then `start`."""

    def __init__(self, name: str, doc: str | None, sizes: Sequence[str], *, repeats: int) -> None:
        self.name = name
        self.parser = argparse.ArgumentParser(
            prog=f"python -m loadtest.bench {name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("--size", choices=sizes, default=sizes[0], help="shapes of the models")
        self.parser.add_argument("--device", default="cpu", help="cpu or cuda")
        self.parser.add_argument("--dtype", choices=DTYPES, default="float32")
        self.parser.add_argument("--repeats", type=int, default=repeats, help="turns of each side")
        self.parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: as many as it takes")
        self.parser.add_argument("--json", action="store_true", help="print the last line only")
        self.arguments = argparse.Namespace()

    def start(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the command line."""
        self.arguments = self.parser.parse_args(words)
        if self.arguments.threads:
            torch.set_num_threads(self.arguments.threads)
        self._words = list(words)
        return self.arguments

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.arguments.device)

    @property
    def dtype(self) -> torch.dtype:
        """In which precision."""
        dtype = getattr(torch, self.arguments.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def report(self, tables: Sequence[Table], values: Mapping[str, Any]) -> None:
        """Print the tables, then one line of JSON: the values, and where they come from."""
        if not self.arguments.json:
            for table in tables:
                print("\n".join(table.lines()))
            print()
        print(json.dumps({"bench": self.name, **self.provenance(), **values}))

    def provenance(self) -> dict[str, object]:
        """What was run, on what."""
        options = {name: value for name, value in vars(self.arguments).items() if name != "json"}
        return {
            "command": shlex.join(["python", "-m", "loadtest.bench", self.name, *self._words]),
            "options": options,
            "commit": commit(),
            "machine": machine(self.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }


def commit() -> str:
    """The commit this is, with a plus sign where files differ from it; empty outside of a checkout."""
    try:
        told = [
            subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told[0] + ("+" if told[1] else "")


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or sys.platform


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
