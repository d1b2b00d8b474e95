import json
import logging
import os
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service import auth
from service.auth import (
    LOCAL,
    NOBODY,
    SCOPES,
    InvalidKeys,
    Keychain,
    KeyEntry,
    KeyRing,
    Principal,
    add_entry,
    digest_of,
    new_key,
    read_entries,
    remove_entry,
)
from service.errors import Forbidden, Unauthenticated

KEY = new_key()
ENTRY: dict[str, Any] = {"id": "ci", "sha256": digest_of(KEY), "scopes": ["infer"]}


def text_of(*entries: dict[str, Any]) -> str:
    return json.dumps(entries)


def reason_of(keys: KeyRing | Keychain, key: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        keys.authenticate(key)
    assert key not in caught.value.message
    return caught.value.reason


# --- principals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns, allowed, refused",
    [
        (("*",), ["vqa", "__base__", "a.b-c_d"], []),
        (("vqa*",), ["vqa", "vqa-2"], ["my-vqa", "__base__", ""]),
        (("team-a-*", "shared"), ["team-a-x", "team-a-", "shared"], ["team-ax", "shared2", "team-b-x"]),
        (("v?a",), ["vqa"], ["va", "vqqa"]),
        (("__base__",), ["__base__"], ["vqa"]),
        ((), [], ["vqa", "*"]),
    ],
)
def test_patterns_are_of_whole_names(patterns: tuple[str, ...], allowed: list[str], refused: list[str]) -> None:
    principal = Principal("x", frozenset({"infer"}), patterns)
    assert [name for name in (*allowed, *refused) if principal.allows(name)] == allowed


def test_a_name_beyond_the_patterns_is_forbidden_without_a_word_about_it() -> None:
    with pytest.raises(Forbidden, match="'b'") as caught:
        Principal("x", frozenset({"admin"}), ("a",)).check_adapter("b")
    assert (caught.value.reason, caught.value.param) == ("pattern", "adapter")


@pytest.mark.parametrize("scope", SCOPES)
def test_admin_is_every_scope_and_the_others_are_themselves(scope: auth.Scope) -> None:
    held = {other for other in SCOPES if Principal("x", frozenset({other}), ("*",)).has_any({scope})}
    assert held == {scope, "admin"}


def test_nobody_may_do_nothing_and_the_machine_itself_everything() -> None:
    assert not NOBODY.is_known and not NOBODY.has_any(SCOPES) and not NOBODY.allows("vqa")
    assert LOCAL.is_known and LOCAL.sees_all and all(LOCAL.has_any({scope}) for scope in SCOPES)


# --- keys as they are written --------------------------------------------------------------------------------


def test_a_key_stands_for_its_principal() -> None:
    ring = KeyRing.parse(text_of(ENTRY | {"scopes": ["infer", "deploy"], "adapters": ["vqa*"]}))
    assert ring.authenticate(KEY) == Principal("ci", frozenset({"infer", "deploy"}), ("vqa*",))
    assert KeyRing.parse(text_of(ENTRY)).authenticate(KEY).adapters == ("*",)


def test_other_keys_are_unknown() -> None:
    ring = KeyRing.parse(text_of(ENTRY))
    for other in (
        new_key(),
        KEY[:-1],
        KEY + "x",
        KEY.upper(),
        digest_of(KEY),
        "x" * 100_000,
        "\udc80" * 40,
        "ключ" * 10,
    ):
        assert reason_of(ring, other) == "unknown"


@pytest.mark.parametrize("short", ["", "secret", "x" * (auth.MIN_KEY_CHARS - 1)])
def test_a_key_that_could_be_guessed_is_never_valid(short: str) -> None:
    ring = KeyRing.parse(text_of(ENTRY | {"sha256": digest_of(short)}))
    assert reason_of(ring, short or "?") == "unknown"
    with pytest.raises(Unauthenticated):
        ring.authenticate(short)


def test_a_key_is_valid_until_it_expires() -> None:
    def ring(seconds: float) -> KeyRing:
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        return KeyRing.parse(text_of(ENTRY | {"expires": expires.isoformat()}))

    assert ring(60).authenticate(KEY).id == "ci"
    assert reason_of(ring(-1), KEY) == "expired"


@pytest.mark.parametrize("written", ["2030-01-01T00:00:00Z", "2030-01-01t02:00:00+02:00", "2030-01-01 00:00:00.000z"])
def test_times_are_rfc_3339(written: str) -> None:
    entry = KeyRing.parse(text_of(ENTRY | {"expires": written})).entries[0]
    assert entry.expires == datetime(2030, 1, 1, tzinfo=UTC)


