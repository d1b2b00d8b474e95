"""Around every request, outermost first: `Exchanges`, `LoopbackOnly`, `Door` (access.py), `BodyLimit` (limits.py), `Attended`.

Plain ASGI throughout: Starlette's BaseHTTPMiddleware hides from the handler that its client has left.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config import Settings
from service.errors import DeadlineExceeded
from service.http.errors import error_response
from service.http.exchange import Exchange
from service.http.limits import has_body
from service.logs import event, request_id
from service.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_LEFT_STATUS = 499  # never sent; how metrics count requests whose client did not wait
UNMATCHED_ROUTE = "unmatched"


class Exchanges:
    """Begins the exchange, answers every error, adds the reply's headers, counts and logs."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Callable[[], Metrics]) -> None:
        self.app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange.begin(scope, self._settings)
        request_id.set(exchange.context.request_id)  # never reset: the server may have a last word, and the task ends
        scope.setdefault("state", {})["exchange"] = exchange
        wire = Wire(receive, send, exchange, has_body=has_body(scope))
        status = CLIENT_LEFT_STATUS
        try:
            try:
                exchange.read_timeout(scope, self._settings)
                await self.app(scope, wire.receive, wire.send)
            except ClientDisconnect:
                return
            except Exception as error:
                if wire.status is not None:
                    raise  # half a reply is out: only closing the connection tells the client
                response = error_response(error, exchange.context.request_id)
                if response.status_code == 500:
                    log.exception("request %s failed", exchange.context.request_id, exc_info=error)
                await response(scope, wire.receive, wire.send)
            status = wire.status or status
        finally:
            self._record(scope, exchange, status)

    def _record(self, scope: Scope, exchange: Exchange, status: int) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED_ROUTE)
        answered, context = exchange.adapter, exchange.context
        adapter = answered.name if answered is not None else ""
        metrics = self._metrics()
        arm = "canary" if answered is not None and answered.is_canary else "main"
        metrics.requests.labels(route, adapter, arm, str(status)).inc()
        seconds = time.monotonic() - exchange.started_at
        metrics.request_seconds.labels(route, arm).observe(seconds)
        path = scope.get("raw_path", b"").decode("latin-1")  # still quoted: nothing in it can break a line of the log
        keys = event(
            "request",
            method=scope["method"],
            path=path,
            status=status,
            ms=round(1000 * seconds, 1),
            key=context.principal.id,
            adapter=adapter or None,
            version=answered.version if answered is not None else None,
            digest=answered.digest if answered is not None else None,
            stages_ms={stage: round(spent, 2) for stage, spent in context.stage_ms.items()} or None,
        )
        log.info(
            "%s %s %d %.1f ms adapter=%s key=%s",
            scope["method"],
            path,
            status,
            1000 * seconds,
            adapter or "-",
            context.principal.id,
            extra=keys,
        )


class Wire:
    """Both directions of one exchange: notes what has gone through and adds headers to the reply."""

    def __init__(self, receive: Receive, send: Send, exchange: Exchange, *, has_body: bool) -> None:
        self._receive = receive
        self._send = send
        self._exchange = exchange
        self._is_read = not has_body
        self.status: int | None = None

    async def receive(self) -> Message:
        """ASGI."""
        message = await self._receive()
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = {"X-Content-Type-Options": "nosniff", **self._exchange.headers()}
            headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in added.items()]
            if not self._is_read:
                headers.append((b"connection", b"close"))  # do not wait for the rest of a body nobody wants
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await self._send(message)


class Attended:
    """Runs the application in a task and ends it when the client leaves, or when the deadline passes before the reply begins.

    While the body arrives the application hears of a client that leaves by itself; from then on somebody has to listen.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: DeadlineExceeded, ClientDisconnect."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = scope["state"]["exchange"].context.deadline
        line = _Line(receive, send)
        work = asyncio.create_task(self._run(scope, line))
        hangup = asyncio.create_task(line.hangup())
        both = {work, hangup}
        try:
            await asyncio.wait(both, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
            if line.has_begun and not hangup.done():  # no deadline for what is already on its way
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not (work.done() or line.has_ended):
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()  # also when it ended in spite of being cancelled
            elif hangup.done():
                raise ClientDisconnect
            elif time.monotonic() >= deadline:
                raise DeadlineExceeded("the deadline passed before the answer was ready")
            else:
                raise RuntimeError(
                    "a handler was cancelled although its client and its deadline were not. This is a bug."
                )
        finally:
            work.cancel()
            hangup.cancel()
            await asyncio.wait(both)

    async def _run(self, scope: Scope, line: "_Line") -> None:
        await self.app(scope, line.receive, line.send)


class _Line:
    """The connection as the application and its attendant share it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._body_ended = asyncio.Event()
        self._hung_up = asyncio.Event()
        self.has_begun = False
        self.has_ended = False

    async def receive(self) -> Message:
        """For the application: the body, then what the attendant hears."""
        if self._body_ended.is_set():
            await self._hung_up.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if not message.get("more_body", False):
            self._body_ended.set()
        return message

    async def send(self, message: Message) -> None:
        """For the application."""
        self.has_begun = True
        self.has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def hangup(self) -> None:
        """Return when the client has left."""
        await self._body_ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._hung_up.set()
