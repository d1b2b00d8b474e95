"""The operator's commands, each on a home folder and on a running service: same words, same answers, same exit statuses."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import AdapterBankError
from service.cli import app
from service.deploy_commands import OPERATION_FAILED, _line, read_share
from service.folders import HomeFolders, open_registry
from service.http.operator_schemas import OperationReply
from service.lifecycle.writing import write_probed_package
from tests.service.http.serving import served
from tests.service.worlds import World, adapter_config, random_tensors


class Bank:
    """Runs commands on one place."""

    def __init__(self, world: World, place: Sequence[str]) -> None:
        self.world = world
        self.place = place

    def run(self, *words: str | Path, status: int = 0) -> Any:
        result = CliRunner().invoke(app, [*map(str, words), *self.place, "--json"])
        assert result.exit_code == status, (result.output, result.exception)
        return json.loads(result.stdout) if result.stdout.strip() else None

    def refused(self, *words: str) -> str:
        result = CliRunner().invoke(app, [*words, *self.place])
        assert isinstance(result.exception, AdapterBankError), result.output
        return result.exception.message

    def package(self, folder: Path, seed: int) -> Path:
        backbone = self.world.backbone
        config = adapter_config(backbone)
        write_probed_package(folder, config, random_tensors(config, backbone.dims(), seed), "# new\n", backbone)
        return folder


@pytest.fixture(params=["home", "service"])
def bank(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Iterator[Bank]:
    copied = world.copy(tmp_path)
    if request.param == "home":
        request.getfixturevalue("monkeypatch").setenv("BANK_DEVICE", "cpu")
        yield Bank(copied, ["--home", str(copied.settings.home)])
        return
    from service.http.app import create_app

    with served(create_app(copied.settings)) as url:
        yield Bank(copied, ["--url", url])


def test_push_promote_roll_back(bank: Bank, tmp_path: Path) -> None:
    for seed in (1, 2):
        pushed = bank.run("push", bank.package(tmp_path / str(seed), seed), "--name", "new")
        assert (pushed["status"], pushed["subject"]) == ("succeeded", f"new@{seed}")
    promoted = bank.run("promote", "new", "2", "--expect", "1", "--reason", "better")
    assert (promoted["status"], promoted["from_version"], promoted["to_version"]) == ("succeeded", 1, 2)
    assert "names version 2, not version 1" in bank.refused("promote", "new", "1", "--expect", "1")
    back = bank.run("rollback", "new", "--reason", "worse")
    assert (back["kind"], back["to_version"]) == ("rollback", 1)
    assert "no earlier one" in bank.refused("rollback", "new")
    (listed,) = bank.run("adapters", "new")
    assert listed["aliases"] == {"prod": 1}
    actions = [(line["action"], line["reason"]) for line in bank.run("audit") if line["subject"] == "new@prod"]
    assert actions[0] == ("roll_back", "worse") and ("set_alias", "better") in actions
    assert {promoted["id"], back["id"]} <= {operation["id"] for operation in bank.run("operations")}


def test_a_push_that_fails_its_validation_ends_with_a_status_of_its_own(bank: Bank, tmp_path: Path) -> None:
    folder = bank.package(tmp_path / "package", 3)
    (folder / "probe.safetensors").unlink()
    failed = bank.run("push", folder, "--name", "bad", status=OPERATION_FAILED)
    assert failed["status"] == "failed" and "carries no probe" in failed["error"]


def test_a_canary_retiring_and_deleting(bank: Bank, tmp_path: Path) -> None:
    bank.run("push", bank.package(tmp_path / "a", 4), "--name", "ask")
    assert bank.run("promote", "ask", "2", "--traffic", "5%")["traffic"] == 0.05
    (listed,) = bank.run("adapters", "ask")
    assert (listed["aliases"], listed["canaries"]) == ({"prod": 1}, {"prod": {"version": 2, "traffic": 0.05}})
    assert "ready  prod for 5 %" in CliRunner().invoke(app, ["adapters", "ask", *bank.place]).stdout
    assert bank.run("end-canary", "ask", "--expect", "2")["canary"] is None
    assert bank.run("retire", "ask", "2")["status"] == "retired"
    assert bank.run("reinstate", "ask", "2")["status"] == "ready"
    assert set(bank.run("delete", "ask", "2", "--reason", "unused")["freed_bytes"]) == {"device", "host"}
    assert "no adapter 'nobody'" in bank.refused("delete", "nobody", "1")


def test_status_tells_who_serves(bank: Bank) -> None:
    status = bank.run("status")
    assert status["operations"] == []
    living = [replica for replica in status["replicas"]["replicas"] if replica["is_alive"]]
    assert len(living) == (1 if "--url" in bank.place else 0)


def test_lines_for_people(bank: Bank, tmp_path: Path) -> None:
    bank.run("push", bank.package(tmp_path / "a", 5), "--name", "new")
    for words in (["adapters"], ["operations"], ["audit"], ["status"]):
        result = CliRunner().invoke(app, [*words, *bank.place])
        assert result.exit_code == 0 and result.stdout.strip(), words
    assert "new@1  vqa  rank 4  ready  prod" in CliRunner().invoke(app, ["adapters", *bank.place]).stdout


def test_the_line_of_a_change_names_no_server_that_serves_it(bank: Bank, tmp_path: Path) -> None:
    for seed in (7, 8):
        bank.run("push", bank.package(tmp_path / str(seed), seed), "--name", "new")
    for words in (["promote", "new", "2"], ["rollback", "new"]):
        line = CliRunner().invoke(app, [*words, *bank.place]).stdout
        assert "committed" in line and "not yet on" not in line


def test_the_line_of_an_operation_tells_how_far_it_is() -> None:
    fields = OperationReply.model_config["json_schema_extra"]["examples"][0]  # type: ignore[index,call-overload]
    operation = OperationReply.model_validate(fields | {"progress": [17, 120], "waiting_for": []})
    assert _line(operation) == "rollout 0f3a5c7e9b1d2f46: vqa@prod preparing, 6 -> 7; 17 of 120 items"


def test_a_registry_that_is_gone_is_put_back(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)
    bank = Bank(copied, ["--home", str(copied.settings.home)])
    folders = HomeFolders(copied.settings.home)
    known = bank.run("adapters")
    registry = open_registry(copied.settings)
    registry.snapshot()
    registry.remember()
    registry.close()
    assert "is not lost" in bank.refused("registry", "restore")
    for path in folders.root.glob("registry.sqlite*"):
        path.unlink()
    assert "empty" in bank.refused("adapters")
    assert bank.run("registry", "restore")["adapters"] == len(known)
    assert bank.run("adapters") == known


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("99.9%", 0.999)])
def test_shares(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "-5%", "half", "", "%", "nan"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(AdapterBankError, match="no share"):
        read_share(text)


def test_a_service_that_is_not_there_is_one_line() -> None:
    result = CliRunner().invoke(app, ["status", "--url", "http://127.0.0.1:9"])
    assert isinstance(result.exception, AdapterBankError) and "cannot be reached" in result.exception.message
