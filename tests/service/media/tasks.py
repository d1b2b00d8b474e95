"""Functions for a media worker to run in tests. Imports little: each worker that is asked for one imports this module."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def pid() -> int:
    return os.getpid()


def echo(item: Any) -> Any:
    return item


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def wait_for(path: Path) -> None:
    """Hold the worker until the file appears."""
    while not path.exists():
        time.sleep(0.005)


def wait_for_after(announce: Path, path: Path) -> None:
    """Tell that the worker has begun, then hold it."""
    announce.touch()
    wait_for(path)


def meet(folder: Path, num_workers: int) -> int:
    """Hold the worker until so many have come to the folder: only different workers can."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < num_workers:
        time.sleep(0.005)
    return os.getpid()


def spin_deaf() -> None:
    """Never end, whatever signal asks for it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def leave(status: int) -> None:
    os._exit(status)


def die_by(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def allocate(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def arrays(num: int, num_bytes: int) -> list[np.ndarray]:
    return [np.full(num_bytes, i, np.uint8) for i in range(num)]


def loaded_modules() -> set[str]:
    return set(sys.modules)


def touch(path: Path) -> None:
    path.touch()


def fail(message: str) -> None:
    raise ValueError(message)


class Unportable(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unportably() -> None:
    raise Unportable(1, 2)


def return_unpicklable() -> Any:
    return lambda: None
