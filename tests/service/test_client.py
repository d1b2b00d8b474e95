import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from service.client import Client, ServiceError
from service.http.schemas import GalleryMediaRef, GenerateOptions, RankOptions
from tests.service.http.serving import Serving, served, serving_tiny
from tests.service.http.tiny import ANSWERS, picture
from tests.service.media.clips import make_clip

QUESTION = "is the red circle big"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The whole service."""
    with serving_tiny(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def bank(serving: Serving) -> Iterator[Client]:
    """A client of it."""
    with Client(serving.url) as client:
        yield client


def test_a_picture_may_be_bytes_a_path_or_an_item(bank: Client, serving: Serving) -> None:
    path = serving.settings.home / "media" / "0.png"
    media: list[Any] = [path.read_bytes(), path, str(path), GalleryMediaRef(gallery="pictures", item="0.png")]
    answers = [bank.vqa("vqa", QUESTION, image=medium) for medium in media]
    assert {answer.answer for answer in answers} == {answers[0].answer}
    assert answers[0].adapter.name == "vqa"


def test_a_clip_is_asked_about(bank: Client) -> None:
    assert bank.vqa("vqa@1", QUESTION, video=make_clip(num_frames=12)).adapter.version == 1


def test_decoding_options_are_sent(bank: Client) -> None:
    ranked = bank.vqa("vqa", QUESTION, image=picture(), decode=RankOptions(mode="rank", candidates=ANSWERS))
    assert ranked.answer == ANSWERS[ranked.index or 0]
    greedy = bank.vqa("vqa", QUESTION, image=picture(), decode=GenerateOptions(num_beams=1, max_new_tokens=2))
    assert greedy.alternatives == []


def test_a_search_by_text_picture_and_item(bank: Client) -> None:
    assert len(bank.retrieve("pictures", text="a red circle", k=2).hits) == 2
    assert bank.retrieve("pictures", image=picture((9, 9, 9))).hits[0].score == pytest.approx(1, abs=1e-4)
    found = bank.retrieve("clips", video=GalleryMediaRef(gallery="clips", item="clip-1"), rerank="frames")
    assert found.hits[0].id == "clip-1" and found.hits[0].frames


def test_links_can_be_followed(bank: Client) -> None:
    hit = bank.retrieve("pictures", text="a red circle", k=1).hits[0]
    assert hit.thumbnail is not None and bank.download(hit.thumbnail).startswith(b"\xff\xd8\xff")


def test_what_there_is(bank: Client) -> None:
    assert {adapter.name for adapter in bank.adapters()} == {"vqa", "retrieval"}
    assert {gallery.name for gallery in bank.galleries()} == {"clips", "pictures", "texts"}
    assert bank.ready()


def test_a_server_that_is_not_ready_is_no_error(
    bank: Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.runtime, "status", lambda: {"ready": False, "reasons": ["draining"]})
    assert not bank.ready()


def test_a_refusal_becomes_an_exception_that_says_everything(bank: Client) -> None:
    with pytest.raises(ServiceError) as caught:
        bank.vqa("vqaa", QUESTION, image=picture())
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "adapter_not_found", "adapter")
    assert error.request_id and "vqaa" in error.message and error.retry_after_s is None


def test_a_deadline_is_sent(bank: Client) -> None:
    with pytest.raises(ServiceError) as caught:
        bank.vqa("vqa", QUESTION, image=picture(), timeout_s=0.001)
    assert caught.value.code == "deadline_exceeded"


@pytest.mark.parametrize("media", [{}, {"image": b"x", "video": b"y"}])
def test_exactly_one_medium_is_asked_about(bank: Client, media: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        bank.vqa("vqa", QUESTION, **media)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one"):
        bank.retrieve("clips", text=None if not media else "a", **media)  # type: ignore[arg-type]


def test_something_else_in_between_is_reported_as_it_is() -> None:
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("bad gateway", 502, {"Retry-After": "7"})(scope, receive, send)

    with served(proxy, lifespan=False) as url, Client(url) as client, pytest.raises(ServiceError) as caught:
        client.adapters()
    error = caught.value
    assert (error.status, error.code, error.message, error.retry_after_s) == (502, "unknown", "bad gateway", 7.0)


def test_a_missing_server_is_a_transport_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url) as client, pytest.raises(httpx.TransportError):
            client.ready()
