"""The families of adapters, by name."""

from adapters.errors import InvalidPackage
from adapters.families.base import Family
from adapters.families.uniadapter import UniAdapter

FAMILIES: dict[str, Family] = {"uniadapter": UniAdapter()}


def family_of(name: str) -> Family:
    """The family called `name`. Raises: InvalidPackage listing the known ones."""
    if name not in FAMILIES:
        raise InvalidPackage(f"unknown adapter family {name!r}; known: {', '.join(FAMILIES)}", param="family")
    return FAMILIES[name]
