"""What HTTP costs: a server process under load, beside the same requests without HTTP, and the same jobs without the rest.

    python -m loadtest.bench http [--size demo|tiny|base] [--in-flight 16]

Four kinds of requests, each a closed loop over `--pictures` pictures, no two alike:

    vqa, form           a question about a JPEG of 640 x 480 in a multipart form: decode, vision, generate
    vqa, JSON           the same in base64
    vqa, gallery item   a question about an item whose states the server has kept: generate
    retrieve            a search of the gallery by a sentence: text, index

Three ways in turn: `HTTP`, a server process asked over connections that are kept; `pipeline`, a service in this process, by
the functions that its routes call; `engine`, the jobs of the same requests alone, with pixels decoded, words tokenised and
adapters looked up ahead. The generator is this process, and no part of the server's. What processors were busy with in a
request, in ms: the `service` process, its media `workers`, and the `generator` where that is a process of its own.

Then one request at a time: where its time goes, by the reply's `Server-Timing` header, and what the client sees besides.
`demo` serves the trained demo that ships here, the other sizes a random backbone with random adapters.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from loadtest.bench.harness import Bench, Table
from loadtest.bench.jobs import started
from loadtest.bench.loops import closed_loop, percentile
from loadtest.bench.models import BLIP_SIZES
from loadtest.bench.wire import Connections, Reply, form
from loadtest.bench.worlds import random_world
from loadtest.serving import CpuTime, cpu_time, serving
from service.auth import LOCAL
from service.config import Settings
from service.demo.recipes import ASSETS
from service.gallery.sources import Source
from service.home import push_package
from service.pipelines.answering import answering
from service.pipelines.blip import preprocessing_of, text_limit
from service.pipelines.galleries import BuildOptions
from service.pipelines.stages import Medium, tokenize_within
from service.runtime import Runtime
from service.types import (
    GalleryMedia,
    GenerateDecode,
    GenerateInput,
    MediaBytes,
    RequestContext,
    RetrieveQuery,
    TextQuery,
    VqaQuery,
)

ASK, FIND, GALLERY = "ask", "find", "pictures"
DEMO_PACKAGES = {ASK: "demo-image-vqa", FIND: "demo-image-retrieval"}
QUESTION = "what colour is the big circle?"
SENTENCE = "a red circle is at the top left and a blue star is in the centre"
NUM_HITS = 5
RANKS = {"tiny": 16, "base": 64}
REQUESTS = {"demo": 256, "tiny": 256, "base": 16}
PICTURE_SIZE = (640, 480)
TIMEOUT_S = 3600.0
WAYS = ("HTTP", "pipeline", "engine")
COLUMNS = ("", "requests/s", "lowest", "highest", "of engine", "p50, ms", "p95, ms", "service", "workers", "generator")

Send = Callable[[int], Awaitable[object]]
"""Sends the request about the picture of a number, and returns when it is answered."""


@dataclass(frozen=True)
class Turn:
    """One closed loop: requests a second, latencies, and processor milliseconds a request by process."""

    per_s: float
    p50_ms: float
    p95_ms: float
    service_ms: float
    workers_ms: float
    generator_ms: float


@dataclass(frozen=True)
class Measured:
    """Turns by kind of request and way, and milliseconds of one request at a time by kind and stage."""

    turns: dict[str, dict[str, list[Turn]]]
    stages_ms: dict[str, dict[str, list[float]]]


def draw_pictures(count: int) -> list[bytes]:
    """JPEGs of soft colours with a shape in front, each another one."""
    pictures = []
    for number in range(count):
        chance = np.random.default_rng(number)
        soft = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = soft.resize(PICTURE_SIZE, Image.Resampling.BICUBIC)
        picture.paste((220, 30, 60), (40 + 9 * number % 300, 60, 240 + 9 * number % 300, 260))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


_numbers = itertools.count()


def unseen(picture: bytes) -> bytes:
    """The same picture as a file that nobody has sent yet: what the service keeps of others does not answer for it."""
    return picture + next(_numbers).to_bytes(8, "big")  # behind its end, where no decoder looks


@contextmanager
def served_home(size: str, **settings: Any) -> Iterator[Settings]:
    """A home with a backbone and two adapters, ASK and FIND."""
    if size != "demo":
        with random_world(BLIP_SIZES[size], slots=f"{RANKS[size]}:4", **settings) as world:
            world.add_adapters([ASK], RANKS[size])
            world.add_adapters([FIND], RANKS[size], task="retrieval", seed=1)
            yield world.settings
        return
    with TemporaryDirectory(prefix="bench-") as folder:
        given = Settings.model_validate({"home": Path(folder), "backbone": ASSETS / "backbone", **settings})
        for name, package in DEMO_PACKAGES.items():
            push_package(given, ASSETS / "adapters" / package, name)
        yield given


def context() -> RequestContext:
    """Of a request that is never late."""
    return RequestContext(deadline=time.monotonic() + TIMEOUT_S, client="bench")


async def build_gallery(runtime: Runtime, pictures: Sequence[bytes]) -> None:
    """Put the pictures into a gallery."""
    folder = runtime.settings.home / "pictures"
    folder.mkdir()
    sources = []
    for number, picture in enumerate(pictures):
        file = folder / f"{number}.jpg"
        file.write_bytes(picture)
        sources.append(Source(str(number), "image", file))
    await runtime.galleries.build(GALLERY, FIND, sources, BuildOptions("image"), context())


# --- the three ways ------------------------------------------------------------------------------------------


def over_http(connections: Connections, pictures: Sequence[bytes]) -> dict[str, Callable[[int], Awaitable[Reply]]]:
    """By kind of request."""
    asked = {"adapter": ASK, "question": QUESTION}

    def as_json(path: str, fields: dict[str, object]) -> bytes:
        return connections.post(path, "application/json", json.dumps(fields).encode())

    def as_base64(picture: bytes) -> bytes:
        return as_json("/v1/vqa", asked | {"image": {"base64": base64.b64encode(picture).decode()}})

    items: list[dict[str, object]] = [{"gallery": GALLERY, "item": str(number)} for number in range(len(pictures))]
    requests = {"vqa, gallery item": [as_json("/v1/vqa", asked | {"image": item}) for item in items]}
    search: dict[str, object] = {"gallery": GALLERY, "query": {"text": SENTENCE}, "k": NUM_HITS}
    requests["retrieve"] = [as_json("/v1/retrieve", search)] * len(pictures)

    async def send(made: bytes) -> Reply:
        reply = await connections.send(made)
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.body.decode()}")
        return reply

    uploads: dict[str, Callable[[int], Awaitable[Reply]]] = {
        "vqa, form": lambda number: send(connections.post("/v1/vqa", *form(asked, unseen(pictures[number])))),
        "vqa, JSON": lambda number: send(as_base64(unseen(pictures[number]))),
    }
    return uploads | {kind: lambda number, made=made: send(made[number]) for kind, made in requests.items()}


def by_pipeline(runtime: Runtime, pictures: Sequence[bytes]) -> dict[str, Send]:
    """By kind of request."""

    async def ask(number: int) -> None:
        media = MediaBytes("image", unseen(pictures[number]))
        await runtime.vqa.answer(VqaQuery(ASK, QUESTION, media, GenerateDecode()), context())

    async def ask_item(number: int) -> None:
        media = GalleryMedia(GALLERY, str(number))
        await runtime.vqa.answer(VqaQuery(ASK, QUESTION, media, GenerateDecode()), context())

    async def find(number: int) -> None:
        await runtime.retrieve.search(RetrieveQuery(GALLERY, TextQuery(SENTENCE), NUM_HITS), context())

    return {"vqa, form": ask, "vqa, JSON": ask, "vqa, gallery item": ask_item, "retrieve": find}


@asynccontextmanager
async def by_engine(runtime: Runtime, pictures: Sequence[bytes]) -> AsyncIterator[dict[str, Send]]:
    """By kind of request; adapters are held while the block lasts."""
    async with runtime.loader.pin(ASK, LOCAL) as asked, runtime.loader.pin(FIND, LOCAL) as found:
        stages = runtime.stages.blip(asked)
        way = answering(stages)
        question = way.question(QUESTION, asked)
        search = way.search(GenerateDecode(), question, asked)
        preprocessing = preprocessing_of(asked.config, stages.backbone)
        media = [Medium("image", picture) for picture in pictures]
        pixels = [(await stages.decoder.pixels(medium, preprocessing, context()))[0] for medium in media]
        states = [(await stages.vision(each, asked, context())).states.flatten(0, 1) for each in pixels]
        limit = text_limit(found.config, stages.backbone)
        sentence = tokenize_within(stages.backbone, SENTENCE, limit, param="query.text")

        async def ask_item(number: int) -> None:
            given = GenerateInput(question.ids, states[number], search.num_beams, search.max_length)
            await stages.generate(given, asked, context())

        async def ask(number: int) -> None:
            seen = (await stages.vision(pixels[number], asked, context())).states.flatten(0, 1)
            given = GenerateInput(question.ids, seen, search.num_beams, search.max_length)
            await stages.generate(given, asked, context())

        async def find(number: int) -> None:
            await stages.text(sentence.ids, found, context())

        yield {"vqa, form": ask, "vqa, JSON": ask, "vqa, gallery item": ask_item, "retrieve": find}


# --- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """Reads what processors were busy with. The server is a child of this process, and `answers` says which one works."""

    server: int
    answers: bool

    def read(self) -> tuple[CpuTime, float]:
        """Of the process that answers and its workers; of the generator, where that is another process. Seconds so far."""
        own, server = cpu_time(os.getpid()), cpu_time(self.server)
        if self.answers:
            return server, own.own
        return CpuTime(own.own, own.children - server.own - server.children), 0.0


async def saturate(send: Send, numbers: Iterator[int], arguments: Namespace, num_requests: int, meter: Meter) -> Turn:
    """A closed loop."""
    (before, generator_before), in_flight = meter.read(), arguments.in_flight
    done = await closed_loop(send, numbers, in_flight=in_flight, num_requests=num_requests, num_warm=in_flight)
    (after, generator_after), answered = meter.read(), num_requests + in_flight
    cpu = after.since(before)
    return Turn(
        done.per_s,
        1000 * percentile(done.latencies_s, 0.5),
        1000 * percentile(done.latencies_s, 0.95),
        1000 * cpu.own / answered,
        1000 * cpu.children / answered,
        1000 * (generator_after - generator_before) / answered,
    )


async def one_at_a_time(
    send: Callable[[int], Awaitable[Reply]], numbers: Iterator[int], num_requests: int
) -> dict[str, list[float]]:
    """Milliseconds by stage, in the order in which a request meets them; what is left of the server's time, and of the client's."""
    found: dict[str, list[float]] = {}
    for number in itertools.islice(numbers, num_requests):
        start = time.perf_counter()
        reply = await send(number)
        client_ms = 1000 * (time.perf_counter() - start)
        timings = reply.timings_ms()
        total_ms = timings.pop("total")
        timings["rest of the server"] = total_ms - sum(timings.values())
        timings |= {"server, total": total_ms, "client, total": client_ms}
        for stage, spent_ms in timings.items():
            found.setdefault(stage, []).append(spent_ms)
    return found


async def run(arguments: Namespace, settings: Settings) -> Measured:
    """Everything: build the gallery, start the server, let every way warm up, then take turns."""
    pictures = draw_pictures(arguments.pictures)
    num_requests = arguments.requests or REQUESTS[arguments.size]
    async with started(settings) as runtime:
        await build_gallery(runtime, pictures)
        with ExitStack() as stack:
            replica = await asyncio.to_thread(stack.enter_context, serving(settings.home, settings))
            async with Connections(replica.url) as connections, by_engine(runtime, pictures) as jobs:
                http = over_http(connections, pictures)
                ways: dict[str, dict[str, Send]] = {
                    "HTTP": dict(http),
                    "pipeline": by_pipeline(runtime, pictures),
                    "engine": jobs,
                }
                for sends in ways.values():
                    for send in sends.values():
                        for number in range(len(pictures)):
                            await send(number)
                turns: dict[str, dict[str, list[Turn]]] = {kind: {way: [] for way in WAYS} for kind in http}
                numbers = itertools.cycle(range(len(pictures)))
                for _ in range(arguments.repeats):
                    for kind, of_kind in turns.items():
                        for way, found in of_kind.items():
                            meter = Meter(replica.pid, answers=way == "HTTP")
                            found.append(await saturate(ways[way][kind], numbers, arguments, num_requests, meter))
                alone = {kind: await one_at_a_time(send, numbers, num_requests) for kind, send in http.items()}
        return Measured(turns, alone)


# --- telling -------------------------------------------------------------------------------------------------


def of_engine(of_kind: dict[str, list[Turn]], way: str) -> float:
    """A way's throughput over the engine's own: the median of the turns' ratios."""
    return statistics.median(a.per_s / b.per_s for a, b in zip(of_kind[way], of_kind["engine"], strict=True))


