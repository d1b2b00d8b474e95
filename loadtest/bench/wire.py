"""The least of an HTTP client: requests made ahead as bytes, connections that are kept, replies of a known length.

A load generator shares the machine with what it loads. This one takes a fraction of what a full client takes.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

BOUNDARY = "----------------bench"


@dataclass(frozen=True)
class Reply:
    """An answer; names of headers are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def timings_ms(self) -> dict[str, float]:
        """What Server-Timing tells: milliseconds by stage, `total` among them."""
        timings = {}
        for entry in filter(None, self.headers.get("server-timing", "").split(", ")):
            name, _, duration = entry.partition(";dur=")
            timings[name] = float(duration)
        return timings


class Connections:
    """Connections to one server, as many as there are requests at a time."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None and place.port is not None, f"{url} has no host or port. This is a bug."
        self._place = (place.hostname, place.port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()

    def post(self, path: str, content_type: str, body: bytes) -> bytes:
        """A request as it goes over the wire."""
        host = f"{self._place[0]}:{self._place[1]}"
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def send(self, request: bytes) -> Reply:
        """Send a request and read its reply. Raises: OSError, asyncio.IncompleteReadError."""
        reader, writer = await self._connection()
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            reply = Reply(int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
        except BaseException:  # half a reply is no beginning of the next; a cancelled request's neither
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return reply

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that is idle, or a new one: servers close those that are idle for long."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._place)


def form(fields: Mapping[str, object], file: bytes, *, name: str = "image") -> tuple[str, bytes]:
    """Content type and body of a multipart form: the JSON field `request`, and a file."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="request"\r\n\r\n{json.dumps(fields)}\r\n'.encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="file"\r\n\r\n'.encode(),
        file,
        f"\r\n--{BOUNDARY}--\r\n".encode(),
    ]
    return f"multipart/form-data; boundary={BOUNDARY}", b"".join(parts)
