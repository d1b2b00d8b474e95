"""How throughput and latency follow from how many adapters there are, and how popular each is.

    python -m loadtest.bench popularity [--size tiny|base] [--counts 1,4,16,32,33,64,256,1024] [--svg FILE]

A service without HTTP in front, with 32 slots: `--in-flight` requests at a time, each for an adapter drawn as
`loadtest.traffic` says, each one job of the engine (see `loadtest.bench.jobs`). A request whose adapter is not on the host
loads it before its job is queued, while others run. The rows `on the critical path` load it when the batch is put together
instead, on the device thread, one after the other, as a server does that knows no better; all else is the same.

`filled` is how many slots were filled a request, and `from disk` how many adapters were read; `jobs` and `adapters` are the
means of a batch. The host tier holds as many adapters as `--host-cache-mib` allows. `--weights` packages have weights of
their own, the others share them (see `loadtest.bench.worlds`); files are in the kernel's cache as far as memory allows.
"""

import asyncio
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from adapters.errors import AdapterNotFound
from adapters.registry import VersionRecord
from loadtest.bench.chart import Line, Panel, draw
from loadtest.bench.harness import Bench, Table
from loadtest.bench.jobs import JOB_KINDS, JobKind, Jobs, started
from loadtest.bench.loops import Throughput, closed_loop, percentile
from loadtest.bench.models import BLIP_SIZES
from loadtest.bench.worlds import random_world
from loadtest.traffic import POPULARITIES, Popularity, picks
from service.auth import LOCAL
from service.bank import SlotLease
from service.config import MIB, Settings
from service.loader import Pin
from service.runtime import Runtime
from service.types import AdapterInfo

COUNTS = "1,4,16,32,33,64,256,1024"
RANKS = {"tiny": 16, "base": 64}
HOST_CACHE_MIB = {"tiny": 20, "base": 1280}  # some 140 adapters of these ranks
CRITICAL = "on the critical path"
COLUMNS = ("", "requests/s", "lowest", "highest", "p50, ms", "p95, ms", "filled", "from disk", "jobs", "adapters")


class Case(NamedTuple):
    """What is measured: a job, how many adapters there are and how popular each is, and when cold ones are loaded."""

    job: JobKind
    popularity: Popularity
    num_adapters: int
    is_critical: bool = False


@dataclass(frozen=True)
class Turn:
    """One measurement of a case. Slots filled and adapters read are a request's share; jobs and adapters a batch's."""

    per_s: float
    p50_ms: float
    p95_ms: float
    filled: float
    from_disk: float
    jobs: float
    adapters: float


class Counts(NamedTuple):
    """What the service has counted so far."""

    filled: float
    from_disk: float
    batches: float
    jobs: float
    adapters: float

    @classmethod
    def of(cls, runtime: Runtime) -> "Counts":
        """Now."""

        def value(name: str, **labels: str) -> float:
            return runtime.metrics.registry.get_sample_value(name, labels) or 0.0

        def total(name: str) -> float:
            return sum(value(name, stage=stage) for stage in ("text", "generate"))

        return cls(
            value("bank_adapter_loads_total", tier="device"),
            value("bank_adapter_loads_total", tier="host"),
            total("bank_batch_jobs_count"),
            total("bank_batch_jobs_sum"),
            total("bank_batch_adapters_sum"),
        )

    def since(self, before: "Counts", num_requests: int) -> dict[str, float]:
        """The means of what happened meanwhile."""
        filled, from_disk, batches, jobs, adapters = (now - then for now, then in zip(self, before, strict=True))
        return {
            "filled": filled / num_requests,
            "from_disk": from_disk / num_requests,
            "jobs": jobs / max(1.0, batches),
            "adapters": adapters / max(1.0, batches),
        }


