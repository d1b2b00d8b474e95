"""Real replicas: processes of `adapter-bank serve` on one Redis server, which tests kill, freeze and starve of disk."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from adapters.registry import Registry, RolloutRecord, VersionRecord, open_registry
from service.client import Client
from service.config import Settings
from service.home import push_package
from service.http.schemas import RankOptions, RetrieveReply, VqaReply
from tests.redis_server import RedisServer
from tests.service.worlds import World, make_package, picture

T = TypeVar("T")

ROOT = Path(__file__).parents[3]
WAIT_S = 60.0
QUESTION = "what colour is the big circle?"


def until(condition: Callable[[], T | None], *, within_s: float = WAIT_S, every_s: float = 0.02) -> T:
    """What the condition gives once that is true."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(every_s)
    return found


@dataclass
class Replica:
    """One server process, started anew after each death; its home survives it."""

    home: Path
    environment: Mapping[str, str]
    wrapper: tuple[str, ...] = ()
    url: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _is_ending: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was not started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What all its lives wrote to standard error."""
        return (self.home / "log.txt").read_text(encoding="utf-8")

    def start(self) -> None:
        """Begin to start, unless it runs. `settle` waits for it."""
        if self.is_running:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        self.url = ""
        command = [*self.wrapper, sys.executable, "-m", "service.cli", "serve", "--port", "0"]
        with (self.home / "log.txt").open("ab") as log, (self.home / "out.txt").open("wb") as out:
            self._process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=out, stderr=log)

    def settle(self) -> None:
        """Wait until it answers."""

        def announced() -> str | None:
            found = re.search(r"http://[\d.]+:\d+", (self.home / "out.txt").read_text(encoding="utf-8"))
            assert found or self.is_running, self.log
            return found[0] if found else None

        self.url = self.url or until(announced)

    def client(self) -> Client:
        return self._stack.enter_context(Client(self.url, timeout_s=WAIT_S))

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT_S, verify=False)  # no TLS: no certificates to read

    def ask(self, adapter: str) -> VqaReply:
        with Client(self.url, timeout_s=WAIT_S) as client:
            return client.vqa(adapter, QUESTION, image=picture(1), decode=RankOptions(mode="rank"))

    def search(self, gallery: str) -> RetrieveReply:
        with Client(self.url, timeout_s=WAIT_S) as client:
            return client.retrieve(gallery, text="a big red circle", k=3)

    def freeze(self) -> None:
        """Stand still, with every connection open."""
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "T", every_s=0.0)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9. Its children end by themselves."""
        children = self._children()
        self.process.kill()
        self.process.wait(WAIT_S)
        until(lambda: not any(_is_running(child) for child in children))

    def kill_while(self, condition: Callable[[], object]) -> None:
        """kill -9 at a moment when the condition holds: it is frozen to look."""
        end = time.monotonic() + WAIT_S
        while True:
            until(condition, every_s=0.001)
            self.freeze()
            if condition():
                return self.kill()
            self.thaw()
            assert time.monotonic() < end, "it was always too late"

    def terminate(self) -> None:
        """SIGTERM, once, to a replica that runs."""
        self._stack.close()
        if self.is_running and not self._is_ending:
            self.thaw()
            self.process.terminate()
            self._is_ending = True

    def stop(self) -> None:
        """SIGTERM, and whatever it takes."""
        self.terminate()
        if self._process is None:
            return
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()

    def limit_files(self, num_bytes: int | None) -> None:
        """Let no file that it writes grow beyond a size, as on a full disk; None: any size again."""
        _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        limit = hard if num_bytes is None else num_bytes
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def _children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for path in found for child in path.read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Cluster:
    """Two replicas with homes of their own, one Redis server, one folder of packages and one of galleries."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.redis = RedisServer(folder / "redis")
        self.redis.start()
        (folder / "galleries").mkdir()
        self.replicas = [self.replica("a"), self.replica("b")]
        self.settings = Settings.model_validate(world.settings.model_dump() | self._settings(folder / "operator"))
        self.registry: Registry = open_registry(self.redis.url, memory=folder / "operator-memory")
        self._num_made = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in self.replicas:
            replica.terminate()
        for replica in self.replicas:
            replica.stop()
        self.registry.close()
        self.redis.stop()

    def replica(self, name: str, *, wrapper: tuple[str, ...] = (), **changes: object) -> Replica:
        """A replica, not started yet."""
        home = self.folder / name
        home.mkdir()
        (home / "galleries").symlink_to(self.folder / "galleries")
        settings = self.world.settings.model_dump(exclude_none=True) | self._settings(home) | changes
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")}
        return Replica(home, environment | {f"BANK_{k.upper()}": str(v) for k, v in settings.items()}, wrapper)

    def _settings(self, home: Path) -> dict[str, object]:
        return {
            "home": home,
            "backbone": self.world.settings.backbone_folder,
            "registry_url": self.redis.url,
            "artifacts_url": str(self.folder / "artifacts"),
        }

    def begin(self) -> None:
        """Start what does not run, without waiting for it."""
        for replica in self.replicas:
            replica.start()

    def settle(self) -> None:
        """Wait until both replicas run, know each other, and nothing is under way."""
        self.begin()
        for replica in self.replicas:
            replica.settle()
        until(lambda: {r.url for r in self.replicas} <= self.serving().keys())
        until(lambda: not self.registry.snapshot().active_rollouts)
        self.caught_up()

    def serving(self) -> dict[str, str]:
        """Ids of replicas that said lately that they serve, by URL."""
        return {
            str(replica.details["url"]): replica.id
            for replica in self.registry.replicas()
            if replica.is_serving and replica.age_s < 10 and "url" in replica.details
        }

    def id_of(self, replica: Replica) -> str:
        return self.serving()[replica.url]

    def generation_of(self, replica: Replica) -> int:
        return int(replica.get("/health/ready").json()["registry_generation"])

    def caught_up(self) -> None:
        """Until every replica that runs serves the registry's newest state."""
        generation = self.registry.revision().generation
        for replica in self.replicas:
            if replica.is_running and replica.url:
                until(lambda replica=replica: self.generation_of(replica) >= generation)  # type: ignore[misc]

    def package(self, task: str = "vqa", *, seed: int) -> Path:
        """A package without a probe."""
        self._num_made += 1
        folder = self.folder / f"package-{self._num_made}"
        make_package(folder, self.world.backbone, task, seed=seed)  # type: ignore[arg-type]
        return folder

    def register(self, name: str, task: str = "vqa", *, seed: int) -> VersionRecord:
        """A version that is ready, as another host's command line leaves it."""
        return push_package(self.settings, self.package(task, seed=seed), name)

    def rollout(self, rollout_id: str) -> RolloutRecord:
        rollout = self.registry.snapshot().rollout(rollout_id)
        assert rollout is not None
        return rollout
