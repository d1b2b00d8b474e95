"""Captions and sounds over HTTP, from a language model alone."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from service.client import Client
from service.config import Settings
from service.home import push_package
from service.http.app import create_app
from service.http.schemas import GenerateOptions
from tests.service.http.serving import scraped, served
from tests.service.media.sounds import make_sound_file, tone
from tests.service.opt_worlds import make_opt_package, write_tiny_opt
from tests.service.worlds import picture

SOUND, PICTURE = make_sound_file(tone(440, 0.5)), picture(2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("opt")
    backbone = write_tiny_opt(home / "backbone")
    settings = Settings(home=home, media_workers=1, threads=1, slots="opt=2:4")
    made: list[tuple[str, Any, Any]] = [("hear", "caption", "ast"), ("see", "caption", "vit"), ("ask", "vqa", "ast")]
    for seed, (name, task, encoder) in enumerate(made):
        make_opt_package(home / "packages" / name, backbone, task, encoder, seed=seed)
        push_package(settings, home / "packages" / name, name)
    with served(create_app(settings)) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def base64_of(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_sound_is_put_into_words(http: httpx.Client) -> None:
    response = http.post("/v1/caption", json={"adapter": "hear", "audio": base64_of(SOUND)})
    assert response.status_code == 200
    body = response.json()
    assert body["adapter"]["name"] == "hear" and body["caption"] and body["warnings"] == []
    assert body["score"] >= body["alternatives"][0]["score"]
    assert response.headers["x-adapter"] == "hear@1"
    for stage in ("receive", "decode", "perceive", "generate"):
        assert float(response.headers[f"x-stage-{stage}-ms"]) >= 0


def test_form_path_and_client_give_the_same(http: httpx.Client, url: str) -> None:
    expected = http.post("/v1/caption", json={"adapter": "hear", "audio": base64_of(SOUND)}).json()
    form = {"data": {"request": '{"adapter": "hear"}'}, "files": {"audio": ("a.wav", SOUND)}}
    assert http.post("/caption", **form).json() == expected  # type: ignore[arg-type]
    with Client(url) as client:
        assert client.caption("hear", audio=SOUND).model_dump(mode="json") == expected


def test_many_who_ask_about_one_sound_have_it_perceived_once(http: httpx.Client) -> None:
    """By two adapters: neither has a part in the encoder."""
    sound, perceived = base64_of(make_sound_file(tone(660, 0.5))), 'bank_batch_jobs_sum{stage="perceive"}'
    before = scraped(http, perceived)
    question = {"adapter": "ask", "question": "what colour is the big circle?", "audio": sound}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/caption", {"adapter": "hear", "audio": sound}),
        ("/v1/vqa", question),
        ("/v1/vqa", question | {"decode": {"mode": "rank"}}),
    ]
    with ThreadPoolExecutor(6) as clients:
        replies = [clients.submit(http.post, path, json=body) for path, body in bodies * 2]
        assert [reply.result().status_code for reply in replies] == [200] * 6
    assert scraped(http, perceived) == before + 1


def test_decoding_can_be_chosen(url: str) -> None:
    with Client(url) as client:
        reply = client.caption("see", image=PICTURE, decode=GenerateOptions(num_beams=1, max_new_tokens=2))
        assert len(reply.caption.split()) <= 2 and reply.alternatives == []


def test_a_question_about_a_sound_is_answered(url: str) -> None:
    with Client(url) as client:
        reply = client.vqa("ask", "what colour is the big circle?", audio=SOUND)
        assert reply.adapter.name == "ask"
        assert client.vqa("ask", "what colour is the big circle?", audio=make_sound_file(tone(2000, 0.5))) != reply


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/caption", {"adapter": "hear"}, (422, "invalid_request", None)),
        (
            "/v1/caption",
            {"adapter": "hear", "audio": base64_of(SOUND), "image": base64_of(PICTURE)},
            (422, "invalid_request", None),
        ),
        (
            "/v1/caption",
            {"adapter": "hear", "audio": base64_of(SOUND), "question": "what?"},
            (422, "invalid_request", "question"),
        ),
        (
            "/v1/caption",
            {"adapter": "hear", "audio": base64_of(SOUND), "decode": {"mode": "rank"}},
            (422, "invalid_request", "decode.mode"),
        ),
        ("/v1/caption", {"adapter": "hear", "audio": base64_of(PICTURE)}, (422, "unsupported_media", None)),
        ("/v1/caption", {"adapter": "hear", "audio": base64_of(SOUND[:60])}, (422, "corrupt_media", None)),
        (
            "/v1/caption",
            {"adapter": "hear", "audio": {"base64": "no base64"}},
            (422, "invalid_request", "audio.base64"),
        ),
        (
            "/v1/caption",
            {"adapter": "hear", "audio": {"url": "http://example.org/a.wav"}},
            (422, "media_url_refused", "audio"),
        ),
        ("/v1/caption", {"adapter": "hear", "image": base64_of(PICTURE)}, (422, "bad_query", "image")),
        ("/v1/caption", {"adapter": "ask", "audio": base64_of(SOUND)}, (422, "bad_query", "adapter")),
        ("/v1/caption", {"adapter": "nobody", "audio": base64_of(SOUND)}, (404, "adapter_not_found", "adapter")),
        ("/v1/vqa", {"adapter": "hear", "question": "what?", "audio": base64_of(SOUND)}, (422, "bad_query", "adapter")),
        (
            "/v1/retrieve",
            {"gallery": "none", "query": {"audio": base64_of(SOUND)}},
            (422, "invalid_request", "query.audio"),
        ),
    ],
    ids=[
        "no medium",
        "two media",
        "a question",
        "ranking",
        "a picture for a sound",
        "half a sound",
        "no base64",
        "an address",
        "a medium it cannot perceive",
        "an adapter for questions",
        "nobody",
        "a question to who writes captions",
        "a search by sound",
    ],
)
def test_what_is_wrong_is_said(http: httpx.Client, path: str, body: dict[str, Any], error: Any) -> None:
    assert error_of(http.post(path, json=body)) == error


def test_health_tells_of_every_backbone(http: httpx.Client) -> None:
    health = http.get("/health/ready").json()
    assert health["backbones"]["backbone"]["kind"] == "opt"
    assert set(health["backbones"]["backbone"]["parts"]) == {"language_model", "vit", "timesformer", "ast", "tokenizer"}
