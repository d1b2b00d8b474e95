"""The gallery commands, each on a home folder and on a running service: same words, same answers, same exit statuses."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters.errors import AdapterBankError
from service.cli import app
from service.client import Client, ServiceError
from service.deploy_commands import OPERATION_FAILED
from service.folders import open_registry
from service.http.app import create_app
from tests.service.http.serving import served
from tests.service.worlds import World, picture


class Bank:
    """Runs commands on one place."""

    def __init__(self, world: World, place: Sequence[str], media: Path) -> None:
        self.world = world
        self.place = place
        self.media = media

    def invoke(self, *words: str | Path, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["gallery", *map(str, words), *self.place])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    def run(self, *words: str | Path, status: int = 0) -> Any:
        return json.loads(self.invoke(*words, "--json", status=status).stdout)

    def refused(self, *words: str | Path) -> str:
        error = self.invoke(*words, status=1).exception
        assert isinstance(error, AdapterBankError)
        return error.message


@pytest.fixture(params=["home", "service"])
def bank(
    request: pytest.FixtureRequest, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bank]:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        (media / f"{number}.png").write_bytes(picture(number))
    (media / "broken.png").write_bytes(picture(1)[:30])
    if request.param == "home":
        monkeypatch.setenv("BANK_DEVICE", "cpu")
        monkeypatch.setenv("BANK_SLOTS", "4:3,8:2")
        copied = world.copy(tmp_path)
        yield Bank(copied, ["--home", str(copied.settings.home)], media)
        return
    copied = world.copy(tmp_path, gallery_sources=str(media))
    with served(create_app(copied.settings)) as url:
        yield Bank(copied, ["--url", url], media)


def test_a_gallery_is_built_listed_embedded_anew_and_deleted(bank: Bank) -> None:
    told = bank.invoke("build", "clips", "--adapter", "find", "--from", bank.media).stdout.splitlines()
    assert told[0].startswith("clips version 1 is live: sha256:")
    assert told[1:] == ["left out: 1 of 4; see quarantine.jsonl in the version's folder"]
    built = bank.run("build", "clips", "--adapter", "__base__", "--from", bank.media, "--index", "hnsw")
    assert (built["kind"], built["status"], built["adapter"]) == ("gallery", "succeeded", "__base__")
    assert (built["from_version"], built["to_version"]) == (1, 2)
    again = bank.run("rebuild", "clips", "--adapter", "find@1", "--key", "once")
    assert (again["status"], again["to_version"]) == ("succeeded", 3)
    twice = bank.run("rebuild", "clips", "--adapter", "find@1", "--key", "once")
    assert (twice["id"], twice["to_version"]) == (again["id"], 3)
    rows = bank.run("list")
    assert [tuple(row.values()) for row in rows] == [
        ("clips", 1, False, "find", 1, None, "ready"),
        ("clips", 2, False, "__base__", None, None, "ready"),
        ("clips", 3, True, "find", 1, None, "ready"),
    ]
    assert bank.invoke("list").stdout.splitlines()[1:] == [
        "clips v2  ready  __base__",
        "clips v3  ready  find@1  live",
    ]
    assert "while it is live" in bank.refused("delete", "clips", "--version", "3")
    assert bank.run("delete", "clips", "--version", "1", "--reason", "old") == {"name": "clips", "versions": [1]}
    assert "not version 2 as expected" in bank.refused("delete", "clips", "--expect", "2")
    assert bank.invoke("delete", "clips", "--expect", "3").stdout == "deleted clips v2, v3\n"
    assert bank.run("list") == []
    assert "no gallery 'clips'" in bank.refused("delete", "clips")


def test_what_is_refused_and_what_fails_have_statuses_of_their_own(bank: Bank) -> None:
    assert "made for vqa" in bank.refused("build", "clips", "--adapter", "ask", "--from", bank.media)
    assert "pooling" in bank.refused("build", "clips", "--adapter", "find", "--from", bank.media, "--pooling", "odd")
    assert "neither a folder nor" in bank.refused("build", "clips", "--adapter", "find", "--from", bank.media / "no")
    assert "no gallery 'clips'" in bank.refused("rebuild", "clips")
    for path in bank.media.iterdir():
        path.write_bytes(b"no picture")
    failed = bank.run("build", "clips", "--adapter", "find", "--from", bank.media, status=OPERATION_FAILED)
    assert failed["status"] == "failed" and "nothing could be embedded" in failed["error"]
    told = bank.invoke("build", "clips", "--adapter", "find", "--from", bank.media, status=OPERATION_FAILED).stdout
    assert "clips failed" in told and "nothing could be embedded" in told


def test_nobody_has_to_wait(bank: Bank) -> None:
    started = bank.run("build", "clips", "--adapter", "find", "--from", bank.media, "--no-wait")
    assert started["status"] == "running"
    joined = bank.run("build", "clips", "--adapter", "find", "--from", bank.media)
    assert joined["status"] == "succeeded"
    if "--home" in bank.place:
        assert joined["id"] == started["id"]
    assert bank.invoke("list").stdout.splitlines()[-1].endswith("ready  find@1  live, follows find@prod")


def test_a_job_of_a_home_without_a_server_waits_and_can_be_aborted(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "1.png").write_bytes(picture(1))
    home = ["--home", str(copied.settings.home), "--json"]
    build = ["gallery", "build", "clips", "--adapter", "find", "--from", str(tmp_path / "media"), "--no-wait"]
    started = json.loads(CliRunner().invoke(app, [*build, *home]).stdout)
    assert (started["status"], started["phase"]) == ("running", "waiting")
    other = CliRunner().invoke(app, [*build, "--index", "hnsw", *home])
    assert f"operation {started['id']}" in str(other.exception)
    aborted = json.loads(CliRunner().invoke(app, ["abort", started["id"], "--reason", "no", *home]).stdout)
    assert (aborted["status"], aborted["error"]) == ("failed", "no")
    registry = open_registry(copied.settings)
    assert registry.snapshot().active_jobs == ()
    registry.close()


def test_the_client_says_which_setting_is_missing(world: World, tmp_path: Path) -> None:
    with served(create_app(world.copy(tmp_path).settings)) as url, Client(url) as client:
        with pytest.raises(ServiceError, match="BANK_GALLERY_SOURCES names no folder") as caught:
            client.build_gallery("clips", tmp_path, "find")
        assert (caught.value.status, caught.value.param) == (422, "source")
