"""Questions and searches over all adapters and galleries a server has.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --users 16 --spawn-rate 16 --run-time 60s

What the environment may say (nothing has to be said):

    LOADTEST_MEDIA       folder of pictures and clips to send, again and again (which measures the feature cache too, unless the server
                         runs with BANK_FEATURE_CACHE_MIB=0); without it, pictures are drawn, each one different
    LOADTEST_POPULARITY  identical, uniform, zipf (default) or distinct: which adapters are asked for
    LOADTEST_ZIPF_S      exponent of zipf, default 1.0
    LOADTEST_RATE        requests a second of each user; without it a user sends the next one as soon as it has an answer
    LOADTEST_RERANK      none (default), frames or match
    LOADTEST_SEED        default 0
    LOADTEST_API_KEY     for a server that wants keys: one with the scope `infer`

With a rate, response times count from when a request was due, not from when it could be sent: a server that stalls does not stop the clock.
Stages of the server are listed as requests of the type STAGE.
"""

import io
import itertools
import json
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from locust import HttpUser, events, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from PIL import Image

from loadtest.traffic import Popularity, picks

SEED = int(os.environ.get("LOADTEST_SEED", "0"))
RATE = float(os.environ.get("LOADTEST_RATE", "0"))
ZIPF_S = float(os.environ.get("LOADTEST_ZIPF_S", "1.0"))
RERANK = os.environ.get("LOADTEST_RERANK", "none")
MEDIA = os.environ.get("LOADTEST_MEDIA", "")
API_KEY = os.environ.get("LOADTEST_API_KEY", "").strip()
POPULARITY = os.environ.get("LOADTEST_POPULARITY", "zipf")

PICTURE_SIZE = 384
KINDS = dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image")
KINDS |= dict.fromkeys((".mp4", ".mov", ".webm", ".mkv", ".avi"), "video")
QUESTIONS = ("what colour is it", "what is in the picture", "how many are there", "is it big")
SENTENCES = ("a red circle", "a green square moves", "a blue triangle", "two objects in a row")

_user_numbers = itertools.count()


@events.test_start.add_listener
def check_environment(environment: Environment, **_: Any) -> None:
    """A misspelt variable must not measure something else in silence."""
    if POPULARITY not in get_args(Popularity):
        raise SystemExit(f"LOADTEST_POPULARITY must be one of {', '.join(get_args(Popularity))}, not {POPULARITY!r}")
    if RERANK not in ("none", "frames", "match"):
        raise SystemExit(f"LOADTEST_RERANK must be none, frames or match, not {RERANK!r}")


def drawn_pictures(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """("image", JPEG bytes) without end, no two alike: coarse noise, enlarged, compresses like a photograph."""
    while True:
        noise = Image.frombytes("RGB", (24, 24), chance.randbytes(24 * 24 * 3))
        file = io.BytesIO()
        noise.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        yield "image", file.getvalue()


def media_of(folder: Path, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of the folder's files in random order, again and again."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in KINDS]
    files = [(KINDS[path.suffix.lower()], path.read_bytes()) for path in paths]
    if not files:
        raise SystemExit(f"LOADTEST_MEDIA: {folder} holds no pictures or clips")
    while True:
        yield from chance.sample(files, len(files))


class BankUser(HttpUser):
    """What both kinds of user share: a seed of their own, a schedule, the server's stages."""

    abstract = True

    def on_start(self) -> None:
        """Seed, prepare, and begin the schedule."""
        self.seed = SEED + next(_user_numbers)
        self.chance = random.Random(self.seed)
        if API_KEY:
            self.client.headers["Authorization"] = f"Bearer {API_KEY}"
        self.prepare()
        self.due_at = time.monotonic()

    def prepare(self) -> None:
        """Find out what the server has."""
        raise NotImplementedError

    def wait_time(self) -> float:
        """Until the next request is due."""
        if RATE <= 0:
            self.due_at = time.monotonic()
            return 0.0
        self.due_at += 1.0 / RATE
        return max(0.0, self.due_at - time.monotonic())

    def listed(self, what: str) -> list[dict[str, Any]]:
        """All adapters, or all galleries, of the server."""
        response = self.client.get(f"/v1/{what}")
        response.raise_for_status()
        found: list[dict[str, Any]] = response.json()[what]
        return found

    def send(self, name: str, **request: Any) -> None:
        """POST and record: lateness counts, and an error shows its code."""
        late_ms = max(0.0, 1000 * (time.monotonic() - self.due_at)) if RATE > 0 else 0.0
        with self.client.post(name, name=name, catch_response=True, **request) as response:
            response.request_meta["response_time"] += late_ms
            if not response.ok:
                response.failure(f"{response.status_code} {_code(response)}")
                return
        fire: Any = events.request.fire
        for stage, spent_ms in re.findall(r"([a-z_]+);dur=([\d.]+)", response.headers.get("Server-Timing", "")):
            fire(
                request_type="STAGE",
                name=f"{name} {stage}",
                response_time=float(spent_ms),
                response_length=0,
                exception=None,
                context={},
            )


class VqaUser(BankUser):
    """Asks about pictures and clips, of adapters by popularity."""

    def prepare(self) -> None:
        """Find the adapters there are."""
        names = [
            adapter["name"] for adapter in self.listed("adapters") if "vqa" in adapter["tasks"] and adapter["aliases"]
        ]
        self.adapters = picks(POPULARITY, names or ["__base__"], seed=self.seed, exponent=ZIPF_S)  # type: ignore[arg-type]
        self.media = media_of(Path(MEDIA), self.chance) if MEDIA else drawn_pictures(self.chance)

    @task
    def ask(self) -> None:
        """One question."""
        kind, data = next(self.media)
        fields = {"adapter": next(self.adapters), "question": self.chance.choice(QUESTIONS)}
        self.send("/v1/vqa", data={"request": json.dumps(fields)}, files={kind: (kind, data)})


class RetrieveUser(BankUser):
    """Searches galleries by sentences, by popularity."""

    def prepare(self) -> None:
        """Find the galleries there are."""
        kinds = ("image", "video") if RERANK != "none" else ("image", "video", "text")
        names = [gallery["name"] for gallery in self.listed("galleries") if gallery["kind"] in kinds]
        if not names:
            raise SystemExit("the server has no gallery to search")
        self.galleries = picks(POPULARITY, names, seed=self.seed, exponent=ZIPF_S)  # type: ignore[arg-type]

    @task
    def search(self) -> None:
        """One search."""
        query = {"text": self.chance.choice(SENTENCES)}
        self.send("/v1/retrieve", json={"gallery": next(self.galleries), "query": query, "k": 10, "rerank": RERANK})


def _code(response: ResponseContextManager) -> str:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "unknown"
