"""docs/operations.md lists every setting and every series; the lists must be the code's."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from service.config import CLIENT_KEY_VARIABLE, Settings
from service.metrics import Metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def rows(first_column: str) -> dict[str, list[str]]:
    """The table whose heading begins with `first_column`: cells of each row, backquotes taken off, by the first cell."""
    _, _, rest = PAGE.partition(f"| {first_column} |")
    table = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    return {row[0].strip("`"): [cell.replace("`", "") for cell in row[1:]] for row in cells}


def shown(value: Any) -> str:
    """A default as the page writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {name: row[0] for name, row in rows("variable").items()}
    assert documented == {f"BANK_{name.upper()}": shown(field.default) for name, field in Settings.model_fields.items()}


def test_every_setting_says_what_it_costs() -> None:
    for name, row in rows("variable").items():
        assert row[1].endswith("."), name


def test_every_series_is_documented_with_its_type_and_labels() -> None:
    metrics = Metrics()
    wrapped = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    expected = {
        metric._name + ("_total" if metric._type == "counter" else ""): [metric._type, ", ".join(metric._labelnames)]
        for metric in wrapped
    }
    expected |= {family.name: [family.type, ", ".join(family._labelnames)] for family in metrics.residency.describe()}
    assert len(list(metrics.registry.collect())) == len(expected)
    assert {name: row[:2] for name, row in rows("series").items()} == expected
    assert all(row[2].endswith(".") for row in rows("series").values())


def test_every_event_is_documented_with_its_keys() -> None:
    expected: dict[str, set[str]] = {}
    for file in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("event", "logs.event"):
                for name in (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)):
                    assert isinstance(name, str)
                    expected.setdefault(name, set()).update(keyword.arg or "" for keyword in node.keywords)
    assert {name: set(row[0].split(", ")) for name, row in rows("event").items()} == expected
    assert all(row[1].endswith(".") for row in rows("event").values())


@pytest.mark.parametrize(
    "file", ["README.md", "Dockerfile", "docker-compose.yml", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_every_variable_that_is_named_exists(file: str | Path) -> None:
    text = (ROOT / file).read_text()
    known = {f"BANK_{name.upper()}" for name in Settings.model_fields} | {"BANK_NAME", CLIENT_KEY_VARIABLE}
    assert set(re.findall(r"\bBANK_[A-Z_]*[A-Z]\b", text)) <= known


def test_the_grace_period_is_longer_than_the_drain() -> None:
    from service.http.server import DRAIN_TIMEOUT_S

    compose = (ROOT / "docker-compose.yml").read_text()
    grace = re.search(r"stop_grace_period: (\d+)s", compose)
    assert grace is not None
    assert int(grace[1]) > DRAIN_TIMEOUT_S
    assert f"up to {DRAIN_TIMEOUT_S} seconds" in PAGE
    assert f"{grace[1]} seconds before killing" in PAGE


def test_the_exit_status_of_a_lost_device_is_documented() -> None:
    from service.runtime import EXIT_DEVICE_LOST

    assert f"Exit status {EXIT_DEVICE_LOST}:" in PAGE
