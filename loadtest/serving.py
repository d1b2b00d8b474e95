"""A real server process for as long as it is needed, and what it takes of the machine (Linux)."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.config import Settings

WAIT_S = 300.0


class CpuTime(NamedTuple):
    """Processor seconds, of a process itself and of those it started."""

    own: float
    children: float

    def since(self, before: "CpuTime") -> "CpuTime":
        """What was spent meanwhile."""
        return CpuTime(self.own - before.own, self.children - before.children)


@dataclass
class Replica:
    """A server process."""

    url: str
    pid: int
    memory: list[int] = field(default_factory=list)  # resident bytes, once a second

    def look(self) -> None:
        """Note how much memory it takes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))


@contextmanager
def serving(home: Path, settings: Settings) -> Iterator[Replica]:
    """A replica while the block lasts."""
    home.mkdir(parents=True, exist_ok=True)
    given = settings.model_dump(exclude_unset=True) | {"home": home, "port": 0}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")}
    environment |= {f"BANK_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    command = [sys.executable, "-m", "service.cli", "serve"]
    with (home / "log.txt").open("wb") as log, (home / "out.txt").open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=log)
    try:
        end = time.monotonic() + WAIT_S
        while not (found := re.search(r"http://[\d.]+:\d+", (home / "out.txt").read_text())):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit((home / "log.txt").read_text())
            time.sleep(0.1)
        yield Replica(found[0], process.pid)
    finally:
        process.terminate()
        process.wait(60)


def cpu_time(pid: int) -> CpuTime:
    """What a process has taken so far, and what those below it have that live."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            number = int(stat.parent.name)
            parents[number] = int(fields[1])
            seconds[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below, children = [pid], 0.0
    while below:
        above = set(below)
        below = [number for number, parent in parents.items() if parent in above]
        children += sum(seconds[number] for number in below)
    return CpuTime(seconds.get(pid, 0.0), children)
