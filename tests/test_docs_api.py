"""docs/api.md promises statuses and codes; they must be the code's."""

import re
from pathlib import Path

from service.config import Settings
from service.http import errors
from service.http.app import create_app

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = {
        (code, int(status)) for status, code in re.findall(r"^\| (\d{3}) \| `([a-z_]+)` \|", PAGE, re.MULTILINE)
    }
    http_only = [value for value in vars(errors).values() if isinstance(value, errors.Rule)]
    promised = {(rule.code, rule.status) for rule in (*errors.TABLE.values(), *http_only)}
    assert documented == promised


def test_every_documented_route_is_served() -> None:
    named = set(re.findall(r"`(?:GET |POST )?(/[a-z0-9/{}_]+)`", PAGE))
    served = {re.sub(r"{\w+}", "{}", path) for path in create_app(Settings()).openapi()["paths"]}
    pages = {"/docs"}  # for people: not part of the contract
    assert {re.sub(r"{\w+}", "{}", path) for path in named} - pages <= served


def test_every_served_route_is_documented() -> None:
    served = create_app(Settings()).openapi()["paths"]
    assert [path for path in served if path not in PAGE] == []
