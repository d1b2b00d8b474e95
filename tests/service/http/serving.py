"""Serve applications over real sockets, in a thread of this process."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from service.config import Settings
from service.http.app import create_app
from service.http.limits import MAX_HEAD_BYTES
from service.http.server import protocol
from service.runtime import Runtime
from tests.service.http.tiny import build_home


@dataclass(frozen=True)
class Serving:
    """A running service: its settings, application and address."""

    settings: Settings
    app: FastAPI
    url: str

    @property
    def runtime(self) -> Runtime:
        """The parts behind it."""
        runtime: Runtime = self.app.state.runtime
        return runtime


@contextmanager
def serving_tiny(folder: Path, **changes: Any) -> Iterator[Serving]:
    """The whole service over the tiny home, built in `folder`; with other settings where given."""
    settings = Settings.model_validate(build_home(folder).model_dump() | changes)
    app = create_app(settings)
    with served(app) as url:
        yield Serving(settings, app, url)


@contextmanager
def served(app: ASGIApp, *, lifespan: bool = True, http: type[asyncio.Protocol] | str | None = None) -> Iterator[str]:
    """The URL of `app` while the block lasts. `http`: what parses requests, by default as when the service runs."""
    config = uvicorn.Config(
        app,
        http=protocol() if http is None else http,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_level="critical",
        access_log=False,
        lifespan="on" if lifespan else "off",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(_serve(server, listener, ready)))
        thread.start()
        try:
            assert ready.wait(60), "the server takes too long to start"
            assert server.started, "the server ended while starting"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def scraped(http: httpx.Client, series: str) -> float:
    """What GET /metrics says of a series, labels included; 0 when it says nothing."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


async def _serve(server: uvicorn.Server, listener: socket.socket, ready: threading.Event) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    ready.set()
    await serving