WRONG = [
    ({"id": None}, "id"),
    ({"id": "Two Words"}, "id"),
    ({"id": "x" * 65}, "id"),
    ({"id": "line\nbreak"}, "id"),
    ({"id": "ci\n"}, "id"),
    ({"sha256": "0" * 63}, "sha256"),
    ({"sha256": digest_of(KEY).upper()}, "sha256"),
    ({"sha256": KEY}, "sha256"),
    ({"scopes": []}, "scopes"),
    ({"scopes": "infer"}, "scopes"),
    ({"scopes": ["read"]}, "scopes"),
    ({"scopes": ["infer", 1]}, "scopes"),
    ({"adapters": []}, "adapters"),
    ({"adapters": "*"}, "adapters"),
    ({"adapters": ["VQA*"]}, "adapters"),
    ({"adapters": ["[a-z]"]}, "adapters"),
    ({"adapters": [""]}, "adapters"),
    ({"adapters": ["vqa@7"]}, "adapters"),
    ({"expires": 1893456000}, "expires"),
    ({"expires": "1893456000"}, "expires"),
    ({"expires": "2030-01-01"}, "expires"),
    ({"expires": "2030-01-01T00:00:00"}, "expires"),
    ({"expires": "2030-13-01T00:00:00Z"}, "expires"),
    ({"key": KEY}, "key"),
    ({"adapter": ["vqa"]}, "adapter"),
]


def shown(changes: dict[str, Any]) -> str:
    """A name for a test: the same in every process, which the key is not."""
    return json.dumps(changes).replace(KEY, "KEY").replace(digest_of(KEY).upper(), "DIGEST")[:40]


@pytest.mark.parametrize("changes, named", WRONG, ids=[shown(changes) for changes, _ in WRONG])
def test_a_wrong_entry_is_refused_by_place_and_without_its_secrets(changes: dict[str, Any], named: str) -> None:
    other = ENTRY | {"id": "other", "sha256": "1" * 64}
    with pytest.raises(InvalidKeys, match=rf"^1\.{named}") as caught:
        KeyRing.parse(text_of(other, ENTRY | changes))
    assert KEY not in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "[", "[1]", '"x"', "[[]]", "\ufeff[]", "[NaN]", "[" * 5000, "[] []"]
)
def test_what_is_no_list_of_keys_is_refused(text: str) -> None:
    with pytest.raises(InvalidKeys):
        KeyRing.parse(text)


def test_a_field_given_twice_is_refused() -> None:
    text = text_of(ENTRY).replace('"scopes": ["infer"]', '"scopes": ["infer"], "scopes": ["admin"]')
    with pytest.raises(InvalidKeys, match="twice"):
        KeyRing.parse(text)


def test_two_keys_of_one_id_and_two_ids_of_one_key_are_refused() -> None:
    with pytest.raises(InvalidKeys, match="'ci' is given twice"):
        KeyRing.parse(text_of(ENTRY, ENTRY | {"sha256": "1" * 64}))
    with pytest.raises(InvalidKeys, match="'ci' and 'cd' are the same key"):
        KeyRing.parse(text_of(ENTRY, ENTRY | {"id": "cd"}))


def test_no_keys_at_all_let_nobody_in() -> None:
    assert reason_of(Keychain.of_text("[]"), KEY) == "unknown"


def test_keys_are_long_random_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {len("bank_") + 43}
    assert all(key.startswith("bank_") for key in keys)


# --- keys in use ---------------------------------------------------------------------------------------------


def eventually(condition: Any) -> None:
    end = time.monotonic() + 2 * auth.LOOK_INTERVAL_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_missing_key_is_told_how_to_send_one() -> None:
    for missing in (None, ""):
        with pytest.raises(Unauthenticated, match="Authorization: Bearer") as caught:
            Keychain.of_text(text_of(ENTRY)).authenticate(missing)
        assert caught.value.reason == "missing"


def test_a_key_taken_out_of_the_file_is_refused_soon_and_one_put_in_is_taken(tmp_path: Path) -> None:
    file, other = tmp_path / "keys.json", new_key()
    file.write_text(text_of(ENTRY))
    keys = Keychain.of_file(file)
    assert keys.authenticate(KEY).id == "ci"
    file.write_text(text_of(ENTRY | {"id": "cd", "sha256": digest_of(other)}))

    def is_replaced() -> bool:
        try:
            return keys.authenticate(other).id == "cd"
        except Unauthenticated:
            return False

    eventually(is_replaced)
    assert reason_of(keys, KEY) == "unknown"


