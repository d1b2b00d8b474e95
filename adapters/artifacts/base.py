"""What every store of packages promises, and what it tells about itself."""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import NamedTuple, Protocol, TypeVar

from adapters.config import DIGEST_PATTERN
from adapters.errors import InvalidReference

Made = TypeVar("Made")


class Entry(NamedTuple):
    """One artifact of a store. `num_bytes` of its files; `modified_at` is when it appeared, with a time zone."""

    digest: str
    num_bytes: int
    modified_at: datetime


class Leftover(NamedTuple):
    """What an interrupted write or deletion left behind: no artifact, and in nobody's way.

    `name` below the store's root; `modified_at` of the newest file in it, with a time zone.
    """

    name: str
    num_bytes: int
    modified_at: datetime


class ArtifactStore(Protocol):
    """Packages by their package digest. Safe to share between threads.

    Every method raises ArtifactUnavailable when the store cannot be read or written now, and InvalidReference for what
    is no digest.
    """

    def put(self, package_dir: str | os.PathLike[str]) -> str:
        """Keep a copy of a package and return its digest. Of what is kept already nothing changes, unless it is damaged.

        Raises: InvalidPackage.
        """

    def read(self, digest: str) -> Mapping[str, bytes]:
        """The files of a package by name, with exactly the bytes that `digest` names.

        Raises: ArtifactNotFound, DigestMismatch.
        """

    def load(self, digest: str, make: Callable[[Mapping[str, bytes]], Made]) -> Made:
        """make(files), given only once the files are known to have exactly the bytes that `digest` names.

        `make` may run while they are still being compared, and again with others: nothing may come of a call but what it
        returns. What it raises is raised where the files are right; where they are not, that is what counts.
        Raises: ArtifactNotFound, DigestMismatch.
        """

    def verify(self, digest: str) -> None:
        """Read every byte that is kept again. Raises: ArtifactNotFound, DigestMismatch."""

    def has(self, digest: str) -> bool:
        """Whether the package is here."""

    def is_near(self, digest: str) -> bool:
        """Whether `read` finds the package on this host, as far as can be told without reading it."""

    def delete(self, digest: str) -> None:
        """Forget a package; no error when it is gone already."""

    def digests(self) -> tuple[str, ...]:
        """Every digest kept, sorted."""

    def entries(self) -> tuple[Entry, ...]:
        """Every artifact kept, in the order of the digests."""

    def leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """What writers and deleters that died left behind, untouched for `older_than_s` seconds; sorted by name.

        A write in progress looks the same, so the time must be longer than one takes.
        """

    def sweep_leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """Remove these leftovers and return them."""


def hex_of(digest: str) -> str:
    """The 64 hex digits of `sha256:...`. Raises: InvalidReference for anything else: no other text becomes a path."""
    if not re.fullmatch(DIGEST_PATTERN, digest):
        raise InvalidReference(f"{digest[:100]!r} is no digest: sha256: and 64 lower-case hex digits", param="digest")
    return digest.removeprefix("sha256:")


def aged(leftovers: Iterable[Leftover], older_than_s: float) -> tuple[Leftover, ...]:
    """Those that nobody has touched for `older_than_s` seconds, sorted by name."""
    limit = time.time() - older_than_s
    return tuple(sorted(each for each in leftovers if each.modified_at.timestamp() <= limit))
