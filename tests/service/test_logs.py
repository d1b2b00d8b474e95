"""What log lines look like, alone and from a whole server: every line parses, and belongs to its request."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from service.http.schemas import GenerateOptions, RankOptions
from service.logs import JsonFormatter, TextFormatter, event, request_id
from tests.service.worlds import World, picture

ROOT = Path(__file__).parents[2]
WAIT_S = 90.0
QUESTION = "is the wombat red"


def record(message: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.getLogger().makeRecord("service.x", logging.WARNING, __file__, 1, message, args, exc_info)
    made.__dict__.update(extra)
    return made


# --- one line ------------------------------------------------------------------------------------------------


def test_a_json_line_has_its_time_level_logger_message_and_event() -> None:
    made = record("loaded %s", "vqa@1", **event("adapter_loaded", adapter="vqa", version=1, digest=None))
    line = json.loads(JsonFormatter().format(made))
    time = line.pop("time")
    assert time.endswith("Z") and abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(minutes=1)
    assert line == {
        "level": "warning",
        "logger": "service.x",
        "message": "loaded vqa@1",
        "event": "adapter_loaded",
        "adapter": "vqa",
        "version": 1,
    }


def test_a_traceback_is_one_string() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        text = JsonFormatter().format(record("it failed", error=error))
    assert "\n" not in text
    assert json.loads(text)["error"].splitlines()[-2:] == ["ValueError: first", "second"]


def test_what_cannot_be_json_is_shown_as_text() -> None:
    line = json.loads(JsonFormatter().format(record("x", **event("x", path=Path("/a"), kind=ValueError))))
    assert (line["path"], line["kind"]) == ("/a", "<class 'ValueError'>")


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_nobody_can_begin_a_line_of_the_log(formatter: logging.Formatter) -> None:
    text = formatter.format(record("moved by %s", "eve\n2030-01-01 INFO x: y\r\x1b[2J\x85\u2028z"))
    assert text.splitlines() == [text] and text.isprintable()


def test_lines_of_a_request_name_it_and_others_do_not() -> None:
    assert "request" not in TextFormatter().format(record("x")) + JsonFormatter().format(record("x"))
    token = request_id.set("abc-1")
    try:
        assert TextFormatter().format(record("x")).endswith(" x request=abc-1")
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "abc-1"
        other = event("job_failed", request_id="of-its-job")
        assert TextFormatter().format(record("x", **other)).endswith(" request=of-its-job")
        assert json.loads(JsonFormatter().format(record("x", **other)))["request_id"] == "of-its-job"
    finally:
        request_id.reset(token)


# --- a process -----------------------------------------------------------------------------------------------


def lines_of(program: str, **wanted: object) -> list[dict[str, Any]]:
    """What a program logs as JSON; nothing else may come out of it."""
    code = f"import logging, threading, warnings\nfrom service import logs\nlogs.configure(as_json=True, **{wanted})\n{program}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_what_nobody_caught_and_what_python_warns_of_are_lines_too() -> None:
    program = """
warnings.warn("careful\\nnow")
thread = threading.Thread(target=lambda: 1 / 0, name="device")
thread.start()
thread.join()
class Bad:
    def __del__(self): raise KeyError("gone")
Bad()
raise OSError("the end")
"""
    warning, thread, ignored, end = lines_of(program)
    assert warning["logger"] == "py.warnings" and "careful\nnow" in warning["message"]
    assert "device" in thread["message"] and thread["error"].endswith("ZeroDivisionError: division by zero")
    assert ignored["error"].endswith("KeyError: 'gone'")
    assert end["level"] == "critical" and end["error"].endswith("OSError: the end")


def test_debug_is_for_our_modules_and_no_level_lets_less_through() -> None:
    program = """
for name in ("service.bank", "adapters.registry", "redis", "httpx"):
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), level)("x")
"""

    def counts(level: str) -> dict[str, int]:
        names = [line["logger"] for line in lines_of(program, level=level)]
        return {name: names.count(name) for name in ("service.bank", "adapters.registry", "redis", "httpx")}

    assert counts("debug") == {"service.bank": 4, "adapters.registry": 4, "redis": 3, "httpx": 2}
    assert counts("error") == {"service.bank": 1, "adapters.registry": 1, "redis": 1, "httpx": 1}


# --- a server ------------------------------------------------------------------------------------------------

BROKEN = """
import sys, warnings
from service.engine import engine
from service.runtime import Runtime
run_batch = engine.run_batch
def run(model, batch, *rest):
    if batch.stage == "rank":
        raise ZeroDivisionError("broken on purpose")
    return run_batch(model, batch, *rest)