class LateLoads:
    """Requests of a service that loads nothing ahead: an adapter comes to the host when a batch asks for its slot."""

    def __init__(self, runtime: Runtime, jobs: Jobs) -> None:
        self._runtime = runtime
        self._jobs = jobs
        snapshot = runtime.loader.snapshot
        self._records: dict[str, VersionRecord] = {r.weights_digest: r for r in snapshot.versions}
        self._by_name = {record.name: record for record in self._records.values()}

    async def ask(self, name: str) -> None:
        """One job for an adapter wherever that is; nothing keeps it on the host."""
        record = self._by_name[name]
        await self._jobs.run(Pin(AdapterInfo(name, record.version, record.weights_digest), record.weights_digest, None))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the device thread load what it lacks, for as long as the block lasts."""
        bank, loader = self._runtime.bank, self._runtime.loader
        lease = bank.try_lease

        def load_and_lease(digest: str) -> SlotLease | None:
            try:
                return lease(digest)
            except AdapterNotFound:
                loader.check(self._records[digest])
                return lease(digest)

        with patch.object(bank, "try_lease", load_and_lease):
            yield


async def measure(runtime: Runtime, case: Case, names: Sequence[str], arguments: Namespace, seed: int) -> Turn:
    """One turn of a case."""
    jobs = Jobs(runtime, case.job)
    late = LateLoads(runtime, jobs)
    # Other draws for the critical path: what the turn before it brought in must be no help.
    choices = picks(case.popularity, names[: case.num_adapters], seed=2 * seed + case.is_critical)
    await settle(runtime, choices)
    ask = late.ask if case.is_critical else jobs.ask
    loop = partial(closed_loop, ask, choices, in_flight=arguments.in_flight, num_warm=arguments.in_flight)
    with late.installed() if case.is_critical else nullcontext():
        await loop(num_requests=arguments.in_flight)
        before = Counts.of(runtime)
        done: Throughput = await loop(num_requests=arguments.requests)
    return Turn(
        done.per_s,
        1000 * percentile(done.latencies_s, 0.5),
        1000 * percentile(done.latencies_s, 0.95),
        **Counts.of(runtime).since(before, arguments.requests + 2 * arguments.in_flight),
    )


async def settle(runtime: Runtime, choices: Iterator[str]) -> None:
    """Bring adapters to the host as they are drawn, until it holds what it holds in the long run."""
    async with runtime.loader.pin(next(choices), LOCAL) as pin:
        room = runtime.settings.host_cache_mib * MIB // runtime.bank.adapter(pin.digest).num_bytes
    for name in islice(choices, 2 * room):
        async with runtime.loader.pin(name, LOCAL):
            pass


def cases(arguments: Namespace) -> list[Case]:
    """Everything that is measured in a turn; cold loads on the critical path beside the largest number, drawn uniformly."""
    counts = sorted(map(int, arguments.counts.split(",")))
    popularities = [name for name in POPULARITIES if name in arguments.popularities.split(",")]
    found = []
    for job in (name for name in JOB_KINDS if name in arguments.jobs.split(",")):
        found += [Case(job, popularity, count) for popularity in popularities for count in counts]
        found.append(Case(job, "uniform", counts[-1], is_critical=True))
    return found


def median_of(turns: Sequence[Turn]) -> Turn:
    """The median of each number."""
    return Turn(*(statistics.median(values) for values in zip(*(asdict(turn).values() for turn in turns), strict=True)))


def kept_with_one_too_many(measured: dict[Case, list[Turn]], num_slots: int) -> dict[str, float]:
    """By job: throughput with one adapter more than there are slots over that with as many; medians of the turns' ratios."""
    kept: dict[str, float] = {}
    for job in JOB_KINDS:
        enough, more = (measured.get(Case(job, "uniform", num_slots + extra), []) for extra in (0, 1))
        if enough and more:
            kept[job] = statistics.median(b.per_s / a.per_s for a, b in zip(enough, more, strict=True))
    return kept


def tables(measured: dict[Case, list[Turn]]) -> list[Table]:
    """One for each job."""
    found = []
    for job in dict.fromkeys(case.job for case in measured):
        table = Table(job, COLUMNS)
        for case, turns in measured.items():
            if case.job == job:
                turn, speeds = median_of(turns), [each.per_s for each in turns]
                name = f"{case.popularity}, {case.num_adapters}" + (f", {CRITICAL}" if case.is_critical else "")
                shares = (turn.filled, turn.from_disk, turn.jobs, turn.adapters)
                table.rows.append((name, turn.per_s, min(speeds), max(speeds), turn.p50_ms, turn.p95_ms, *shares))
        found.append(table)
    return found


