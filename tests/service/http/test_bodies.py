import asyncio
import json
import threading
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from service.http import bodies
from service.types import VqaQuery


def read(body: dict[str, Any]) -> VqaQuery:
    """The query that a JSON body is."""

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    return asyncio.run(bodies.read_vqa(Request(scope, receive), max_bytes=2**20))


@pytest.mark.parametrize("num_words, is_in_a_thread", [(1, False), (bodies.PARSED_BY_THREADS_BYTES // 5, True)])
def test_what_takes_long_to_parse_leaves_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, num_words: int, is_in_a_thread: bool
) -> None:
    where: list[threading.Thread] = []
    parse = bodies._parse

    def noted(*args: Any) -> Any:
        where.append(threading.current_thread())
        return parse(*args)

    monkeypatch.setattr(bodies, "_parse", noted)
    question = "word " * num_words
    query = read({"adapter": "vqa", "question": question, "image": {"gallery": "clips", "item": "1"}})
    assert query.question == question
    assert [thread is not threading.main_thread() for thread in where] == [is_in_a_thread]