def saturation_table(kind: str, of_kind: dict[str, list[Turn]]) -> Table:
    """One kind's ways."""
    table = Table(f"{kind}: at saturation; processor ms a request", COLUMNS)
    for way, turns in of_kind.items():
        columns = [statistics.median(values) for values in zip(*(asdict(t).values() for t in turns), strict=True)]
        speeds = [turn.per_s for turn in turns]
        shown = (columns[0], min(speeds), max(speeds), of_engine(of_kind, way), *columns[1:5])
        table.rows.append((way, *shown, columns[5] if way == "HTTP" else "-"))
    return table


def alone_table(kind: str, stages_ms: dict[str, list[float]]) -> Table:
    """One kind's stages."""
    table = Table(f"{kind}: one request at a time, by HTTP", ("", "p50, ms", "p95, ms"))
    table.rows += [(stage, percentile(times, 0.5), percentile(times, 0.95)) for stage, times in stages_ms.items()]
    return table


def generator_share(turns: Sequence[Turn]) -> float:
    """Of all processor time that requests by HTTP took; of too few requests for the clock, none."""
    spent = [(turn.generator_ms, turn.service_ms + turn.workers_ms + turn.generator_ms) for turn in turns]
    return statistics.median(own / every if every else 0.0 for own, every in spent)


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("http", __doc__, ["demo", "tiny", "base"], repeats=3)
    add = bench.parser.add_argument
    add("--in-flight", type=int, default=16, help="requests at a time, each on a connection of its own")
    add("--requests", type=int, default=0, help="measured in each turn; 0: 256, at base size 16")
    add("--pictures", type=int, default=16)
    arguments = bench.start(words)
    settings: dict[str, Any] = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "default_timeout_ms": 1000 * int(TIMEOUT_S),
        "max_timeout_ms": 1000 * int(TIMEOUT_S),
        "max_queue_seconds": TIMEOUT_S,
        "log_level": "warning",
    }
    with served_home(arguments.size, **settings) as home:
        measured = asyncio.run(run(arguments, home))
    tables = []
    for kind, of_kind in measured.turns.items():
        tables += [saturation_table(kind, of_kind), alone_table(kind, measured.stages_ms[kind])]
    shares = {kind: generator_share(of_kind["HTTP"]) for kind, of_kind in measured.turns.items()}
    rows: list[Sequence[object]] = [
        (kind, of_engine(measured.turns[kind], "HTTP"), shares[kind]) for kind in measured.turns
    ]
    facts = Table("HTTP", ("", "throughput, of engine", "generator, of processor time"), rows)
    bench.report(
        [facts, *tables],
        {
            "http_of_engine": {kind: of_engine(of_kind, "HTTP") for kind, of_kind in measured.turns.items()},
            "generator_share": shares,
            "saturation": {
                kind: {way: [asdict(turn) for turn in turns] for way, turns in of_kind.items()}
                for kind, of_kind in measured.turns.items()
            },
            "one_at_a_time_ms": {
                kind: {stage: percentile(times, 0.5) for stage, times in stages_ms.items()}
                for kind, stages_ms in measured.stages_ms.items()
            },
        },
    )
