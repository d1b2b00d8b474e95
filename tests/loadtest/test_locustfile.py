import json
import os
import subprocess
import sys
from pathlib import Path

from service.auth import KeyEntry, digest_of, new_key
from tests.service.http.serving import serving_tiny

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


def locust(url: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A short run in a process of its own: importing locust patches the one it is in."""
    limits = ["--users", "2", "--spawn-rate", "10", "--run-time", "5s", "--stop-timeout", "30"]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--json", "--host", url, *limits]
    environment = os.environ | {"PYTHONPATH": str(LOCUSTFILE.parents[1])} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_users_find_adapters_and_galleries_and_report_the_server_s_stages(tmp_path: Path) -> None:
    key = new_key()
    entry = KeyEntry(id="load", sha256=digest_of(key), scopes=("infer",))
    with serving_tiny(tmp_path, api_keys=json.dumps([entry.document()])) as serving:
        run = locust(serving.url, LOADTEST_RATE="20", LOADTEST_MEDIA=str(tmp_path / "media"), LOADTEST_API_KEY=key)
    assert run.returncode == 0, run.stderr
    rows = {(row["method"], row["name"]): row for row in json.loads(run.stdout)}
    for path in ("/v1/vqa", "/v1/retrieve"):
        assert rows["POST", path]["num_requests"] > 0 and rows["POST", path]["num_failures"] == 0
        assert rows["STAGE", f"{path} total"]["num_requests"] == rows["POST", path]["num_requests"]


def test_a_misspelt_popularity_is_refused() -> None:
    run = locust("http://127.0.0.1:9", LOADTEST_POPULARITY="zip")
    assert run.returncode != 0 and "LOADTEST_POPULARITY" in run.stderr