engine.run_batch = run
def status(self):
    warnings.warn("about to fail")
    raise RuntimeError("no status")
Runtime.status = status
sys.argv = ["adapter-bank", "serve", "--port", "0"]
from service.cli import main
main()
"""


class Server:
    """A server some of whose requests fail, its address and its log so far."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.url: str = self.wait_for("serving")["url"]

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line; each must be JSON."""
        whole, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, name: str, **wanted: object) -> dict[str, Any]:
        """The first event of a name with these keys."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            for line in self.lines():
                if line.get("event") == name and wanted.items() <= line.items():
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no event {name} with {wanted} in {self._log.read_text()}")

    def of_request(self, request: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("request_id") == request]


@contextmanager
def server(world: World, folder: Path) -> Iterator[Server]:
    settings = world.settings.model_dump(exclude_none=True) | {"log_format": "json"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")}
    environment |= {f"BANK_{name.upper()}": str(value) for name, value in settings.items()}
    with (folder / "log").open("w") as log, (folder / "out").open("w") as out:
        command = [sys.executable, "-c", BROKEN]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=log)
        try:
            yield Server(folder / "log")
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
    assert (folder / "out").read_text() == ""


def test_a_server_logs_nothing_but_json_and_every_line_of_a_request_names_it(world: World, tmp_path: Path) -> None:
    world = world.copy(tmp_path)
    with server(world, tmp_path) as running:
        with (
            httpx.Client(base_url=running.url, timeout=WAIT_S) as http,
            Client(running.url, timeout_s=WAIT_S) as client,
        ):
            image = picture(1)
            answered = client.vqa("ask", QUESTION, image=image, decode=GenerateOptions(mode="generate"))
            request = running.wait_for("request", path="/v1/vqa")
            check_request(request, version=answered.adapter.version, digest=answered.adapter.digest)
            loaded = running.wait_for("adapter_loaded", adapter="ask")
            assert loaded["request_id"] == request["request_id"] and loaded["source"] == "disk"

            with pytest.raises(Exception, match="rank stage failed"):
                client.vqa("ask", QUESTION, image=image, decode=RankOptions(mode="rank"))
            failed = running.wait_for("job_failed")
            assert failed["error"].endswith("ZeroDivisionError: broken on purpose")
            assert running.wait_for("request", status=500)["request_id"] == failed["request_id"] != ""

            refused = http.get("/health/ready", headers={"X-Request-Id": "mine-1"})
            assert (refused.status_code, refused.headers["x-request-id"]) == (500, "mine-1")
            running.wait_for("request", request_id="mine-1")
            warning, error, access = running.of_request("mine-1")
            assert warning["logger"] == "py.warnings" and "about to fail" in warning["message"]
            assert error["error"].endswith("RuntimeError: no status")
            assert (access["path"], access["status"], access["key"]) == ("/health/ready", 500, "(local)")

            forged = http.get("/v1/adapters", headers={"X-Request-Id": 'x"}{"level": "info'})
            running.wait_for("request", request_id=forged.headers["x-request-id"], path="/v1/adapters")
            send_nonsense(running.url)

            world.push("ask", seed=91)
            promote = {"version": 2, "reason": "better\non colours"}
            http.post("/v1/adapters/ask/aliases/prod", json=promote).raise_for_status()
            moved = running.wait_for("alias_moved", adapter="ask", action="promote")
            assert (moved["before"], moved["after"], moved["reason"]) == (1, 2, "better\non colours")
            http.post("/v1/adapters/ask/aliases/prod/rollback", json={}).raise_for_status()
            moved = running.wait_for("alias_moved", adapter="ask", action="rollback")
            assert (moved["before"], moved["after"]) == (2, 1)
    lines = running.lines()
    assert any(line["logger"].startswith("uvicorn") and "Invalid HTTP" in line["message"] for line in lines)
    assert {"replica_joined", "replica_left"} <= {line.get("event") for line in lines}
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    assert "wombat" not in (tmp_path / "log").read_text()


def check_request(line: dict[str, Any], **answered: object) -> None:
    assert (line["method"], line["status"], line["adapter"]) == ("POST", 200, "ask")
    assert line.items() >= answered.items()
    assert line["stages_ms"].keys() >= {"decode", "vision", "generate"}
    assert line["ms"] >= line["stages_ms"]["generate"] > 0


def send_nonsense(url: str) -> None:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=WAIT_S) as connection:
        connection.sendall(b"what\x00 is this?\r\n\r\n")
        connection.recv(1000)
