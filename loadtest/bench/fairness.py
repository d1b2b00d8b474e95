"""What others notice of one adapter that everybody asks for.

    python -m loadtest.bench fairness [--size tiny|base] [--job text|decode] [--seconds 10]

Twelve adapters of a service without HTTP in front, all in slots. Poisson arrivals, the same ones in every comparison: eleven
adapters at one rate each, and a hot one at ten times that rate; together they are `--load` of what a closed loop of the same
mixture gets through. In turn:

    alone       the eleven without the hot one
    hot         all twelve
    overload    the eleven, and the hot one at twice what the service can do for it alone

Latency counts from when a request was due. In the overload nobody waits for the hot adapter's requests once the others are
answered; they take no permits, so nothing is refused at the door. `late` is how late the generator sent them, which is in
the latencies: it shares a process with the service.
"""

import asyncio
import math
import random
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loadtest.bench.harness import Bench, Table
from loadtest.bench.jobs import JOB_KINDS, Jobs, started
from loadtest.bench.loops import Answered, closed_loop, open_loop, percentile
from loadtest.bench.models import BLIP_SIZES
from loadtest.bench.worlds import random_world
from loadtest.traffic import arrivals
from service.config import Settings

HOT = "hot"
OTHERS = tuple(f"other-{number}" for number in range(11))
TIMES = 10  # how often the hot one is asked for, for each request of another
OVERLOAD = 2.0
RANKS = {"tiny": 16, "base": 64}
SCENES = ("alone", "hot", "overload")
COLUMNS = ("", "sent/s", "answered", "p50, ms", "p95, ms", "longest, ms", "late p95, ms")


@dataclass(frozen=True)
class Group:
    """What some of the adapters met with: requests sent a second, the share that was answered, and how long answers took."""

    per_s: float
    answered: float
    p50_ms: float
    p95_ms: float
    longest_ms: float
    late_p95_ms: float

    @classmethod
    def of(cls, requests: Sequence[Answered[str]], seconds: float) -> "Group | None":
        """Of their requests; None where there was no answer."""
        answered = [one.latency_s for one in requests if math.isfinite(one.latency_s)]
        if not answered:
            return None
        return cls(
            len(requests) / seconds,
            len(answered) / len(requests),
            1000 * percentile(answered, 0.5),
            1000 * percentile(answered, 0.95),
            1000 * max(answered),
            1000 * percentile([one.lag_s for one in requests], 0.95),
        )


@dataclass(frozen=True)
class Turn:
    """One scene: what the others met with, and what the hot one did."""

    others: Group
    hot: Group | None


@dataclass(frozen=True)
class Measured:
    """Requests a second that a closed loop gets through, of the mixture and of the hot one alone, and turns by scene."""

    saturation: float
    hot_saturation: float
    turns: Mapping[str, Sequence[Turn]]

    def times_alone(self, scene: str) -> float:
        """The others' 95th percentile over that when they are alone: the median of the turns' ratios."""
        pairs = zip(self.turns[scene], self.turns["alone"], strict=True)
        return statistics.median(turn.others.p95_ms / alone.others.p95_ms for turn, alone in pairs)


def mixture(seed: int) -> Iterator[str]:
    """Adapters without end, the hot one ten times as often as each of the others."""
    chance = random.Random(seed)
    while True:
        yield chance.choices((HOT, *OTHERS), (TIMES, *[1] * len(OTHERS)))[0]


def only_hot() -> Iterator[str]:
    """The hot one for ever."""
    while True:
        yield HOT


async def run(arguments: Namespace, settings: Settings) -> Measured:
    """Saturation first, then the scenes, turn by turn."""
    async with started(settings) as runtime:
        jobs = Jobs(runtime, arguments.job)
        await jobs.warm((HOT, *OTHERS))
        loop = partial(closed_loop, in_flight=32, num_requests=arguments.requests, num_warm=64)
        saturation = (await loop(jobs.ask, mixture(0))).per_s
        hot_saturation = (await loop(jobs.ask, only_hot())).per_s
        rate = arguments.load * saturation / (TIMES + len(OTHERS))
        others = dict.fromkeys(OTHERS, rate)
        rates = {
            "alone": others,
            "hot": {**others, HOT: TIMES * rate},
            "overload": {**others, HOT: OVERLOAD * hot_saturation},
        }
        turns: dict[str, list[Turn]] = {scene: [] for scene in SCENES}
        for seed in range(arguments.repeats):
            for scene in SCENES:
                due = arrivals(rates[scene], seconds=arguments.seconds, seed=seed)
                waits_for = (lambda name: name != HOT) if scene == "overload" else (lambda name: True)
                await jobs.ask(HOT)  # behind what the scene before left under way
                requests = await open_loop(jobs.ask, due, is_awaited=waits_for)
                hot = [one for one in requests if one.choice == HOT]
                rest = [one for one in requests if one.choice != HOT]
                met = Group.of(rest, arguments.seconds)
                if met is None:
                    raise SystemExit("no other adapter was asked for: give more --seconds")
                turns[scene].append(Turn(met, Group.of(hot, arguments.seconds)))
        return Measured(saturation, hot_saturation, turns)


def tabulate(measured: Measured) -> Table:
    """Medians of the turns; the longest of all."""
    table = Table("the others, and the hot one", COLUMNS)
    for scene, turns in measured.turns.items():
        for who, groups in (("others", [turn.others for turn in turns]), ("hot", [turn.hot for turn in turns])):
            present = [group for group in groups if group is not None]
            if present:
                columns = list(zip(*(asdict(group).values() for group in present), strict=True))
                per_s, answered, p50, p95, _, late = (statistics.median(values) for values in columns)
                table.rows.append((f"{scene}: {who}", per_s, answered, p50, p95, max(columns[4]), late))
    return table


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("fairness", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=3)
    add = bench.parser.add_argument
    add("--job", choices=JOB_KINDS, default="text")
    add("--load", type=float, default=0.7, help="of saturation, all twelve together")
    add("--seconds", type=float, default=10.0, help="of arrivals in each turn of a scene")
    add("--requests", type=int, default=256, help="of the closed loops that find saturation")
    add("--max-batch-rows", type=int, default=64, help="BANK_MAX_BATCH_ROWS: whoever comes waits for a batch at least")
    arguments = bench.start(words)
    rank = RANKS[arguments.size]
    settings: dict[str, Any] = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "slots": f"{rank}:16",
        "max_batch_rows": arguments.max_batch_rows,
        "media_workers": 1,
    }
    with random_world(BLIP_SIZES[arguments.size], **settings) as world:
        world.add_adapters((HOT, *OTHERS), rank)
        measured = asyncio.run(run(arguments, world.settings))
    ratios = {scene: measured.times_alone(scene) for scene in ("hot", "overload")}
    facts = Table(
        f"{arguments.job}, {arguments.load:.0%} of saturation",
        ("", ""),
        [
            ("saturation of the mixture, requests/s", measured.saturation),
            ("saturation of the hot one alone, requests/s", measured.hot_saturation),
            *((f"{scene}: the others' p95, times that alone", ratio) for scene, ratio in ratios.items()),
        ],
    )
    values = {scene: [asdict(turn) for turn in turns] for scene, turns in measured.turns.items()}
    bench.report(
        [facts, tabulate(measured)],
        {
            "saturation_per_s": measured.saturation,
            "hot_saturation_per_s": measured.hot_saturation,
            "times_alone": ratios,
            "scenes": values,
        },
    )
