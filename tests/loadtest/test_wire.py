import asyncio
import json

import pytest

from loadtest.bench.wire import Connections, Reply, form


def test_the_server_s_timings_are_read() -> None:
    headers = {"server-timing": "receive;dur=0.25, generate;dur=3.50, total;dur=4.00"}
    assert Reply(200, headers, b"").timings_ms() == {"receive": 0.25, "generate": 3.5, "total": 4.0}
    assert Reply(200, {}, b"").timings_ms() == {}


def test_connections_are_kept_until_the_server_closes_them() -> None:
    opened: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies: list[bytes] = []
        opened.append(bodies)
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            bodies.append(await reader.readexactly(length))
            is_last = bodies[-1] == b"last"
            closing = b"Connection: close\r\n" if is_last else b""
            writer.write(b"HTTP/1.1 201 Created\r\n" + closing + b"X-Adapter: a@1\r\nContent-Length: 2\r\n\r\n{}")
            if is_last:
                writer.close()
                return

    async def story() -> list[Reply]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with Connections(f"http://127.0.0.1:{port}") as connections:
            requests = [connections.post("/v1/vqa", "text/plain", body) for body in (b"one", b"two", b"last", b"last")]
            replies = [await connections.send(request) for request in requests]
        server.close()
        await server.wait_closed()
        return replies

    replies = asyncio.run(story())
    assert [(reply.status, reply.headers["x-adapter"], reply.body) for reply in replies] == [(201, "a@1", b"{}")] * 4
    assert opened == [[b"one", b"two", b"last"], [b"last"]]


def test_a_connection_that_the_server_closed_while_it_was_idle_is_replaced() -> None:
    num_opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_opened
        num_opened += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Connections(f"http://127.0.0.1:{port}") as connections:
            for _ in range(2):
                assert (await connections.send(connections.post("/", "text/plain", b""))).status == 200
                await asyncio.sleep(0.5)

    asyncio.run(story())
    assert num_opened == 2


def test_a_reply_that_breaks_off_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Connections(f"http://127.0.0.1:{port}") as connections:
            with pytest.raises(asyncio.IncompleteReadError):
                await connections.send(connections.post("/", "text/plain", b""))

    asyncio.run(story())


def test_a_form_has_the_fields_and_the_file() -> None:
    content_type, body = form({"question": "what?"}, b"\xff\xd8", name="image")
    boundary = content_type.partition("boundary=")[2].encode()
    fields, file = body.split(b"--" + boundary)[1:3]
    assert json.loads(fields.partition(b"\r\n\r\n")[2]) == {"question": "what?"}
    assert b'name="image"' in file and file.endswith(b"\r\n\r\n\xff\xd8\r\n")
