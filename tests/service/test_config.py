"""Settings from the environment and flags: what wins, what is refused and how it is said."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.config import InvalidSettings, Settings, parse_slots, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("BANK_"):
            monkeypatch.delenv(name)


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_PORT", "9001")
    monkeypatch.setenv("BANK_HOST", "127.0.0.2")
    settings = Settings.load(port=9002, host=None)
    assert (settings.port, settings.host, settings.max_k) == (9002, "127.0.0.2", 1000)


def test_a_misspelt_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_SLOT", "64:1")
    with pytest.raises(InvalidSettings, match=r"unknown settings: BANK_SLOT$"):
        Settings.load()
    assert unknown_variables({"BANK_HOME": "x", "BANK_X": "", "OTHER": "y"}) == ["BANK_X"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("port", "many"),
        ("dtype", "int8"),
        ("host_cache_mib", 0),
        ("media_workers", 0),
        ("media_workers", 65),
        ("max_queue_seconds", 0),
        ("slots", "64"),
        ("slots", "64:1,64:2"),
        ("feature_cache_mib", -1),
        ("max_candidates", 50_001),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match=name):
        Settings.load(**{name: value})
    monkeypatch.setenv(f"BANK_{name.upper()}", str(value))
    with pytest.raises(InvalidSettings, match=name):
        Settings.load()


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_PORT", "")
    assert Settings.load().port == 8000


@pytest.mark.parametrize("name", ["BANK_API_KEYS", "BANK_API_KEYS_FILE"])
def test_empty_keys_are_no_open_door(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("", " "):
        monkeypatch.setenv(name, nothing)
        with pytest.raises(InvalidSettings, match=f"^{name} is empty"):
            Settings.load()


def test_keys_come_from_one_place_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_API_KEYS", '[{"id": "ci"}]')
    assert Settings.load().api_keys == '[{"id": "ci"}]'
    assert "ci" not in repr(Settings.load())
    with pytest.raises(InvalidSettings, match="api_keys or api_keys_file, not both"):
        Settings.load(api_keys_file=Path("keys.json"))


def test_a_client_s_key_is_no_setting_and_no_list_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_API_KEY", "bank_x")
    assert Settings.load().api_keys is None
    monkeypatch.setenv("BANK_API_KEY", '[{"id": "ci"}]')
    with pytest.raises(InvalidSettings, match="BANK_API_KEYS"):
        Settings.load()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings.load().port = 1  # type: ignore[misc]
    with pytest.raises(InvalidSettings, match="colour"):
        Settings.load(colour="red")


def test_the_home_is_expanded_and_holds_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Settings.load(api_keys_file=Path("~/keys.json")).api_keys_file == Path("/home/somebody/keys.json")
    assert Settings.load().home == Path("/home/somebody/.adapter-bank")
    assert Settings.load().backbone_folder == Path("/home/somebody/.adapter-bank/backbone")
    assert Settings.load(backbone=Path("/models/blip")).backbone_folder == Path("/models/blip")


def test_slots_are_read_by_rising_rank() -> None:
    assert parse_slots("128:6,64:24") == {"blip": ((64, 24), (128, 6))}
    assert Settings.load(slots="512:2").slot_buckets() == ((512, 2),)
    assert Settings.load().slot_buckets() is None


@pytest.mark.parametrize(
    "text", ["", "64", "64:", ":2", "64:2,", "64:2;128:1", "0:2", "64:0", "64:1,64:1", "-4:1", "x:1"]
)
def test_slots_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"form|ranks"):
        parse_slots(text)


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
