"""The frozen backbones of one process, each with the bank of its adapters; the first is the default.

An adapter belongs to the backbone that has every part it was made for. They share a device thread, and nothing else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

from adapters.config import BASE_ADAPTER, AdapterConfig
from adapters.errors import AdapterNotFound, BackboneNotFound, MissingPart
from adapters.families.base import BackboneDims
from adapters.package import check_backbone
from service.backbone.base import Backbone
from service.bank import TIERS, AdapterBank
from service.metrics import Metrics
from service.recordings import Recordings

DEFAULT = ""  # the name under which the default is known too


@dataclass(frozen=True)
class HostedBackbone:
    """A backbone of this process, by a name of the operator's."""

    name: str
    backbone: Backbone
    bank: AdapterBank
    recordings: Recordings | None = (
        None  # of its words and small batches; None: they are launched operation by operation
    )

    def dims(self) -> BackboneDims:
        """What adapters must fit. Raises: MissingPart for a backbone that takes none."""
        return self.backbone.dims()


class Backbones:
    """All of them, at least one."""

    def __init__(self, hosted: Iterable[HostedBackbone], metrics: Metrics) -> None:
        self._hosted = {one.name: one for one in hosted}
        self._default = next(iter(self._hosted.values()))
        for tier in TIERS:
            metrics.resident_adapters.labels(tier).set_function(partial(self._num_resident, tier))
            metrics.resident_bytes.labels(tier).set_function(partial(self._num_resident_bytes, tier))
        for one in self:
            if one.recordings is not None:
                _tell_of(one.recordings, one.name, metrics)

    @classmethod
    def of_one(
        cls, backbone: Backbone, bank: AdapterBank, metrics: Metrics, recordings: Recordings | None = None
    ) -> Self:
        """A single backbone, which is the default."""
        return cls([HostedBackbone(DEFAULT, backbone, bank, recordings)], metrics)

    @property
    def default(self) -> HostedBackbone:
        """The one that serves `__base__`."""
        return self._default

    def __iter__(self) -> Iterator[HostedBackbone]:
        return iter(self._hosted.values())

    def named(self, name: str) -> HostedBackbone:
        """The one of that name. Raises: BackboneNotFound."""
        if name == DEFAULT:
            return self._default
        if name not in self._hosted:
            raise BackboneNotFound(f"no backbone {name!r}; there are {', '.join(self._hosted)}")
        return self._hosted[name]

    def hosting(self, config: AdapterConfig) -> HostedBackbone:
        """The one an adapter was made for.

        Raises: BackboneMismatch, MissingPart, both about the backbone of its kind that comes closest.
        """
        alike = [one for one in self if one.backbone.architecture == config.backbone.architecture]
        if not alike:
            kinds = ", ".join(sorted({one.backbone.architecture for one in self}))
            raise MissingPart(f"the adapter needs a backbone of kind {config.backbone.architecture}; there is {kinds}")
        for one in alike:
            if config.backbone.parts.items() <= one.backbone.parts.items():
                return one
        closest = max(alike, key=lambda one: len(config.backbone.parts.items() & one.backbone.parts.items()))
        closest.dims()  # one that takes no adapters says why
        check_backbone(config, closest.backbone.parts)
        raise AssertionError("a backbone lacks a part and has it. This is a bug.")

    # --- the host tiers of all banks, as one: a digest is in the bank of the backbone it was made for ---------

    def hold(self, digest: str) -> bool:
        """See AdapterBank.hold."""
        return digest == BASE_ADAPTER or any(one.bank.hold(digest) for one in self)

    def release(self, digest: str) -> None:
        """See AdapterBank.release."""
        if digest != BASE_ADAPTER:
            self.holding(digest).bank.release(digest)

    def holding(self, digest: str) -> HostedBackbone:
        """The one whose bank has an adapter on the host; for `__base__` the default. Raises: AdapterNotFound."""
        if digest == BASE_ADAPTER:
            return self._default
        for one in self:
            if one.bank.has(digest):
                return one
        raise AdapterNotFound(f"{digest} is not on the host")

    def num_holders(self, digest: str) -> int:
        """See AdapterBank.num_holders."""
        return sum(one.bank.num_holders(digest) for one in self)

    def unload(self, digest: str) -> dict[str, int]:
        """See AdapterBank.unload."""
        freed = [one.bank.unload(digest) for one in self]
        return {tier: sum(bank[tier] for bank in freed) for tier in TIERS}

    def residency(self) -> dict[str, dict[str, int]]:
        """Bytes held by tier and digest, all banks together."""
        found: dict[str, dict[str, int]] = {tier: {} for tier in TIERS}
        for one in self:
            for tier, held in one.bank.residency().items():
                found[tier] |= held
        return found

    def _num_resident(self, tier: str) -> int:
        return len(self.residency()[tier])

    def _num_resident_bytes(self, tier: str) -> int:
        return sum(self.residency()[tier].values())


def _tell_of(recordings: Recordings, backbone: str, metrics: Metrics) -> None:
    metrics.recording_bytes.labels(backbone).set_function(lambda: recordings.num_bytes)
    metrics.recording_failed.labels(backbone).set_function(lambda: recordings.has_failed)
