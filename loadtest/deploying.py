"""Deploy while serving: push, promote and roll back under load, and see whether anybody notices.

    python -m loadtest.deploying --redis redis://127.0.0.1:6379/15

Two replicas share the registry on that Redis (an unused namespace of it) and one folder of packages. Random adapters of
the demo's backbone, or of `--backbone`, are asked about drawn pictures: Poisson arrivals at half of the rate at which the
replicas are saturated, zipf popularity, one question in one connection each. Meanwhile packages that nobody saw before are
pushed, promoted, served for a moment and rolled back, in five windows (fewer for fewer cycles) that alternate with quiet
ones of the same length.

Checked: no request fails; every score is that of the digest that answered, as computed alone beforehand (within 1e-4);
every version that answered was live at some moment of its request, by the audit log and PROPAGATION_S more; the memory
of each replica at the end is within 5 % of what it was in the middle. Times count from when a request was due. For people
a table; the last line is JSON. Exits with 1 when a check fails.
"""

import argparse
import asyncio
import io
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
import torch
from PIL import Image

import service.demo
from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing
from adapters.families import family_of
from loadtest.serving import WAIT_S, Replica, serving
from loadtest.traffic import picks
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.folder import load_blip
from service.client import Client
from service.config import Settings
from service.home import push_package
from service.http.operator_schemas import AuditLine
from service.lifecycle.writing import write_probed_package

NUM_ADAPTERS = 12
NUM_PAIRS = 5
NUM_PICTURES = 4
PROPAGATION_S = 2.0  # how much longer a replica may serve what the registry left
TOLERANCE = 1e-4
MEMORY_TOLERANCE = 0.05
QUESTION = "what colour is the big circle?"
CANDIDATES = ("red", "green", "blue", "a big circle")


@dataclass(frozen=True)
class Asked:
    """One request: when it was due and answered (seconds since 1970), and what came."""

    adapter: str
    picture: int
    due_at: float
    sent_at: float
    ended_at: float
    version: int = 0
    digest: str = ""
    score: float = 0.0
    error: str | None = None


def make_package(folder: Path, backbone: BlipBackbone, seed: int) -> str:
    """Write a random adapter with its probe; its weights digest."""
    vision = backbone.config.vision
    config = AdapterConfig(
        family="uniadapter",
        task="vqa",
        rank=4,
        backbone=BackboneRef(architecture="blip", width=vision.width, layers=vision.layers, parts=dict(backbone.parts)),
        preprocessing=Preprocessing(resolution=vision.patch * vision.grid),
        max_text_tokens=16,
        decoding=AnswerDecoding(num_beams=2, max_length=5, answers=CANDIDATES, rank_k=len(CANDIDATES)),
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = family_of(config.family).tensor_shapes(config, backbone.dims())
    tensors = {
        name: torch.empty(shape).normal_(float(_is_gain(name)), 0.3, generator=generator)
        for name, shape in shapes.items()
    }
    return write_probed_package(folder, config, tensors, f"# Random adapter {seed}\n", backbone).weights_digest


def _is_gain(name: str) -> bool:
    return name.endswith(".scale") or ("layer_norm" in name and name.endswith(".weight"))


def pictures() -> list[bytes]:
    """Small drawn pictures, each another one."""
    drawn = []
    for number in range(NUM_PICTURES):
        image = Image.new("RGB", (64, 64), (40 + 50 * number, 90, 200 - 40 * number))
        image.paste((220, 30 + 60 * number, 60), (8 * number, 8, 8 * number + 24, 40))
        file = io.BytesIO()
        image.save(file, "PNG")
        drawn.append(file.getvalue())
    return drawn


class Load:
    """Requests to the replicas in turn."""

    def __init__(self, replicas: Sequence[Replica], drawn: Sequence[bytes], adapters: Sequence[str], seed: int) -> None:
        self._replicas = replicas
        self._drawn = drawn
        self._adapters = picks("zipf", adapters, seed=seed)
        self._chance = random.Random(seed)
        self._number = 0

    async def ask(self, client: httpx.AsyncClient, due_at: float) -> Asked:
        """One request, due at a moment."""
        self._number += 1
        replica = self._replicas[self._number % len(self._replicas)]
        adapter, picture = next(self._adapters), self._chance.randrange(len(self._drawn))
        fields = {"adapter": adapter, "question": QUESTION, "decode": {"mode": "rank", "candidates": CANDIDATES}}
        sent_at = time.time()
        try:
            reply = await client.post(
                f"{replica.url}/v1/vqa",
                data={"request": json.dumps(fields)},
                files={"image": ("image", self._drawn[picture])},
            )
            body: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            return Asked(adapter, picture, due_at, sent_at, time.time(), error=repr(error))
        if reply.status_code != 200:
            return Asked(adapter, picture, due_at, sent_at, time.time(), error=f"{reply.status_code} {reply.text}")
        made_by = body["adapter"]
        return Asked(
            adapter, picture, due_at, sent_at, time.time(), made_by["version"], made_by["digest"], body["score"]
        )

    async def saturate(self, seconds: float, num_users: int = 16) -> float:
        """Answers a second when users ask again as soon as they are answered."""
        answers = 0

        async def user(client: httpx.AsyncClient, end: float) -> None:
            nonlocal answers
            while (now := time.time()) < end:
                asked = await self.ask(client, now)
                answers += asked.error is None

        async with _client() as client:
            for span in (seconds / 2, seconds):  # the first to warm up
                answers = 0
                await asyncio.gather(*(user(client, time.time() + span) for _ in range(num_users)))
        return answers / seconds

    async def arrive(self, rate: float, is_over: threading.Event, found: list[Asked]) -> None:
        """Poisson arrivals at a rate a second, whatever becomes of them, until it is over."""
        running: set[asyncio.Task[None]] = set()

        async def one(client: httpx.AsyncClient, due_at: float) -> None:
            found.append(await self.ask(client, due_at))

        async with _client() as client:
            due_at = time.time()
            while not is_over.is_set():
                due_at += self._chance.expovariate(rate)
                await asyncio.sleep(max(0.0, due_at - time.time()))
                task = asyncio.create_task(one(client, due_at))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=60, limits=limits)


