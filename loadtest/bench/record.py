"""Puts what benchmarks printed on top of loadtest/RESULTS.md."""

import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "RESULTS.md"


def recorded(bench: Callable[[Sequence[str]], None], words: Sequence[str], page: Path = RESULTS) -> None:
    """Run a benchmark, print what it prints, and put that into the page as a section of its own, the newest first.

    Raises: ValueError for a page without a section. What the benchmark raises leaves the page as it is.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        bench(words)
    print(printed.getvalue(), end="")
    *tables, last = printed.getvalue().rstrip().split("\n")
    told = json.loads(last)
    facts = f"{told['machine']}, torch {told['torch']}, commit `{told['commit'] or 'unknown'}`."
    section = [f"## {time.strftime('%Y-%m-%d')}: `{told['command']}`", "", facts, "", *_as_text(tables), ""]
    text = page.read_text()
    place = text.index("\n## ") + 1
    page.write_text(text[:place] + "\n".join(section) + "\n" + text[place:])


def _as_text(lines: Sequence[str]) -> list[str]:
    """The tables as they were printed."""
    while lines and not lines[-1]:
        lines = lines[:-1]
    return ["```text", *lines, "```"]
