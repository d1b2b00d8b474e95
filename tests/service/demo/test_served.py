"""The newcomer's first minute: `serve --demo`, then the three printed curl lines, then every demo adapter once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.demo.recipes import RECIPES
from service.demo.samples import write_samples
from service.demo.world import TASKS

CURL = shutil.which("curl")
NUM_PRINTED = 3


class Demo:
    """A running demo: its URL and what it printed."""

    def __init__(self, home: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")} | {"BANK_HOME": str(home)}
        command = [sys.executable, "-m", "service.cli", "serve", "--demo", "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if len(self.curl_lines) == NUM_PRINTED:
                break
        if len(self.curl_lines) < NUM_PRINTED:
            self.process.communicate(timeout=60)
            raise AssertionError(f"the demo ended with status {self.process.returncode}; it printed {self.lines}")
        announced = next(line for line in self.lines if line.startswith("adapter-bank demo on "))
        self.url = announced.split()[3]

    @property
    def curl_lines(self) -> list[str]:
        return [line for line in self.lines if line.startswith("curl ")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("home"))
    yield demo
    assert demo.stop() == 0


def curl(line: str) -> dict[str, object]:
    """What a printed line answers, run as a shell runs it."""
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=True)
    reply: dict[str, object] = json.loads(done.stdout)
    return reply


@pytest.mark.skipif(CURL is None, reason="curl is not installed, and the printed lines need it")
def test_the_printed_question_is_answered_rightly(demo: Demo) -> None:
    line = demo.curl_lines[0]
    reply = curl(line)
    assert reply["answer"] == line.rsplit("right answer: ", 1)[1]
    assert reply["adapter"]["name"] == "demo-image-vqa"  # type: ignore[index]


@pytest.mark.skipif(CURL is None, reason="curl is not installed, and the printed lines need it")
def test_the_printed_search_finds_its_clip_with_another_adapter(demo: Demo) -> None:
    line = demo.curl_lines[1]
    reply = curl(line)
    assert reply["hits"][0]["id"] == line.rsplit("right clip: ", 1)[1]  # type: ignore[index]
    assert reply["adapter"]["name"] == "demo-video-retrieval"  # type: ignore[index]


@pytest.mark.skipif(CURL is None, reason="curl is not installed, and the printed lines need it")
def test_the_printed_sound_is_put_into_words_by_the_other_backbone(demo: Demo) -> None:
    line = demo.curl_lines[2]
    reply = curl(line)
    assert reply["caption"] == line.rsplit("right caption: ", 1)[1]
    assert reply["adapter"]["name"] == "demo-epalm-audio-caption"  # type: ignore[index]


def test_every_demo_adapter_is_live_and_the_galleries_are_full(demo: Demo) -> None:
    with httpx.Client(base_url=demo.url, timeout=60) as client:
        names = {row["name"] for row in client.get("/v1/adapters").json()["adapters"]}
        assert set(TASKS) <= names
        galleries = {row["name"]: row for row in client.get("/v1/galleries").json()["galleries"]}
        assert galleries["demo-clips"]["num_items"] >= 200
        assert galleries["demo-captions"]["num_items"] >= 200


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task].goal != "retrieval"])
def test_most_fresh_items_are_answered_or_captioned_rightly(demo: Demo, task: str, tmp_path: Path) -> None:
    lines = write_samples(task, 99, 12, tmp_path).read_text().splitlines()
    right = 0
    with httpx.Client(base_url=demo.url, timeout=60) as client:
        for line in map(json.loads, lines):
            path, told = ("/caption", "caption") if TASKS[task].goal == "caption" else ("/vqa", "answer")
            request: dict[str, object] = {"adapter": task}
            if told == "answer":
                request |= {"question": line["question"], "decode": {"mode": "rank" if task in RECIPES else "generate"}}
            files = {TASKS[task].kind: (line["file"], (tmp_path / line["file"]).read_bytes())}
            reply = client.post(path, data={"request": json.dumps(request)}, files=files)
            assert reply.status_code == 200, reply.text
            right += reply.json()[told] == line[told]
    assert right >= 8
