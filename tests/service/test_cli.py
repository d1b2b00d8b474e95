"""The command line as a user types it: every command in a process of its own."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

PARITY = Path(__file__).parents[1] / "parity" / "data" / "uniadapter" / "dev"
HEADS = "4"
COLOURS = ("red", "green", "blue", "orange")


def run(*arguments: str | Path, home: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")} | {"BANK_HOME": str(home)}
    command = [sys.executable, "-m", "service.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an imported backbone and one imported, pushed adapter."""
    home = tmp_path_factory.mktemp("home")
    checkpoint = PARITY / "image_retrieval.checkpoint.pth"
    ids = json.dumps(json.loads((PARITY / "cases.json").read_text())["special_token_ids"])
    backbone = home / "backbone"
    run("import", "backbone", checkpoint, "--out", backbone, "--num-heads", HEADS, "--special-ids", ids, home=home)
    package = home / "package"
    run("import", "uniadapter", checkpoint, "--backbone", backbone, "--out", package, home=home)
    pushed = run("push", package, "--name", "pictures", "--json", home=home)
    assert json.loads(pushed.stdout)["status"] == "succeeded"
    return home


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return folder


def test_pushing_the_same_package_again_gives_the_same_version(home: Path) -> None:
    again = json.loads(run("push", home / "package", "--name", "pictures", "--json", home=home).stdout)
    assert (again["status"], again["subject"]) == ("succeeded", "pictures@1")
    (listed,) = json.loads(run("adapters", "--json", home=home).stdout)
    assert (listed["name"], len(listed["versions"]), listed["aliases"]) == ("pictures", 1, {"prod": 1})


def test_an_imported_package_has_a_probe_and_one_without_is_given_it(home: Path, tmp_path: Path) -> None:
    probe = (home / "package" / "probe.safetensors").read_bytes()
    shutil.copytree(home / "package", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "probe.safetensors").unlink()
    backbone = home / "backbone"
    copied = run("probe", tmp_path / "elsewhere", "--backbone", backbone, "--out", tmp_path / "copy", home=home)
    assert copied.stdout.startswith(f"wrote {tmp_path / 'copy'}: ")
    assert (tmp_path / "copy" / "probe.safetensors").read_bytes() == probe
    assert not (tmp_path / "elsewhere" / "probe.safetensors").exists()
    run("probe", tmp_path / "elsewhere", "--backbone", backbone, home=home)
    assert (tmp_path / "elsewhere" / "probe.safetensors").read_bytes() == probe


