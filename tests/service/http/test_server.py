import asyncio
import socket

from service.config import Settings
from service.http.server import _listen


def test_small_replies_on_a_kept_connection_are_not_held_back() -> None:
    async def accepted_without_delay() -> bool:
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection: socket.socket = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)
            writer.close()

        server = await asyncio.start_server(accept, sock=_listen(Settings(port=0)))
        _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            return await asyncio.wait_for(found, 10)
        finally:
            client.close()
            server.close()

    assert asyncio.run(accepted_without_delay())
