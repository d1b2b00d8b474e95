"""The commands of the documents: the walk through operations works as written, with the output shown; all others parse."""

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from service.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALK = "### From push to rollback"
PORT = "8000"  # as documented; the test takes a free one
START_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 60.0


# --- the walk ----------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A command of the document, its exit status, and the lines that it shows."""

    command: str
    status: int
    shown: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """What the section of the walk says to type, in order."""
    _, _, rest = (ROOT / "docs" / "operations.md").read_text().partition(f"{WALK}\n")
    found: list[Step] = []
    for line in re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        if line.startswith("    $ "):
            command, _, status = line.removeprefix("    $ ").partition("    # exit status ")
            found.append(Step(command, int(status or 0)))
        elif line.startswith("    "):
            found[-1].shown.append(line.removeprefix("    "))
    return found


def pattern(shown: list[str]) -> str:
    """Of an output: `...` stands for anything, and alone on a line for any lines."""
    text = "".join("(?:.*\n)*" if line == "..." else f"{re.escape(line)}\n" for line in shown)
    return text.replace(re.escape("..."), ".*")


class Walker:
    """Runs the commands like a shell that goes on: with one environment, and one server in the background."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("BANK_", "ADAPTER_BANK_"))
        }
        program = folder / "bin" / "adapter-bank"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m service.cli "$@"\n')
        program.chmod(0o755)
        self._environment |= {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),
            "BANK_THREADS": "1",
            "BANK_DEVICE": "cpu",
            "BANK_MEDIA_WORKERS": "1",
        }
        self._server: subprocess.Popen[bytes] | None = None

    def run(self, step: Step) -> tuple[int, str]:
        """Exit status and output of a command."""
        command = step.command.replace(PORT, str(self._port))
        if command.endswith(" &"):
            return 0, self._serve(command.removesuffix(" &"))
        if command == "kill %1":
            return self.stop(), ""
        if re.match(r"(export )?[A-Z_]+=", command):  # what the next commands see
            done = self._bash(f"export {command.removeprefix('export ')} && env -0")
            self._environment = dict(pair.split("=", 1) for pair in done.stdout.rstrip("\0").split("\0"))
            return done.returncode, ""
        done = self._bash(command)
        return done.returncode, (done.stdout + done.stderr).replace(str(self._port), PORT)

    def _bash(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )

    def _serve(self, command: str) -> str:
        out = self._folder / "server.txt"
        with out.open("wb") as file:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], env=self._environment, cwd=ROOT, stdout=file, stderr=file
            )
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._server.poll() is None and time.monotonic() < end, out.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{self._port}/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        announced = [line for line in out.read_text().splitlines() if line.startswith("adapter-bank on")]
        return "".join(f"{line}\n" for line in announced).replace(str(self._port), PORT)

    def stop(self) -> int:
        """End the server, if it runs; its exit status."""
        if self._server is None:
            return 0
        self._server.send_signal(signal.SIGTERM)
        try:
            return self._server.wait(COMMAND_TIMEOUT_S)
        finally:
            self._server.kill()
            self._server = None


@pytest.fixture
def walker(tmp_path: Path) -> Iterator[Walker]:
    with socket.socket() as held:  # nobody else is given this port; a server, which asks to reuse it, may listen there
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        walker = Walker(tmp_path, held.getsockname()[1])
        yield walker
        walker.stop()


def test_the_walk_from_push_to_rollback_works_as_documented(walker: Walker) -> None:
    walk = steps()
    assert {"push", "promote", "end-canary", "rollback", "retire", "audit"} <= {
        step.command.split()[1] for step in walk if step.command.startswith("adapter-bank ")
    }
    for step in walk:
        status, output = walker.run(step)
        assert status == step.status, f"{step.command}: {output}"
        if step.shown:
            assert re.fullmatch(pattern(step.shown), output), f"{step.command}: {output}"


# --- all commands --------------------------------------------------------------------------------------------


def in_blocks(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, continued ones joined. Outputs are among them."""
    is_fenced = False
    for line in page.read_text().replace("\\\n", "").splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def in_prose(page: Path) -> list[str]:
    """What a page quotes between its sentences: often a part of a command only."""
    return re.findall(r"`([^`\n]+)`", page.read_text())


def words_of(command: str, program: str) -> list[str] | None:
    """What follows a program in a command, without environment, redirection and comment; None for another program's."""
    try:
        words = shlex.split(re.split(r" (?:&|&&|\|)(?: |$)", command)[0], comments=True)
    except ValueError:  # no command
        return None
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    names = program.split()
    return words[len(names) :] if words[: len(names)] == names else None


def ours(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands of our program, and their words."""
    for line in lines:
        for program in ("adapter-bank", "docker compose run --rm bank"):
            words = words_of(line, program)
            if words and words[0] != "on":  # `adapter-bank on http://...` is what a server prints
                yield line, words


def misuse(words: list[str]) -> Exception | None:
    """What the command line would say against these words before it does anything."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return LookupError(f"no command {' '.join(words[:1])!r}")
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(command.name, [word for word in words if word != "--help"])
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        return error
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_ours_parses(page: Path) -> None:
    for line, words in ours(in_blocks(page)):
        assert misuse(words) is None, f"{line}: {misuse(words)!r}"
    for line, words in ours(in_prose(page)):
        error = misuse(words)
        is_partial = type(error).__name__ == "MissingParameter" or words in (["gallery"], ["key"])
        assert error is None or is_partial, f"{line}: {error!r}"


def test_commands_are_found() -> None:
    found = [words for page in PAGES for _, words in ours(in_blocks(page))]
    assert len(found) > 60
    assert {"serve", "push", "gallery", "key", "import", "registry", "train"} <= {words[0] for words in found}
    assert words_of("A=b adapter-bank push x --name 'y z' # why", "adapter-bank") == ["push", "x", "--name", "y z"]
    assert words_of("adapter-bank serve --port 1 &", "adapter-bank") == ["serve", "--port", "1"]


@pytest.mark.parametrize(
    "line",
    [
        "pusch x --name y",
        "push x --nam y",
        "promote a two",
        "gallery bild x",
        "push",
        "key new --id a",
        "promote a 1 2",
    ],
)
def test_what_does_not_parse_is_noticed(line: str) -> None:
    assert misuse(line.split()) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_and_module_that_is_run_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in (*in_blocks(page), *in_prose(page)):
        if words := words_of(line, "make"):
            assert words[0] in targets, line
        if words := words_of(line, "python -m"):
            names = [words[0]]
            if words[0] == "loadtest.bench" and words[1:] and not words[1].startswith("-"):
                own = "" if words[1] == "all" else f".{words[1]}"
                names = [f"loadtest.bench{own}", "loadtest.bench.harness"]  # which has what all of them take
            modules = [importlib.util.find_spec(name) for name in names]
            assert all(module is not None and module.origin is not None for module in modules), line
            told = "".join(Path(module.origin).read_text() for module in modules if module and module.origin)
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in told, line
