"""How a request names an adapter.

name                 what the alias `prod` names          = name@prod
name@canary          what another alias names
name@7               one version
sha256:<64 hex>      one package, or all packages with the same weights
__base__             the backbone without an adapter
"""

import re
from dataclasses import dataclass

from adapters.config import ALIAS_PATTERN, BASE_ADAPTER, DIGEST_PATTERN, check_name
from adapters.errors import InvalidReference

DEFAULT_ALIAS = "prod"
VERSION_PATTERN = r"[1-9][0-9]{0,8}"
MAX_REFERENCE_CHARS = 128  # longer than any valid one


@dataclass(frozen=True)
class BaseReference:
    """`__base__`: the backbone without an adapter."""

    def __str__(self) -> str:
        return BASE_ADAPTER


@dataclass(frozen=True)
class AliasReference:
    """`name@alias`: the version an alias names at this moment."""

    name: str
    alias: str = DEFAULT_ALIAS

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class VersionReference:
    """`name@7`: one version."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class DigestReference:
    """`sha256:...`: the version with this package digest or weights digest."""

    digest: str

    def __str__(self) -> str:
        return self.digest


AdapterReference = AliasReference | VersionReference | DigestReference
Reference = BaseReference | AdapterReference


def parse_reference(text: str) -> Reference:
    """Read `name`, `name@alias`, `name@7`, `sha256:<64 hex>` or `__base__`; `name` alone is `name@prod`.

    Raises: InvalidReference for anything else.
    """
    if text == BASE_ADAPTER:
        return BaseReference()
    if re.fullmatch(DIGEST_PATTERN, text):
        return DigestReference(text)
    if len(text) > MAX_REFERENCE_CHARS:
        raise InvalidReference(f"a reference has at most {MAX_REFERENCE_CHARS} characters", param="adapter")
    name, at, selector = text.partition("@")
    check_name(name, param="adapter")
    if not at:
        return AliasReference(name)
    if re.fullmatch(VERSION_PATTERN, selector):
        return VersionReference(name, int(selector))
    if re.fullmatch(ALIAS_PATTERN, selector):
        return AliasReference(name, selector)
    raise InvalidReference(
        f"{text!r} is no valid reference: {name}, {name}@alias or {name}@7, sha256:<64 hex digits> or {BASE_ADAPTER}",
        param="adapter",
    )


def check_alias(alias: str) -> str:
    """Return `alias` when it may be one. Raises: InvalidReference."""
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise InvalidReference(
            f"{alias[:MAX_REFERENCE_CHARS]!r} is no valid alias: 1 to 32 of a-z, 0-9, '_', '-', starting with a letter",
            param="alias",
        )
    return alias


def check_digest(digest: str, *, param: str = "digest") -> str:
    """Return `digest` when it is one. Raises: InvalidReference."""
    if not re.fullmatch(DIGEST_PATTERN, digest):
        raise InvalidReference(f"{digest[:MAX_REFERENCE_CHARS]!r} is no digest: sha256: and 64 hex digits", param=param)
    return digest