def deploy(replicas: Sequence[Replica], cycle: int, name: str, package: Path, dwell_s: float) -> None:
    """Push, promote, serve it for a while, roll back. Raises: SystemExit when one of them fails."""
    with Client(replicas[cycle % len(replicas)].url, timeout_s=WAIT_S) as client:
        pushed = client.wait(client.push(package, name).id, timeout_s=WAIT_S)
        version = pushed.to_version
        if pushed.status != "succeeded" or version is None:
            raise SystemExit(f"{pushed.subject}: {pushed.error}")
        promoted = client.wait(client.promote(name, version).id, timeout_s=WAIT_S)
        if promoted.status != "succeeded":
            raise SystemExit(f"{promoted.subject}: {promoted.error}")
        time.sleep(dwell_s)
        client.roll_back(name, expect=version)


def lives(lines: Iterable[AuditLine]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """When each version of each adapter was live, by the audit log, oldest line first."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    last: dict[str, tuple[int, float]] = {}
    for line in lines:
        if line.action not in ("set_alias", "roll_back"):
            continue
        name = line.subject.partition("@")[0]
        if name in last:
            version, since = last[name]
            found.setdefault((name, version), []).append((since, line.at))
        last[name] = (int(line.after or 0), line.at)
    for name, (version, since) in last.items():
        found.setdefault((name, version), []).append((since, float("inf")))
    return found


def p99_ms(asked: Sequence[Asked]) -> float:
    """Of the time from when a request was due to its answer; NaN for too few."""
    if len(asked) < 2:
        return math.nan
    return 1000 * statistics.quantiles([a.ended_at - a.due_at for a in asked], n=100)[98]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", required=True, help="address of a Redis server")
    parser.add_argument("--backbone", type=Path, default=Path(service.demo.__file__).parent / "assets" / "backbone")
    parser.add_argument("--cycles", type=int, default=100, help="how many packages are pushed, promoted, rolled back")
    parser.add_argument("--dwell-s", type=float, default=1.0, help="how long a promoted version is served")
    parser.add_argument("--saturation-s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deploying-") as folder, ExitStack() as stack:
        result = measure(arguments, Path(folder), stack)
    print(json.dumps(result))
    sys.exit(0 if result["is_right"] else 1)


def measure(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, object]:
    """Everything; the numbers of the last line."""
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    backbone = load_blip(arguments.backbone)
    packages = [folder / "packages" / str(number) for number in range(NUM_ADAPTERS + arguments.cycles)]
    digests = [make_package(package, backbone, arguments.seed + n) for n, package in enumerate(packages)]
    assert len(set(digests)) == len(digests), "two packages are the same"
    drawn = pictures()
    settings = Settings(backbone=arguments.backbone, threads=1, media_workers=1, feature_cache_mib=0)

    alone = settings.model_copy(update={"home": folder / "alone"})
    expected = scores_alone(alone, packages, digests, drawn)

    namespace = f"deploying-{uuid.uuid4().hex[:8]}"
    stack.callback(forget, arguments.redis, namespace)
    settings = Settings(
        backbone=arguments.backbone,
        threads=1,
        media_workers=1,
        feature_cache_mib=0,  # there are few pictures, and each question about one shall be work
        registry_url=f"{arguments.redis}?namespace={namespace}",
        artifacts_url=str(folder / "artifacts"),
    )
    operator = settings.model_copy(update={"home": folder / "operator"})
    for name, package in zip(names, packages, strict=False):
        push_package(operator, package, name)
    replicas = [stack.enter_context(serving(folder / name, settings)) for name in ("a", "b")]
    load = Load(replicas, drawn, names, arguments.seed)
    saturation = asyncio.run(load.saturate(arguments.saturation_s))
    rate = saturation / 2
    print(f"saturated at {saturation:.1f} requests/s; the load is {rate:.1f}/s")

    asked: list[Asked] = []
    is_over = threading.Event()
    arrivals = threading.Thread(target=lambda: asyncio.run(load.arrive(rate, is_over, asked)))
    watching = threading.Thread(target=watch, args=(replicas, is_over))
    arrivals.start()
    watching.start()
    windows: list[tuple[float, float, float]] = []  # start of deploying, its end, end of the quiet time after it
    try:
        for pair in range(min(NUM_PAIRS, arguments.cycles)):
            began = time.time()
            for cycle in range(pair, arguments.cycles, NUM_PAIRS):
                deploy(replicas, cycle, names[cycle % NUM_ADAPTERS], packages[NUM_ADAPTERS + cycle], arguments.dwell_s)
            ended = time.time()
            time.sleep(ended - began)
            windows.append((began, ended, time.time()))
    finally:
        is_over.set()
        arrivals.join()
        watching.join()
    return judge(asked, windows, replicas, expected, rate, arguments)


def forget(address: str, namespace: str) -> None:
    """Take the registry away from its server."""
    client = redis.Redis.from_url(address)
    for key in client.scan_iter(f"{{{namespace}}}:*"):
        client.delete(key)
    client.close()


def watch(replicas: Sequence[Replica], is_over: threading.Event) -> None:
    """Note memory once a second."""
    while True:
        for replica in replicas:
            replica.look()
        if is_over.wait(1.0):
            return


def scores_alone(
    settings: Settings, packages: Sequence[Path], digests: Sequence[str], drawn: Sequence[bytes]
) -> dict[tuple[str, int], float]:
    """By digest and picture: the score when it is asked alone, of a server with a registry of its own."""
    for number, package in enumerate(packages):
        push_package(settings, package, f"alone-{number}")
    expected = {}
    with serving(settings.home, settings) as replica, httpx.Client(timeout=WAIT_S) as client:
        for digest in digests:
            fields = {"adapter": digest, "question": QUESTION, "decode": {"mode": "rank", "candidates": CANDIDATES}}
            for number, picture in enumerate(drawn):
                reply = client.post(
                    f"{replica.url}/v1/vqa", data={"request": json.dumps(fields)}, files={"image": ("image", picture)}
                )
                reply.raise_for_status()
                expected[digest, number] = float(reply.json()["score"])
    return expected


def judge(
    asked: Sequence[Asked],
    windows: Sequence[tuple[float, float, float]],
    replicas: Sequence[Replica],
    expected: dict[tuple[str, int], float],
    rate: float,
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Print the table; the numbers of the last line."""
    failed = [a for a in asked if a.error is not None]
    answered = [a for a in asked if a.error is None]
    wrong = [a for a in answered if not abs(a.score - expected[a.digest, a.picture]) <= TOLERANCE]
    with Client(replicas[0].url, timeout_s=WAIT_S) as client:
        live = lives(reversed(client.audit(limit=10_000)))
    overtime = {
        a: min(
            (max(0.0, since - a.ended_at, a.sent_at - until) for since, until in live.get((a.adapter, a.version), [])),
            default=float("inf"),
        )
        for a in answered
    }
    dead = [a for a, seconds in overtime.items() if seconds > PROPAGATION_S]
    print("pair   p99 deploying   p99 quiet   ratio   requests")
    ratios = []
    for number, (began, ended, quiet_until) in enumerate(windows):
        busy = [a for a in answered if began <= a.due_at < ended]
        quiet = [a for a in answered if ended <= a.due_at < quiet_until]
        ratios.append(p99_ms(busy) / p99_ms(quiet))
        counts = f"{len(busy)} + {len(quiet)}"
        print(f"{number + 1:4}   {p99_ms(busy):10.0f} ms   {p99_ms(quiet):6.0f} ms   {ratios[-1]:5.2f}   {counts}")
    growth = [
        statistics.median(r.memory[-5:]) / statistics.median(r.memory[max(0, len(r.memory) // 2 - 2) :][:5]) - 1
        for r in replicas
    ]
    for title, some in (("failed", failed), ("wrong score", wrong), ("not live", dead)):
        for a in some[:3]:
            print(f"{title}: {a}")
    is_right = not (failed or wrong or dead) and max(growth) <= MEMORY_TOLERANCE
    return {
        "requests": len(asked),
        "rate_per_s": round(rate, 2),
        "cycles": arguments.cycles,
        "failed": len(failed),
        "wrong": len(wrong),
        "not_live": len(dead),
        "digests": len({a.digest for a in answered}),
        "propagation_s": round(max(overtime.values(), default=0.0), 3),
        "memory_growth": [round(g, 4) for g in growth],
        "p99_ratio": round(statistics.median(ratios), 3),
        "is_right": is_right,
    }


if __name__ == "__main__":
    main()
