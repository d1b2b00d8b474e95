"""What is refused before anything is parsed: bodies that are too large, and requests that were not meant for this machine."""

import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.admission import Admission, Upload
from service.errors import TooLarge
from service.http.errors import FOREIGN_HOST, FOREIGN_ORIGIN, FORWARDED, RefusedRequest

MAX_HEAD_BYTES = 64 * 1024  # of a request, while it is incomplete


class BodyLimit:
    """At most `max_bytes` of body, and room for it among all that are in: by its declared length at once, else as it
    streams in, chunked or not.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_package_bytes: int, admission: Callable[[], Admission]
    ) -> None:
        """A package that is pushed goes to the disk as it comes: it has a limit of its own and takes no room."""
        self.app = app
        self._max_bytes = max_bytes
        self._max_package_bytes = max_package_bytes
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: TooLarge, Overloaded."""
        if scope["type"] != "http" or not has_body(scope):
            await self.app(scope, receive, send)
            return
        if scope["method"] == "PUT":  # packages alone are put
            await self.app(scope, self._counted(scope, receive, self._max_package_bytes), send)
            return
        with self._admission().upload() as upload:
            await self.app(scope, self._counted(scope, receive, self._max_bytes, upload), send)

    def _counted(self, scope: Scope, receive: Receive, max_bytes: int, upload: Upload | None = None) -> Receive:
        """`receive`, with the bytes that come counted, and taken from the room there is. Raises: as it does then."""
        error = TooLarge(f"the request body is above the limit of {max_bytes} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal():
            if int(declared) > max_bytes:
                raise error
            if upload is not None:
                upload.reserve(int(declared))
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise error
            if upload is not None:
                upload.reserve(num_bytes)
            return message

        return counted


def has_body(scope: Scope) -> bool:
    """Whether the request declares a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class LoopbackOnly:
    """Serve this machine alone. For a server without keys: being local is the only proof of identity, and it must not be borrowed:

    - a proxy in front makes strangers look local: forwarded headers are refused;
    - a web page may point its own host name at 127.0.0.1, or post a form there: foreign hosts and origins are refused.

    Keys need none of this: they are sent in a header that no page of another site has, and a proxy passes on.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: RefusedRequest."""
        if scope["type"] == "http":
            check_local(Headers(scope=scope))
        await self.app(scope, receive, send)


def check_local(headers: Headers) -> None:
    """Raises: RefusedRequest when the headers show that the request comes from elsewhere."""
    for name in headers:
        if name == "forwarded" or name.startswith("x-forwarded-"):
            message = "without API keys this server takes no requests through a proxy; keys or BANK_ALLOW_PUBLIC=true lift this"
            raise RefusedRequest(message, rule=FORWARDED, param=name)
    host = headers.get("host", "")
    if not is_loopback(f"//{host}"):
        message = "without API keys this server answers to localhost, 127.0.0.1 and [::1] only; keys or BANK_ALLOW_PUBLIC=true lift this"
        raise RefusedRequest(message, rule=FOREIGN_HOST, param="Host")
    origin = headers.get("origin")
    if origin is not None and not is_loopback(origin):
        raise RefusedRequest("pages of other sites may not use this server", rule=FOREIGN_ORIGIN, param="Origin")


def is_loopback(url: str) -> bool:
    """Whether the host of `url` is this machine by name or address."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if not re.fullmatch(r"[0-9a-f:.]+", host):
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
