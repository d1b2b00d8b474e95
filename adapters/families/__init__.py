"""The families of adapters, by name."""

from adapters.config import Architecture
from adapters.errors import InvalidPackage
from adapters.families.base import Family
from adapters.families.epalm import EPalm
from adapters.families.uniadapter import UniAdapter

FAMILIES: dict[str, Family] = {"uniadapter": UniAdapter(), "epalm": EPalm()}


def families_for(architecture: Architecture) -> list[Family]:
    """The families of adapters for this kind of backbone."""
    return [family for family in FAMILIES.values() if family.architecture == architecture]


def family_of(name: str) -> Family:
    """The family called `name`. Raises: InvalidPackage listing the known ones."""
    if name not in FAMILIES:
        raise InvalidPackage(f"unknown adapter family {name!r}; known: {', '.join(FAMILIES)}", param="family")
    return FAMILIES[name]
