"""Who may do what: API keys, hashed at rest, and the principals they stand for. Knows no HTTP.

Keys are kept as a JSON list, in a file or a variable:

    [{"id": "ci", "sha256": "<64 hex digits>", "scopes": ["infer"], "adapters": ["vqa*"], "expires": "2030-01-01T00:00:00Z"}]

    id         names the key in the log and wherever its holder is told apart from others
    sha256     of the key. A key is 256 random bits: nobody can guess one, so a slow or salted hash would protect nothing more
    scopes     what it may do:      infer     ask, search, list, and see what galleries hold
                                    deploy    list, and change what is served; no asking
                                    metrics   read the metrics of the whole server
                                    admin     everything
    adapters   which adapters it may do it with: patterns of names, `*` any characters, `?` one; default all
    expires    RFC 3339, when it stops being valid; default never

Patterns bound every scope, admin too. A gallery belongs to the adapter that embedded it.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic import ValidationError as PydanticError

from adapters.config import NAME_PATTERN
from adapters.errors import AdapterBankError
from service.errors import Forbidden, Unauthenticated

log = logging.getLogger(__name__)

Scope = Literal["infer", "deploy", "metrics", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
EVERY_ADAPTER = "*"

KEY_PREFIX = "bank_"  # lets people and secret scanners see what it is
KEY_BYTES = 32
MIN_KEY_CHARS, MAX_KEY_CHARS = 32, 512  # a plain hash protects long random keys only, so short ones are never valid
MAX_FILE_BYTES = 4 * 1024 * 1024
LOOK_INTERVAL_S = 1.0

RFC_3339 = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)"


class InvalidKeys(AdapterBankError):
    """Keys that cannot be used as they are written, or a change to them that cannot be made."""


# --- who asks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Principal:
    """Who asks, and what they may do. `id` is the key's."""

    id: str
    scopes: frozenset[Scope]
    adapters: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        """Whether it is somebody at all."""
        return bool(self.scopes)

    @property
    def sees_all(self) -> bool:
        """Whether every adapter is allowed."""
        return EVERY_ADAPTER in self.adapters

    def has_any(self, scopes: Iterable[Scope]) -> bool:
        """Whether one of these scopes is held; `admin` is all of them."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)

    def allows(self, adapter: str) -> bool:
        """Whether an adapter of this name may be used, `__base__` being a name like others."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def check_adapter(self, adapter: str, *, param: str = "adapter") -> None:
        """Raises: Forbidden unless the adapter may be used. It does not tell whether there is such an adapter."""
        if not self.allows(adapter):
            raise Forbidden(f"this key may not use an adapter named {adapter!r}", reason="pattern", param=param)


LOCAL: Final = Principal("(local)", frozenset(SCOPES), (EVERY_ADAPTER,))
"""Whoever asks where no keys are needed: the command line, and a server that answers to its own machine alone."""
NOBODY: Final = Principal("(nobody)", frozenset(), ())
"""Whoever has not shown a key."""


# --- keys --------------------------------------------------------------------------------------------------


