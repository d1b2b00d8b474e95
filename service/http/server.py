"""Run the app under uvicorn: one process, one device. Refuses what would be unsafe or would not work."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from adapters.errors import AdapterBankError
from service.config import Settings
from service.http.access import open_keychain
from service.http.app import create_app
from service.http.limits import MAX_HEAD_BYTES
from service.runtime import Runtime

DRAIN_TIMEOUT_S = 30
BACKLOG = 2048

Announce = Callable[[str, Settings], None]


class RefusedBind(AdapterBankError):
    """The address cannot or must not be bound."""


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(settings: Settings, *, announce: Announce | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new requests, finish those accepted, and stop.

    `announce` is called with the URL and settings once requests are answered.
    Raises: RefusedBind for a public address without keys or `allow_public`, and for a port that is taken; InvalidKeys;
    whatever keeps the backbone, the registry or the media workers from starting.
    """
    has_keys = open_keychain(settings) is not None
    if not (has_keys or settings.allow_public or is_loopback(settings.host)):
        raise RefusedBind(
            f"{settings.host} is reachable from other machines and there are no API keys: make some (adapter-bank key new) and "
            "name their file in BANK_API_KEYS_FILE, bind to 127.0.0.1, or say --allow-public",
            param="host",
        )
    listener = _listen(settings)
    port = listener.getsockname()[1]
    settings = settings.model_copy(update={"port": port})
    runtime = Runtime(settings)
    server = _Server(
        uvicorn.Config(
            create_app(settings, runtime),
            http=protocol(),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_config=None,  # ours
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
        )
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.announce = (lambda: announce(f"http://{host}:{port}", settings)) if announce is not None else None
    asyncio.run(_serve(server, runtime, listener))


def protocol() -> type[asyncio.Protocol] | str:
    """What parses requests: httptools, or uvicorn's own parser, in Python, where that is not installed."""
    try:
        from service.http.protocol import BoundedProtocol
    except ImportError:
        return "h11"
    return BoundedProtocol


async def _serve(server: uvicorn.Server, runtime: Runtime, listener: socket.socket) -> None:
    """Started out here, not in the application's lifespan: there uvicorn would log what went wrong and hide it from the caller."""
    try:
        await runtime.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after a clean stop: no failure
            signal.signal(number, lambda *_: None)
        await server.serve(sockets=[listener])
        await runtime.drain()
    finally:
        await runtime.close()


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's delay (40 ms on a connection that is kept) off only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise RefusedBind(f"cannot bind {settings.host}:{settings.port}: {error.strerror}", param="port") from error
    listener.listen(BACKLOG)
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is up."""

    announce: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.announce is not None:
            self.announce()