def test_importing_onto_another_backbone_is_refused(home: Path, tmp_path: Path) -> None:
    other = PARITY / "image_vqa.checkpoint.pth"
    refused = run(
        "import", "uniadapter", other, "--backbone", home / "backbone", "--out", tmp_path / "p", home=home, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the checkpoint")
    assert not (tmp_path / "p").exists()


def test_heads_that_cannot_be_guessed_are_asked_for(home: Path, tmp_path: Path) -> None:
    checkpoint = PARITY / "image_vqa.checkpoint.pth"
    refused = run("import", "backbone", checkpoint, "--out", tmp_path / "b", home=home, check=False)
    assert refused.returncode == 1
    assert "special" in refused.stderr


@pytest.mark.parametrize("name", ["../evil", "Upper", "", "a..b"])
def test_names_that_could_leave_a_folder_are_refused(home: Path, name: str) -> None:
    refused = run("push", home / "package", "--name", name, home=home, check=False)
    assert refused.returncode == 1
    assert "no valid name" in refused.stderr


def test_an_error_of_the_system_is_one_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file in the place of the folder")
    refused = run("push", home / "package", "--name", "new", home=tmp_path / "home", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def colours(home: Path, pictures: Path) -> str:
    """The output of building one gallery: first with the adapter, then anew without one."""
    built = run("gallery", "build", "colours", "--adapter", "pictures", "--from", pictures, home=home)
    again = run("gallery", "build", "colours", "--adapter", "__base__", "--from", pictures, home=home)
    return built.stdout + again.stdout


def test_a_gallery_is_built_listed_and_built_anew(home: Path, colours: str) -> None:
    assert "colours version 1 is live" in colours
    assert "colours version 2 is live" in colours
    assert colours.count("left out: 1 of 5") == 2
    rows = json.loads(run("gallery", "list", "--json", home=home).stdout)
    expected = [(1, False, "pictures"), (2, True, "__base__")]
    assert [(row["version"], row["live"], row["adapter"]) for row in rows] == expected


def test_an_unknown_setting_stops_the_start(home: Path) -> None:
    environment = os.environ | {"BANK_HOME": str(home), "BANK_PROT": "9"}
    command = [sys.executable, "-m", "service.cli", "serve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "BANK_PROT" in done.stderr


def test_a_home_without_a_backbone_is_told_in_one_line(tmp_path: Path) -> None:
    refused = run("serve", "--port", "0", home=tmp_path, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: no backbone at ") and refused.stderr.count("\n") == 1


def test_why_a_server_does_not_start_is_logged_as_json_where_that_is_wanted(tmp_path: Path) -> None:
    environment = os.environ | {"BANK_HOME": str(tmp_path), "BANK_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    line = json.loads(done.stderr)
    assert (done.returncode, done.stdout, line["level"]) == (1, "", "critical")
    assert line["message"].startswith("no backbone at ")


def test_a_public_address_without_keys_is_refused(home: Path) -> None:
    refused = run("serve", "--host", "0.0.0.0", home=home, check=False)
    assert refused.returncode == 1
    assert "--allow-public" in refused.stderr


def test_keys_are_made_listed_and_revoked(home: Path, tmp_path: Path) -> None:
    printed = run(
        "key", "new", "--id", "ci", "--scopes", "infer,deploy", "--adapters", "vqa*,team-a-*", home=home
    ).stdout
    key, _, entry = printed.partition("\n")
    assert json.loads(entry) == {
        "id": "ci",
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "scopes": ["infer", "deploy"],
        "adapters": ["vqa*", "team-a-*"],
    }
    file = tmp_path / "keys.json"
    for name, *options in (("a",), ("b", "--expires", "2001-01-01T00:00:00Z")):
        added = run("key", "new", "--id", name, "--scopes", "infer", *options, "--file", file, home=home).stdout
        assert added.startswith("bank_") and added.count("\n") == 1  # the key alone, for scripts
        assert added.strip() not in file.read_text()
    listed = run("key", "list", "--file", file, home=home).stdout.splitlines()
    assert listed == ["a  infer  *", "b  infer  *  until 2001-01-01T00:00:00Z  expired"]
    assert run("key", "revoke", "a", "--file", file, home=home).stdout == "revoked a\n"
    assert [row["id"] for row in json.loads(run("key", "list", "--file", file, "--json", home=home).stdout)] == ["b"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("new", "--id", "ci", "--scopes", "infer,read"), "scopes.1"),
        (("new", "--id", "Two Words", "--scopes", "infer"), "id"),
        (("new", "--id", "ci", "--scopes", "infer", "--adapters", "VQA"), "adapters.0"),
        (("new", "--id", "ci", "--scopes", "infer", "--expires", "tomorrow"), "expires"),
        (("revoke", "x", "--file", "/nothing/keys.json"), "/nothing"),
        (("list", "--file", "/nothing/keys.json"), "/nothing/keys.json"),
    ],
)
def test_a_key_that_cannot_be_is_refused_in_one_line(home: Path, arguments: tuple[str, ...], named: str) -> None:
    refused = run("key", *arguments, home=home, check=False)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert named in refused.stderr


@pytest.mark.parametrize("text", [None, "", "[{}]"])
def test_a_server_whose_keys_cannot_be_read_does_not_start(home: Path, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "keys.json"
    if text is not None:
        file.write_text(text)
    refused = run("serve", "--port", "0", "--api-keys-file", file, home=home, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {file}: ") and refused.stderr.count("\n") == 1


def test_a_server_with_keys_answers_on_a_public_address_until_they_are_revoked(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = run("key", "new", "--id", "ci", "--scopes", "infer", "--file", file, home=home).stdout.strip()
    with served(home, "--host", "0.0.0.0", "--api-keys-file", str(file)) as (_, url):
        with httpx.Client(base_url=url.replace("0.0.0.0", "127.0.0.1"), timeout=60) as client:
            assert client.get("/health/ready").json() == {"ready": True, "reasons": []}
            assert client.get("/v1/adapters").status_code == 401
            client.headers["Authorization"] = f"Bearer {key}"
            assert client.get("/v1/adapters").status_code == 200
            run("key", "revoke", "ci", "--file", file, home=home)
            time.sleep(1.1)
            assert client.get("/v1/adapters").status_code == 401


def test_several_workers_are_refused_with_the_reason(home: Path) -> None:
    refused = run("serve", "--workers", "2", home=home, check=False)
    assert refused.returncode == 1
    assert "one process holds one device" in refused.stderr


@contextmanager
def served(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its URL; it must end by itself on SIGTERM, with status 0."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")} | {"BANK_HOME": str(home)}
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                yield process, "http://" + line.split("http://")[1].split()[0]
                break
        else:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_server_answers_and_picks_up_what_is_pushed_while_it_runs(home: Path, pictures: Path, colours: str) -> None:
    with served(home) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health/ready").status_code == 200
        package = home / "package"
        assert client.get("/v1/adapters/later").status_code == 404
        run("push", package, "--name", "later", home=home)
        found = client.post(
            "/retrieve",
            data={"request": json.dumps({"gallery": "colours", "k": 2, "adapter": "later"})},
            files={"image": ("red.png", (pictures / "red.png").read_bytes(), "image/png")},
        )
        assert found.status_code == 409, found.text
        assert "__base__" in found.json()["error"]["message"]
        assert client.get("/v1/adapters/later").status_code == 200
