"""What it costs to bring an adapter in: from the host into a slot, from the disk to the host, and all the way.

    python -m loadtest.bench swap [--size tiny|base] [--ranks 64,128,512] [--device cpu|cuda]

By the code that serves: `AdapterBank.lease` fills a slot, `Loader.check` reads a package, checks it, folds it and puts it on
the host. Two adapters of each rank take turns in a bank that has room for one, so every load is a whole one. Beside each
stands what the machine takes for the same bytes at best, measured in the same run: copying a large tensor from the host
(pinned, for a CUDA device) to the device, and reading the package's weights as one file. Where the kernel still has a file
in memory, reading is a copy; for the rows `not cached` it is told to forget the file first, which is timed too. Rows that
begin with `of it` are steps of a load from the disk.

A CPU is device and host at once: a slot is a copy within one memory.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adapters.artifacts.local import LocalArtifactStore
from adapters.package import WEIGHTS_FILE, KnownDigests, files_digest, parse_package, read_files
from adapters.registry import VersionRecord
from loadtest.bench.harness import Bench, Spread, Table, take_turns
from loadtest.bench.models import BLIP_SIZES
from loadtest.bench.worlds import World, random_world
from service.backbone.base import Backbone
from service.backbones import Backbones
from service.bank import AdapterBank
from service.engine.engine import default_threads
from service.folders import HomeFolders, open_registry
from service.loader import Loader
from service.metrics import Metrics

COPY_BYTES = 1 << 28
ROOMY_BYTES = 1 << 30  # of a host tier that evicts nothing here
COLUMNS = ("", "MB", "ms", "lowest", "highest", "MB/s", "at best, ms", "times the best")


@dataclass(frozen=True)
class Row:
    """One way of moving bytes: megabytes, milliseconds, and milliseconds at best where there is such a measure."""

    rank: int
    name: str
    megabytes: float
    ms: float
    low_ms: float
    high_ms: float
    best_ms: float | None

    def cells(self) -> tuple[object, ...]:
        """As the table shows it."""
        times = (self.ms, self.low_ms, self.high_ms)
        if self.best_ms is None:
            return (self.name, self.megabytes, *times, "", "", "")
        speed = 1000 * self.megabytes / self.ms
        return (self.name, self.megabytes, *times, speed, self.best_ms, self.ms / self.best_ms)


class Site:
    """Two adapters of a rank in a home, and banks with one slot for them: one keeps both on the host, one neither."""

    def __init__(self, world: World, backbone: Backbone, rank: int) -> None:
        names = [f"r{rank}-{letter}" for letter in "ab"]
        world.add_adapters(names, rank, seed=2 * rank)
        self.backbone = backbone
        self.registry = open_registry(world.settings)
        self.records = [self.registry.snapshot().adapters[name][0] for name in names]
        self.store = LocalArtifactStore(HomeFolders(world.settings.home).artifacts)
        self.roomy, loader = self._bank(rank, ROOMY_BYTES)
        self.tight, self.loader = self._bank(rank, 1)
        for record in self.records:
            loader.check(record)
        self._turns = itertools.cycle(self.records)

    def _bank(self, rank: int, host_bytes: int) -> tuple[AdapterBank, Loader]:
        metrics = Metrics()
        bank = AdapterBank(
            self.backbone.dims(),
            self.backbone.head_tensors(),
            device=self.backbone.device,
            dtype=self.backbone.dtype,
            buckets=((rank, 1),),
            host_bytes=host_bytes,
            metrics=metrics,
        )
        return bank, Loader(self.registry, self.store, Backbones.of_one(self.backbone, bank, metrics), metrics)

    def close(self) -> None:
        """Let go of the registry."""
        self.registry.close()

    def fill_slot(self) -> None:
        """Host to slot."""
        self.roomy.lease(next(self._turns).weights_digest).release()

    def load(self, *, is_cached: bool, to_slot: bool = False) -> None:
        """Disk to host, and on into the slot."""
        record = self._stored(is_cached)
        self.loader.check(record)
        if to_slot:
            self.tight.lease(record.weights_digest).release()

    def read_weights(self, *, is_cached: bool) -> None:
        """What a load from the disk cannot do without."""
        self._weights(self._stored(is_cached)).read_bytes()

    def _stored(self, is_cached: bool) -> VersionRecord:
        record = next(self._turns)
        if not is_cached:
            forget(self._weights(record))
        return record

    def _weights(self, record: VersionRecord) -> Path:
        return self.store.path(record.package_digest) / WEIGHTS_FILE

    def steps(self) -> dict[str, Callable[[], object]]:
        """What a load from the disk is made of. The digest is computed beside the last two."""
        folder, dims = self.store.path(self.records[0].package_digest), self.backbone.dims()
        files = read_files(folder)
        package = parse_package(files, dims=dims)
        known = KnownDigests(package.package_digest, package.weights_digest)
        return {
            "of it: read": lambda: read_files(folder),
            "of it: digest": lambda: files_digest(files),
            "of it: parse": lambda: parse_package(files, dims=dims, known=known),
            "of it: fold, cast, check": lambda: self.roomy.fold(package),
        }

    def package_bytes(self) -> int:
        """Bytes of a package's weights on the disk."""
        return self._weights(self.records[0]).stat().st_size

    def slot_bytes(self) -> int:
        """Bytes of a filled slot."""
        self.fill_slot()
        return self.roomy.residency()["device"][self.records[0].weights_digest]


