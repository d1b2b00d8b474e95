"""Libraries that mix adapters in a batch, each in an environment and a process of its own (`loadtest/peers`), beside our stages.

Both processes live at once and take turns, one way at a time, so that each has the machine for itself. A peer times itself;
what it takes to tell it is left out. Each side is compared with its own model without adapters: the models are not the same. An
adapter of a peer has as many parameters as our stage reads of a UniAdapter of that rank, as nearly as the peer's rank allows.
"""

import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from adapters.families.base import SlotView, adapt_rows
from adapters.families.uniadapter import UniAdapter
from loadtest.bench.harness import ROOT, Bench, Spread, Table, synchronize
from loadtest.bench.models import adapter_dims, make_blip, make_slots
from loadtest.bench.stages import TEXT_LENGTH, Stage, make_stage
from service.backbone.config import BlipConfig

SCRIPTS = ROOT / "loadtest" / "peers"
MAKE_ENVIRONMENTS = "make peers"
WAYS = ("frozen", "one", "mixed")
READ_TENSORS = {"text": ("down", "text"), "vision": ("down", "visual")}  # of a slot, by stage


class PeerKind(NamedTuple):
    """A library: the script that runs it, what it is called in a table, and the stages it has."""

    script: str
    title: str
    stages: Sequence[str]


PEERS = {
    "peft": PeerKind("peft_lora.py", "PEFT, LoRA by adapter_names", ("text", "vision")),
    "adapterhub": PeerKind("adapterhub_bottleneck.py", "AdapterHub, bottlenecks by BatchSplit", ("text",)),
}


class Peer:
    """A process that runs the ways it is told and says how many seconds each took. `facts` is what it says about itself."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        """Wait until it is ready. Raises: RuntimeError with its last words when it ends instead."""
        assert process.stdin is not None and process.stdout is not None
        self._process, self._errors = process, errors
        self._to, self._from = process.stdin, process.stdout
        self.facts = self._read()

    def run(self, way: str) -> float:
        """Seconds of one run. Raises: RuntimeError as above."""
        with suppress(BrokenPipeError):  # reading will tell why
            os.write(self._to.fileno(), f"{way}\n".encode())
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the peer ended with {code}:\n{self._errors.read()[-2000:]}")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def start_peer(python: Path, script: Path, words: Sequence[str]) -> Iterator[Peer]:
    """A peer that lives as long as the block: it ends when nothing more can come. It does not see our packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [python, script, *words], stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
        ) as process,
    ):
        yield Peer(process, errors)


def compare(bench: Bench, config: BlipConfig, name: str) -> tuple[list[Table], dict[str, Any]]:
    """A peer's model without adapters, with one for all rows, and with one for each row; and ours."""
    kind, arguments = PEERS[name], bench.arguments
    python = ROOT / arguments.environments / name / "bin" / "python"
    if not python.exists():
        why = f"{arguments.environments}/{name} is not there; {MAKE_ENVIRONMENTS} makes it"
        return [Table(kind.title, ("", ""), [("skipped", why)])], {"skipped": why}
    tables, values = [], {}
    model = make_blip(config, bench.device, bench.dtype)
    for stage_name in kind.stages:
        if stage_name == "vision" and not arguments.vision:
            continue
        with torch.inference_mode():
            stage = make_stage(stage_name, model, arguments.adapters, config.vision.grid * config.vision.patch)
        for rank in arguments.ranks:
            slots = make_slots(model.config, rank, arguments.adapters, model.device, model.dtype)
            parameters = read_parameters(config, rank, stage_name)
            with start_peer(python, SCRIPTS / kind.script, peer_words(bench, config, stage_name, parameters)) as peer:
                seconds = take_turns_with(peer, our_ways(stage, slots, bench.device), arguments.repeats)
            title = f"{kind.title}: {stage_name}, batch {arguments.adapters}, r={rank}, {arguments.dtype}; in turns, two processes"
            counts = {"peer": peer.facts["parameters"], "ours": parameters}
            sides = {"peer": kind.title.partition(",")[0], "ours": "ours"}
            tables.append(tabulate(title, sides, seconds, counts, arguments.adapters))
            values[f"{stage_name}, r={rank}"] = {"seconds": seconds, "parameters": counts, "peer": peer.facts}
    return tables, values


def read_parameters(config: BlipConfig, rank: int, stage: str) -> int:
    """How many numbers of a UniAdapter the stage reads."""
    shapes = UniAdapter().slot_shapes(adapter_dims(config), rank)
    return sum(math.prod(shapes[f"{name}.{part}"]) for name in READ_TENSORS[stage] for part in ("weight", "bias"))


def peer_words(bench: Bench, config: BlipConfig, stage: str, parameters: int) -> list[str]:
    """The command line of a peer: our sizes."""
    text, vision = config.text_encoder, config.vision
    assert text is not None
    sizes = text if stage == "text" else vision
    options = {
        "stage": stage,
        "batch": bench.arguments.adapters,
        "length": TEXT_LENGTH,
        "parameters": parameters,
        "width": sizes.width,
        "layers": sizes.layers,
        "heads": sizes.heads,
        "mlp-width": sizes.mlp_width,
        "vocab-size": text.vocab_size,
        "max-positions": text.max_positions,
        "patch": vision.patch,
        "resolution": vision.grid * vision.patch,
        "device": bench.device,
        "dtype": bench.arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    return [f"--{name}={value}" for name, value in options.items()]


def our_ways(stage: Stage, slots: Sequence[SlotView], device: torch.device) -> dict[str, Callable[[], float]]:
    """The same ways through our stage; each gives the seconds it took."""
    one, many = adapt_rows(slots, [0] * len(slots)), adapt_rows(slots, range(len(slots)))
    adaptations = {"frozen": None, "one": one, "mixed": many}
    return {way: partial(timed, partial(stage.forward, adaptations[way]), device) for way in WAYS}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def take_turns_with(peer: Peer, ours: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, Spread]]:
    """Seconds of each way of each side, run in turns after one round of warm-up."""
    seconds: dict[str, dict[str, list[float]]] = {side: {way: [] for way in WAYS} for side in ("peer", "ours")}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for way in WAYS:
                for side, took in (("peer", peer.run(way)), ("ours", ours[way]())):
                    if turn:
                        seconds[side][way].append(took)
    return {side: {way: Spread.of(values) for way, values in own.items()} for side, own in seconds.items()}


def tabulate(
    title: str, sides: dict[str, str], seconds: dict[str, dict[str, Spread]], parameters: dict[str, int], rows: int
) -> Table:
    """Milliseconds, and the share of a side's own frozen throughput; `sides` says what each is called."""
    table = Table(title, ("", "ms", "lowest", "highest", "rows/s", "of own frozen", "parameters"))
    said = {"frozen": "no adapters", "one": "1 adapter", "mixed": f"{rows} adapters"}
    for side, own in seconds.items():
        for way, spread in own.items():
            share, count = own["frozen"].median / spread.median, "" if way == "frozen" else f"{parameters[side]:,}"
            row = (
                f"{sides[side]}, {said[way]}",
                *(1000 * value for value in spread),
                rows / spread.median,
                share,
                count,
            )
            table.rows.append(row)
    return table
