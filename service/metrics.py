"""Every Prometheus series, and the one timer of stages.

Label sets are bounded: stages, tiers and outcomes are fixed lists, backbones are the operator's, adapters are registered
names (unknown ones are never used as labels). Which adapters are where is asked when somebody scrapes. Each `Metrics`
owns its registry, so several services can live in one process (tests).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.types import RequestContext

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROLLOUT_BUCKETS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 4 * 3600.0, 24 * 3600.0)


class Resident(NamedTuple):
    """Where an adapter is. Name and version as registered, or both empty."""

    adapter: str
    version: str
    tier: str


class Residency(Collector):
    """Which adapters are held now, and how many bytes each takes. What is gone has no series.

    `source` is set by the loader, which knows names as well as what is held.
    """

    def __init__(self) -> None:
        self.source: Callable[[], Mapping[Resident, int]] = dict

    def describe(self) -> list[GaugeMetricFamily]:
        """The series without its samples."""
        help_text = "Bytes that an adapter takes in a tier; none where it is not"
        return [GaugeMetricFamily("bank_adapter_resident_bytes", help_text, labels=Resident._fields)]

    def collect(self) -> list[GaugeMetricFamily]:
        """The series as it is now."""
        (family,) = self.describe()
        for resident, num_bytes in self.source().items():
            family.add_metric(resident, num_bytes)
        return [family]


class Metrics:
    """The series of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "bank_requests_total",
            "Requests by route, adapter, arm (main or canary) and status code",
            ["route", "adapter", "arm", "status"],
            registry=r,
        )
        self.request_seconds = Histogram(
            "bank_request_seconds",
            "Time from first byte to last",
            ["route", "arm"],
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.stage_seconds = Histogram(
            "bank_stage_seconds", "Time spent in a stage of a request", ["stage"], buckets=LATENCY_BUCKETS_S, registry=r
        )
        self.batch_seconds = Histogram(
            "bank_batch_seconds", "Device time of a batch", ["stage"], buckets=LATENCY_BUCKETS_S, registry=r
        )
        self.batch_jobs = Histogram("bank_batch_jobs", "Jobs in a batch", ["stage"], buckets=BATCH_BUCKETS, registry=r)
        self.batch_adapters = Histogram(
            "bank_batch_adapters", "Distinct adapters in a batch", ["stage"], buckets=BATCH_BUCKETS, registry=r
        )
        self.dropped_jobs = Counter("bank_dropped_jobs_total", "Jobs never run", ["reason"], registry=r)
        self.retried_batches = Counter("bank_retried_batches_total", "Batches retried item by item", registry=r)
        self.queued_jobs = Gauge("bank_queued_jobs", "Jobs waiting", registry=r)
        self.admitted_cost = Gauge("bank_admitted_cost_ratio", "Share of the admission budget in use", registry=r)
        self.refused = Counter("bank_refused_total", "Requests refused at the door", ["reason"], registry=r)
        self.auth_failures = Counter(
            "bank_auth_failures_total", "Requests refused for want of a key that may", ["reason"], registry=r
        )
        self.api_keys_stale = Gauge(
            "bank_api_keys_stale", "1 while the file of keys cannot be used and older keys are valid", registry=r
        )
        self.adapter_loads = Counter(
            "bank_adapter_loads_total", "Adapters loaded, by tier they came to", ["tier"], registry=r
        )
        self.adapter_evictions = Counter(
            "bank_adapter_evictions_total", "Adapters evicted, by tier", ["tier"], registry=r
        )
        self.adapter_hits = Counter(
            "bank_adapter_hits_total", "Leases by the tier that held the adapter", ["tier"], registry=r
        )
        self.adapter_load_seconds = Histogram(
            "bank_adapter_load_seconds",
            "Time to load an adapter, by where it came from",
            ["source"],
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.resident_adapters = Gauge("bank_resident_adapters", "Adapters held, by tier", ["tier"], registry=r)
        self.resident_bytes = Gauge("bank_resident_bytes", "Bytes of adapters held, by tier", ["tier"], registry=r)
        self.residency = Residency()
        r.register(self.residency)
        self.feature_lookups = Counter(
            "bank_feature_lookups_total",
            "Media asked about whose states may be kept: kept (hit), being made already (joined), or not (miss)",
            ["backbone", "outcome"],
            registry=r,
        )
        self.feature_cache_bytes = Gauge(
            "bank_feature_cache_bytes", "Bytes of media's states that are kept", ["backbone"], registry=r
        )
        self.recording_bytes = Gauge(
            "bank_recording_bytes", "Bytes that recorded work reads and writes", ["backbone"], registry=r
        )
        self.recording_failed = Gauge(
            "bank_recording_failed",
            "Whether something could not be recorded, so that nothing is",
            ["backbone"],
            registry=r,
        )
        self.backbone_loads = Counter("bank_backbone_loads_total", "Backbones loaded since start", registry=r)
        self.registry_up = Gauge("bank_registry_up", "Whether the last look at the registry went well", registry=r)
        self.replica_lag = Gauge(
            "bank_replica_lag_generations", "Generations the slowest living replica is behind the newest", registry=r
        )
        self.alias_moves = Counter(
            "bank_alias_moves_total",
            "Moves of aliases that this replica learnt of, whoever made them",
            ["adapter", "alias", "action"],
            registry=r,
        )
        self.rollouts = Gauge("bank_rollouts", "Rollouts under way, by phase", ["phase"], registry=r)
        self.rollout_seconds = Histogram(
            "bank_rollout_seconds",
            "Time from the start to the end of rollouts that this replica saw end",
            ["outcome"],
            buckets=ROLLOUT_BUCKETS_S,
            registry=r,
        )
        self.validation_failures = Counter(
            "bank_validation_failures_total", "Versions that were refused by validation here", registry=r
        )
        self.registry_generation = Gauge(
            "bank_registry_generation", "Generation of the registry snapshot in use", registry=r
        )
        self.gallery_items = Gauge(
            "bank_gallery_items", "Items of the live version of a gallery", ["gallery"], registry=r
        )

    @contextmanager
    def stage(self, name: str, context: RequestContext | None = None) -> Iterator[None]:
        """Time a stage of a request: into the histogram and, with a context, into its response headers."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.stage_seconds.labels(name).observe(seconds)
            if context is not None:
                context.spent(name, seconds)