def test_a_quick_edit_of_the_same_length_is_seen(tmp_path: Path) -> None:
    """Size and time of the file tell nothing: it is written in place and its time is put back."""
    file = tmp_path / "keys.json"
    file.write_text(text_of(ENTRY))
    before = file.stat()
    keys = Keychain.of_file(file)
    file.write_text(text_of(ENTRY | {"sha256": digest_of(new_key())}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    time.sleep(auth.LOOK_INTERVAL_S)
    assert reason_of(keys, KEY) == "unknown"


def break_by_removing(file: Path) -> None:
    file.unlink()


def break_by_cutting(file: Path) -> None:
    file.write_text(file.read_text()[:-5])


def break_by_emptying(file: Path) -> None:
    file.write_text("")


def break_by_one_wrong_entry(file: Path) -> None:
    file.write_text(text_of(ENTRY, ENTRY | {"id": "x"}))


def break_by_growing(file: Path) -> None:
    file.write_text(text_of(ENTRY) + " " * auth.MAX_FILE_BYTES)


def break_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def break_by_bytes(file: Path) -> None:
    file.write_bytes(b"\xff\xfe[]")


@pytest.mark.parametrize(
    "spoil",
    [
        break_by_removing,
        break_by_cutting,
        break_by_emptying,
        break_by_one_wrong_entry,
        break_by_growing,
        break_by_a_folder,
        break_by_bytes,
    ],
)
def test_a_file_that_breaks_keeps_the_keys_it_held_and_says_so_once(
    spoil: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "LOOK_INTERVAL_S", 0.0)
    file, revoked = tmp_path / "keys.json", new_key()
    file.write_text(text_of(ENTRY))
    keys = Keychain.of_file(file)
    with caplog.at_level(logging.INFO):
        spoil(file)
        for _ in range(3):
            assert keys.authenticate(KEY).id == "ci"
            assert reason_of(keys, revoked) == "unknown"
    assert keys.error
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(file) in caplog.text and digest_of(KEY) not in caplog.text
    if file.is_dir():
        file.rmdir()
    file.write_text(text_of(ENTRY))
    keys.authenticate(KEY)
    assert keys.error is None


@pytest.mark.parametrize("text", ["", "[", "{}"])
def test_a_file_that_is_broken_from_the_start_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(InvalidKeys, match=r"keys\.json: it cannot be read"):
        Keychain.of_file(file)
    file.write_text(text)
    with pytest.raises(InvalidKeys, match=r"keys\.json: "):
        Keychain.of_file(file)


# --- changing a file -----------------------------------------------------------------------------------------


def entry(key_id: str, **changes: Any) -> KeyEntry:
    return KeyEntry.model_validate(ENTRY | {"id": key_id, "sha256": digest_of(new_key())} | changes)


def test_keys_are_added_and_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first, second = entry("a", adapters=["vqa*"]), entry("b", expires="2030-01-01T00:00:00Z")
    add_entry(file, first)
    add_entry(file, second)
    assert read_entries(file) == (first, second)
    remove_entry(file, "a")
    assert read_entries(file) == (second,)
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_taking_the_last_key_out_leaves_a_list_and_not_an_open_door(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_entry(file, entry("a"))
    remove_entry(file, "a")
    assert json.loads(file.read_text()) == []
    assert reason_of(Keychain.of_file(file), KEY) == "unknown"


def test_a_new_file_is_for_its_owner_and_another_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_entry(file, entry("a"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o664)
    add_entry(file, entry("b"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o644  # a server of the group may read it, and nobody else write it


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "real" / "keys.json")
    add_entry(link, entry("a"))
    add_entry(link, entry("b"))
    assert link.is_symlink() and len(read_entries(tmp_path / "real" / "keys.json")) == 2


def test_an_id_is_given_once_and_only_a_known_one_is_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_entry(file, entry("a"))
    with pytest.raises(InvalidKeys, match="has a key 'a' already"):
        add_entry(file, entry("a"))
    with pytest.raises(InvalidKeys, match="no key 'b'; there are: a"):
        remove_entry(file, "b")


@pytest.mark.parametrize("change", [lambda file: add_entry(file, entry("b")), lambda file: remove_entry(file, "a")])
def test_a_broken_file_is_not_written_over(change: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('[{"id": "a"')
    with pytest.raises(InvalidKeys):
        change(file)
    assert file.read_text() == '[{"id": "a"'
    assert list(tmp_path.iterdir()) == [file]


def test_several_who_add_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_entry, args=(file, entry(f"key-{n}"))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {known.id for known in read_entries(file)} == {f"key-{n}" for n in range(8)}