def picture(measured: dict[Case, list[Turn]], title: str, num_slots: int) -> str:
    """Throughput above, latency below; a column for each job."""
    jobs = list(dict.fromkeys(case.job for case in measured))
    panels = []
    for field, what, label in (("per_s", "throughput", "requests/s"), ("p95_ms", "latency", "95th percentile, ms")):
        for job in jobs:
            lines: dict[str, list[tuple[float, float]]] = {}
            for case, turns in measured.items():
                if case.job == job and not case.is_critical:
                    point = (float(case.num_adapters), float(getattr(median_of(turns), field)))
                    lines.setdefault(case.popularity, []).append(point)
            panels.append(
                Panel(
                    f"{job}: {what}",
                    "registered adapters",
                    label,
                    [Line(name, points) for name, points in lines.items()],
                    mark=(num_slots, f"{num_slots} slots"),
                )
            )
    return draw(title, panels, columns=len(jobs))


async def run(arguments: Namespace, settings: Settings, names: Sequence[str]) -> dict[Case, list[Turn]]:
    """Every case, turn by turn."""
    measured: dict[Case, list[Turn]] = {case: [] for case in cases(arguments)}
    async with started(settings) as runtime:
        for seed in range(arguments.repeats):
            for case, turns in measured.items():
                turns.append(await measure(runtime, case, names, arguments, seed))
    return measured


def main(words: Sequence[str]) -> None:
    """Run the sweep and print it."""
    bench = Bench("popularity", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=3)
    add = bench.parser.add_argument
    add("--counts", default=COUNTS, help="how many adapters there are")
    add("--popularities", default=",".join(POPULARITIES))
    add("--jobs", default=",".join(JOB_KINDS))
    add("--rank", type=int, default=0, help="of the adapters; 0: 64 at base size, 16 at tiny")
    add("--slots", type=int, default=32)
    add("--in-flight", type=int, default=32, help="requests at a time")
    add(
        "--requests", type=int, default=256, help="measured in each turn of a row, after twice as many as are in flight"
    )
    add("--weights", type=int, default=64, help="packages that have weights of their own; the others share them")
    add("--host-cache-mib", type=int, default=0, help="BANK_HOST_CACHE_MIB; 0: room for some 140 adapters")
    add("--svg", help="file to draw a picture into")
    arguments = bench.start(words)
    rank = arguments.rank or RANKS[arguments.size]
    settings: dict[str, Any] = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "slots": f"{rank}:{arguments.slots}",
        "host_cache_mib": arguments.host_cache_mib or HOST_CACHE_MIB[arguments.size],
        "media_workers": 1,
    }
    names = [f"adapter-{number}" for number in range(max(map(int, arguments.counts.split(","))))]
    with random_world(BLIP_SIZES[arguments.size], **settings) as world:
        start = time.perf_counter()
        world.add_adapters(names, rank, num_weights=arguments.weights)
        written_s, disk_bytes = time.perf_counter() - start, world.disk_bytes()
        measured = asyncio.run(run(arguments, world.settings, names))
    kept = kept_with_one_too_many(measured, arguments.slots)
    facts = Table(
        "the service",
        ("", ""),
        [
            (f"packages of rank {rank} on the disk, MB", disk_bytes / 1e6),
            ("packages with weights of their own", min(arguments.weights, len(names))),
            ("written in, s", written_s),
            ("host tier, MB", world.settings.host_cache_mib * MIB / 1e6),
            *((f"{job}: throughput with one adapter too many for the slots, of full", kept[job]) for job in kept),
        ],
    )
    bench.report(
        [facts, *tables(measured)],
        {
            "disk_bytes": disk_bytes,
            "host_cache_bytes": world.settings.host_cache_mib * MIB,
            "kept_with_one_too_many": kept,
            "rows": [{**case._asdict(), "turns": [asdict(turn) for turn in turns]} for case, turns in measured.items()],
        },
    )
    if arguments.svg:
        title = f"{arguments.in_flight} requests in flight over {arguments.slots} slots of rank {rank}, {arguments.size} size"
        Path(arguments.svg).write_text(picture(measured, title, arguments.slots))
