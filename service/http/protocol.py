"""How bytes become requests: uvicorn's protocol over httptools, a parser in C, with a limit that it lacks. `server.py` does without it where
httptools is not installed.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.limits import MAX_HEAD_BYTES


class BoundedProtocol(HttpToolsProtocol):
    """Refuses, with status 400, what is above MAX_HEAD_BYTES and still no whole head, nor a piece of a body.

    The parser keeps heads, and trailers behind a body, until they are complete, however long that takes.
    """

    _num_kept_bytes = 0
    _is_complete = False  # something, by the data just received

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._is_complete = False
        super().data_received(data)
        self._num_kept_bytes = 0 if self._is_complete else self._num_kept_bytes + len(data)
        if self._num_kept_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        """Of the parser."""
        self._is_complete = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Of the parser."""
        self._is_complete = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Of the parser."""
        self._is_complete = True
        super().on_message_complete()