def _read_time(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(RFC_3339, value):
        raise ValueError("must be a time with its zone, such as 2030-01-01T00:00:00Z")
    return datetime.fromisoformat(value.upper())


class KeyEntry(BaseModel):
    """A key as it is kept: everything but the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    adapters: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9._*?-]{1,64}$")], ...] = Field(
        default=(EVERY_ADAPTER,), min_length=1
    )
    expires: Annotated[AwareDatetime | None, BeforeValidator(_read_time)] = None

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now

    @property
    def principal(self) -> Principal:
        """Whom it stands for."""
        return Principal(self.id, frozenset(self.scopes), self.adapters)

    def document(self) -> dict[str, Any]:
        """As it stands in a file."""
        return self.model_dump(mode="json", exclude_none=True)


_ENTRIES: Final = TypeAdapter(tuple[KeyEntry, ...])


class KeyRing:
    """Keys that were read together; immutable."""

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        """Raises: InvalidKeys when two have the same id or are the same key."""
        self.entries = tuple(entries)
        self._by_digest = {entry.sha256: entry for entry in self.entries}
        ids = [entry.id for entry in self.entries]
        if twice := sorted({key_id for key_id in ids if ids.count(key_id) > 1}):
            raise InvalidKeys(f"the id {twice[0]!r} is given twice")
        if len(self._by_digest) < len(self.entries):
            hidden = next(entry for entry in self.entries if self._by_digest[entry.sha256] is not entry)
            raise InvalidKeys(f"{hidden.id!r} and {self._by_digest[hidden.sha256].id!r} are the same key")

    @classmethod
    def parse(cls, text: str | bytes) -> "KeyRing":
        """Read the JSON list. Raises: InvalidKeys naming the entry and what is wrong with it."""
        try:
            json.loads(text, object_pairs_hook=_without_repetition)
            return cls(_ENTRIES.validate_json(text, strict=True))
        except PydanticError as error:
            wrong = error.errors(include_url=False, include_input=False, include_context=False)
            lines = [f"{'.'.join(map(str, each['loc'])) or 'document'}: {each['msg']}" for each in wrong[:3]]
            raise InvalidKeys("; ".join(lines)) from None
        except (ValueError, RecursionError) as error:
            raise InvalidKeys(f"no JSON list of keys: {error}") from None

    def authenticate(self, key: str) -> Principal:
        """Whom a key stands for. Raises: Unauthenticated.

        It is looked up by its digest: how long that takes tells of the digest of what was sent, which cannot be steered
        towards one that is kept.
        """
        digest = digest_of(key) if MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS else ""
        entry = self._by_digest.get(digest)
        if entry is None:
            raise Unauthenticated("this API key is not valid here", reason="unknown")
        if entry.has_expired(datetime.now(UTC)):
            raise Unauthenticated(f"this API key expired at {entry.expires}", reason="expired")
        return entry.principal


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a field is given twice")
    return document


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Keychain:
    """The keys in use. Those of a file follow the file; for one thread, which is the event loop's."""

    def __init__(self, ring: KeyRing, path: Path | None = None, text: bytes = b"") -> None:
        self.ring = ring
        self.error: str | None = None
        """Why the file cannot be used as it is now; the keys are those it held before."""
        self._path = path
        self._text = text
        self._looks_at = time.monotonic() + LOOK_INTERVAL_S

    @classmethod
    def of_text(cls, text: str) -> "Keychain":
        """Keys that stay as they are. Raises: InvalidKeys."""
        return cls(KeyRing.parse(text))

    @classmethod
    def of_file(cls, path: Path) -> "Keychain":
        """Keys of a file. Raises: InvalidKeys."""
        try:
            text = _read(path)
            return cls(KeyRing.parse(text), path, text)
        except InvalidKeys as error:
            raise InvalidKeys(f"{path}: {error.message}") from error

    def authenticate(self, key: str | None) -> Principal:
        """Whom a key stands for, by what the file says now, give or take a second. Raises: Unauthenticated."""
        self._look()
        if not key:
            raise Unauthenticated("an API key is needed: Authorization: Bearer KEY, or X-API-Key", reason="missing")
        return self.ring.authenticate(key)

    def _look(self) -> None:
        """Take over what the file says, once a second at most.

        Its bytes are compared: time stamps are too coarse to tell two quick edits apart. Reading a small local file
        takes less than handing the work to a thread would.
        """
        if self._path is None or time.monotonic() < self._looks_at:
            return
        self._looks_at = time.monotonic() + LOOK_INTERVAL_S
        try:
            text = _read(self._path)
            if text != self._text:
                self.ring, self._text = KeyRing.parse(text), text
                log.info("the API keys changed: there are %d now", len(self.ring.entries))
            self.error = None
        except InvalidKeys as error:
            if self.error != error.message:
                log.error("%s cannot be used, the keys known before stay valid: %s", self._path, error.message)
            self.error = error.message


def _read(path: Path) -> bytes:
    """The bytes of a key file. Raises: InvalidKeys."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidKeys(f"it cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise InvalidKeys(f"it has more than {MAX_FILE_BYTES} bytes")
    return text


# --- changing a file of keys -------------------------------------------------------------------------------


def read_entries(path: Path) -> tuple[KeyEntry, ...]:
    """The keys of a file. Raises: InvalidKeys."""
    return Keychain.of_file(path).ring.entries


def add_entry(path: Path, entry: KeyEntry) -> None:
    """Write another key into a file, which is made (mode 0600) if there is none. Raises: InvalidKeys."""
    with _locked(path) as place:
        entries = read_entries(place) if place.exists() else ()
        if any(known.id == entry.id for known in entries):
            raise InvalidKeys(f"{path} has a key {entry.id!r} already", param="id")
        _write(place, (*entries, entry))


def remove_entry(path: Path, key_id: str) -> None:
    """Take a key out of a file. Raises: InvalidKeys when it is not there."""
    with _locked(path) as place:
        entries = read_entries(place)
        rest = [entry for entry in entries if entry.id != key_id]
        if len(rest) == len(entries):
            known = ", ".join(entry.id for entry in entries) or "none"
            raise InvalidKeys(f"{path} has no key {key_id!r}; there are: {known}", param="id")
        _write(place, rest)


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The file itself where `path` is a link to it, while nobody else changes a file in its folder this way."""
    place = Path(os.path.realpath(path))
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield place
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, entries: Iterable[KeyEntry]) -> None:
    """Replace a file at once. It keeps its owner and mode, without which a server might not be able to read it any more."""
    text = json.dumps([entry.document() for entry in KeyRing(entries).entries], indent=2) + "\n"
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            if path.exists():
                known = path.stat()
                os.fchown(file.fileno(), known.st_uid, known.st_gid)
                os.fchmod(file.fileno(), known.st_mode & 0o755)  # never writable by others
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