def forget(path: Path) -> None:
    """Let the kernel drop what it holds of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def large_copy(device: torch.device) -> Callable[[], object]:
    """Copy COPY_BYTES from the host to the device, as fast as that goes."""
    source = torch.zeros(COPY_BYTES // 4, pin_memory=device.type == "cuda")
    target = torch.zeros(COPY_BYTES // 4, device=device)
    return lambda: target.copy_(source, non_blocking=True)


def measure(site: Site, rank: int, repeats: int) -> tuple[list[Row], float]:
    """A rank's rows, and bytes per second of the large copy."""
    device = site.backbone.device
    runs: dict[str, Callable[[], object]] = {"large copy": large_copy(device), "host to slot": site.fill_slot}
    for suffix, is_cached in (("", True), (", not cached", False)):
        runs[f"file{suffix}"] = partial(site.read_weights, is_cached=is_cached)
        runs[f"disk to host{suffix}"] = partial(site.load, is_cached=is_cached)
        runs[f"disk to slot{suffix}"] = partial(site.load, is_cached=is_cached, to_slot=True)
    steps = site.steps()
    seconds = take_turns(runs | steps, repeats, device)
    rate = COPY_BYTES / seconds["large copy"].low
    package, slot = site.package_bytes(), site.slot_bytes()
    copy_s = slot / rate
    rows = []
    for name, spread in seconds.items():
        if name == "large copy":
            continue
        best_s: float | None = None
        if name.startswith("disk"):
            suffix = name.removeprefix("disk to host").removeprefix("disk to slot")
            best_s = seconds[f"file{suffix}"].median + ("slot" in name) * copy_s
        elif name == "host to slot":
            best_s = copy_s
        rows.append(_row(rank, name, slot if name == "host to slot" else package, spread, best_s))
    return rows, rate


def _row(rank: int, name: str, num_bytes: int, spread: Spread, best_s: float | None) -> Row:
    median, low, high = (1000 * value for value in spread)
    return Row(rank, name, num_bytes / 1e6, median, low, high, None if best_s is None else 1000 * best_s)


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("swap", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=5)
    bench.parser.add_argument("--ranks", default="64,128,512")
    arguments = bench.start(words)
    if not arguments.threads:
        torch.set_num_threads(default_threads())  # as the device thread has, and those that load by it
    tables, values = [], []
    settings = {"device": arguments.device, "dtype": arguments.dtype}
    with random_world(BLIP_SIZES[arguments.size], **settings) as world:
        backbone = world.load_backbone()
        rates = []
        for rank in map(int, arguments.ranks.split(",")):
            site = Site(world, backbone, rank)
            rows, rate = measure(site, rank, arguments.repeats)
            site.close()
            rates.append(rate)
            values += rows
            tables.append(Table(f"rank {rank}, {arguments.dtype}", COLUMNS, [row.cells() for row in rows]))
    place = "the same memory" if arguments.device == "cpu" else "copied over the bus"
    facts = Table(
        "the machine",
        ("", ""),
        [
            ("large copy, host to device, MB/s", max(rates) / 1e6),
            ("device and host", place),
        ],
    )
    bench.report(
        [facts, *tables],
        {"copy_bytes_per_s": max(rates), "rows": [vars(row) for row in values]},
    )
