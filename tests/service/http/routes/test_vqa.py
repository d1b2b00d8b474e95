import base64
import json
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.service.http.serving import Serving, scraped
from tests.service.http.tiny import ANSWERS, ODD_ID, picture
from tests.service.media.clips import make_clip


def base64_of(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


PICTURE = base64_of(picture())
QUESTION: dict[str, Any] = {"adapter": "vqa", "question": "is the red circle big", "image": PICTURE}


def ask(http: httpx.Client, path: str = "/v1/vqa", **changes: Any) -> httpx.Response:
    return http.post(path, json={name: value for name, value in (QUESTION | changes).items() if value is not None})


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_question_about_a_picture_is_answered(http: httpx.Client) -> None:
    response = ask(http, image=base64_of(picture((1, 2, 3))))
    assert response.status_code == 200
    body = response.json()
    assert body["adapter"]["name"] == "vqa" and body["adapter"]["version"] == 1 and body["adapter"]["alias"] == "prod"
    assert body["alternatives"] and body["score"] >= body["alternatives"][0]["score"]
    assert response.headers["x-adapter"] == "vqa@1"
    for stage in ("receive", "decode", "vision", "generate"):
        assert float(response.headers[f"x-stage-{stage}-ms"]) >= 0
        assert f"{stage};dur=" in response.headers["server-timing"]


def test_the_unversioned_path_is_the_same(http: httpx.Client) -> None:
    assert ask(http, "/vqa").json() == ask(http, "/v1/vqa").json()


def test_a_form_is_the_same(http: httpx.Client) -> None:
    fields = json.dumps({"adapter": "vqa", "question": QUESTION["question"]})
    files = {"image": ("any name", picture(), "any/type")}
    assert http.post("/v1/vqa", data={"request": fields}, files=files).json() == ask(http).json()


def test_the_field_of_a_form_may_be_a_file(http: httpx.Client) -> None:
    fields = json.dumps({"adapter": "vqa", "question": QUESTION["question"]})
    files: dict[str, Any] = {"request": ("request.json", fields, "application/json"), "image": ("x", picture())}
    assert http.post("/v1/vqa", files=files).json() == ask(http).json()


def test_a_clip_is_looked_at(http: httpx.Client) -> None:
    fields = json.dumps({"adapter": "vqa@1", "question": "is it red"})
    response = http.post("/v1/vqa", data={"request": fields}, files={"video": ("clip.mp4", make_clip(num_frames=12))})
    assert response.status_code == 200
    assert response.json()["adapter"]["alias"] is None


@pytest.mark.parametrize("item", ["0.png", ODD_ID])
def test_an_item_of_a_gallery_is_looked_at(http: httpx.Client, item: str) -> None:
    assert ask(http, image={"gallery": "pictures", "item": item}).status_code == 200


def test_answers_are_ranked_from_the_adapter_s_list(http: httpx.Client) -> None:
    body = ask(http, decode={"mode": "rank"}).json()
    assert {body["answer"], *(other["answer"] for other in body["alternatives"])} == set(ANSWERS)
    assert ANSWERS[body["index"]] == body["answer"]


def test_answers_are_ranked_from_given_candidates(http: httpx.Client) -> None:
    body = ask(http, decode={"mode": "rank", "candidates": ["circle", "square"], "k": 1}).json()
    assert body["answer"] in ("circle", "square") and body["alternatives"] == []


def test_the_backbone_alone_answers(http: httpx.Client) -> None:
    response = ask(http, adapter="__base__")
    assert response.json()["adapter"] == {"name": "__base__", "version": None, "digest": "__base__", "alias": None}
    assert response.headers["x-adapter"] == "__base__"


def test_unknown_words_are_pointed_out(http: httpx.Client) -> None:
    assert "zorkmid" in ask(http, question="where is the zorkmid").json()["warnings"][0]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"adapter": "vqaa"}, (404, "adapter_not_found", "adapter")),
        ({"adapter": "vqa@7"}, (404, "adapter_not_found", "adapter")),
        ({"adapter": "vqa@canary"}, (404, "adapter_not_found", "adapter")),
        ({"adapter": "../vqa"}, (422, "invalid_reference", "adapter")),
        ({"adapter": "retrieval"}, (422, "bad_query", "adapter")),
        ({"question": "red " * 40}, (422, "bad_query", "question")),
        ({"question": "   "}, (422, "bad_query", "question")),
        ({"question": ""}, (422, "bad_query", "question")),
        ({"question": "word " * 10_000}, (422, "bad_query", "question")),
        ({"image": {"base64": "!"}}, (422, "invalid_request", "image.base64")),
        ({"image": {"base64": base64.b64encode(b"text").decode()}}, (422, "unsupported_media", None)),
        ({"image": {"base64": base64.b64encode(picture()[:60]).decode()}}, (422, "corrupt_media", None)),
        ({"image": {"url": "http://127.0.0.1/x.png"}}, (422, "media_url_refused", "image")),
        ({"image": "http://127.0.0.1/x.png"}, (422, "media_url_refused", "image")),
        ({"image": {"gallery": "pictures", "item": "none"}}, (404, "gallery_not_found", "item")),
        ({"image": {"gallery": "none", "item": "0.png"}}, (404, "gallery_not_found", "gallery")),
        ({"image": {"gallery": "texts", "item": "text-0"}}, (422, "bad_query", "gallery")),
        ({"image": None}, (422, "invalid_request", None)),
        ({"colour": "red"}, (422, "invalid_request", "colour")),
        ({"decode": {"mode": "rank", "candidates": ["a"] * 21}}, (422, "invalid_request", "decode.candidates")),
        ({"decode": {"mode": "rank", "k": 0}}, (422, "invalid_request", "decode.k")),
        ({"decode": {"mode": "generate", "max_new_tokens": 40}}, (422, "bad_query", "decode.max_new_tokens")),
    ],
)
def test_a_wrong_question_is_refused(
    http: httpx.Client, changes: dict[str, Any], expected: tuple[int, str, str | None]
) -> None:
    assert error_of(ask(http, **changes)) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"adapter": "vqa"} trailing'])
def test_what_is_no_json_object_is_refused(http: httpx.Client, text: str) -> None:
    response = http.post("/v1/vqa", content=text.encode("latin-1"), headers={"Content-Type": "application/json"})
    assert error_of(response)[:2] == (422, "invalid_request")


def test_json_of_countless_parts_is_refused_unparsed(http: httpx.Client) -> None:
    for text in ("[" + "[]," * 100_000 + "[]]", "{" + ",".join(f'"k{i}":1' for i in range(100_001)) + "}"):
        response = http.post("/v1/vqa", content=text, headers={"Content-Type": "application/json"})
        assert error_of(response)[:2] == (413, "too_large")
        response = http.post("/v1/vqa", data={"request": text}, files={"image": picture()})
        assert error_of(response) == (413, "too_large", "request")


def test_countless_wrong_fields_are_counted_and_not_listed(http: httpx.Client) -> None:
    response = ask(http, **{f"k{i}": 1 for i in range(1001)})
    assert error_of(response)[:2] == (422, "invalid_request")
    assert response.json()["error"]["message"] == "1001 fields are wrong"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(http: httpx.Client, content_type: str) -> None:
    response = http.post("/v1/vqa", content=b"{}", headers={"Content-Type": content_type})
    assert error_of(response) == (415, "unsupported_content_type", "Content-Type")


FIELD = json.dumps({"adapter": "vqa", "question": "what"})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
)


@pytest.mark.parametrize(
    "parts, param",
    [
        ({"image": ("x", b"x")}, None),
        ({"request": (None, FIELD)}, None),
        ({"request": (None, FIELD), "image": (None, "text")}, "image"),
        ({"request": (None, FIELD), "image": ("x", b"x"), "video": ("y", b"y")}, None),
        ({"request": (None, FIELD), "picture": ("x", b"x")}, "picture"),
        ({"request": (None, '{"adapter": 1}'), "image": ("x", b"x")}, "request.adapter"),
    ],
)
def test_a_wrong_form_is_refused(http: httpx.Client, parts: dict[str, Any], param: str | None) -> None:
    assert error_of(http.post("/v1/vqa", files=parts)) == (422, "invalid_request", param)


def test_a_broken_form_is_refused(http: httpx.Client) -> None:
    response = http.post(
        "/v1/vqa", content=b"--x\r\nnonsense", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert error_of(response)[:2] == (422, "invalid_request")


@pytest.mark.parametrize("charset", ["utf-7", "raw_unicode_escape", "punycode", "undefined"])
def test_a_form_whose_charset_gives_no_text_is_refused(http: httpx.Client, charset: str) -> None:
    field = b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"adapter": "+2AA-\\ud800"}\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n--x--\r\n'
    content_type = f"multipart/form-data; boundary=x; charset={charset}"
    response = http.post("/v1/vqa", content=field + file, headers={"Content-Type": content_type})
    assert error_of(response)[:2] == (422, "invalid_request")


@pytest.mark.parametrize(
    "kind, data, expected",
    [
        ("image", picture()[:60], (422, "corrupt_media", None)),
        ("image", BOMB, (413, "media_too_large", None)),
        ("image", b"", (422, "unsupported_media", None)),
        ("video", b"a text named like a clip", (422, "unsupported_media", None)),
        ("video", make_clip("matroska", num_frames=0), (422, "corrupt_media", None)),
    ],
    ids=["cut off", "bomb", "empty", "text", "no frames"],
)
def test_files_that_are_not_what_they_seem_are_refused(
    http: httpx.Client, kind: str, data: bytes, expected: tuple[int, str, str | None]
) -> None:
    response = http.post("/v1/vqa", data={"request": FIELD}, files={kind: ("clip.mp4", data)})
    assert error_of(response) == expected


def test_a_decoder_that_hangs_costs_its_own_request(http: httpx.Client, serving: Serving) -> None:
    """Stopped by a signal, a worker never answers. The limit is shortened where the workers look it up."""
    workers = serving.runtime.media._workers
    known = [worker._limits for worker in workers]
    for worker in workers:
        worker._limits = replace(worker._limits, timeout_s=0.5)
        os.kill(worker.ensure_alive().process.pid, signal.SIGSTOP)
    try:
        hung = [ask(http, image=base64_of(picture((4, 5, number)))) for number, _ in enumerate(workers)]
        assert [error_of(response) for response in hung] == [(422, "media_timeout", None)] * len(workers)
    finally:
        for worker, limits in zip(workers, known, strict=True):
            worker._limits = limits
    assert ask(http, image=base64_of(picture((4, 5, 0)))).status_code == 200


def num_looks(http: httpx.Client) -> tuple[float, float]:
    """Media decoded so far, and jobs that looked at one."""
    decoded = scraped(http, 'bank_stage_seconds_count{stage="decode"}')
    return decoded, scraped(http, 'bank_batch_jobs_sum{stage="vision"}')


@contextmanager
def workers_stopped(serving: Serving) -> Iterator[None]:
    """Nothing is decoded while the block lasts."""
    processes = [worker.ensure_alive().process.pid for worker in serving.runtime.media._workers]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


MANY = [
    {"question": question, "decode": decode}
    for question in ("is it red", "is the circle big", "what is it", "where is the square")
    for decode in ({"mode": "generate"}, {"mode": "rank"})
]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_many_questions_about_one_medium_look_at_it_once(http: httpx.Client, serving: Serving, kind: str) -> None:
    data = picture((7, 8, 9)) if kind == "image" else make_clip(num_frames=17)
    medium = {"image": None, kind: base64_of(data)}
    before = num_looks(http)
    joined = 'bank_feature_lookups_total{backbone="backbone",outcome="joined"}'
    num_joined = scraped(http, joined)
    with ThreadPoolExecutor(len(MANY)) as clients:
        with workers_stopped(serving):
            replies = [clients.submit(ask, http, **medium, **fields) for fields in MANY]
            wait_until(lambda: scraped(http, joined) == num_joined + len(MANY) - 1)
        answers = [reply.result() for reply in replies]
    assert [answer.status_code for answer in answers] == [200] * len(MANY)
    assert sum("x-stage-vision-ms" in answer.headers for answer in answers) == 1
    assert sum("x-stage-join-ms" in answer.headers for answer in answers) == len(MANY) - 1
    for fields, answer in zip(MANY, answers, strict=True):
        later = ask(http, **medium, **fields)
        assert later.json()["answer"] == answer.json()["answer"]
        assert later.json()["score"] == pytest.approx(answer.json()["score"], abs=1e-4)
        assert not {"x-stage-decode-ms", "x-stage-vision-ms", "x-stage-join-ms"} & set(later.headers)
    assert num_looks(http) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("how", ["hangs up", "is late"])
def test_the_first_to_ask_may_leave_and_the_others_are_answered(http: httpx.Client, serving: Serving, how: str) -> None:
    data = base64_of(picture((10, 11, 12 if how == "is late" else 13)))
    before, waiting = num_looks(http), 'bank_feature_lookups_total{backbone="backbone",outcome="%s"}'
    num_first, num_joined = scraped(http, waiting % "miss"), scraped(http, waiting % "joined")
    with ThreadPoolExecutor(4) as clients, httpx.Client(base_url=serving.url, timeout=30, verify=False) as leaving:
        with workers_stopped(serving):
            body = QUESTION | {"image": data}
            options: dict[str, Any] = (
                {"headers": {"X-Request-Timeout-Ms": "700"}} if how == "is late" else {"timeout": 0.7}
            )
            first = clients.submit(leaving.post, "/v1/vqa", json=body, **options)
            wait_until(lambda: scraped(http, waiting % "miss") == num_first + 1)
            others = [clients.submit(ask, http, image=data) for _ in range(3)]
            wait_until(lambda: scraped(http, waiting % "joined") == num_joined + 3)
            if how == "is late":
                assert error_of(first.result()) == (504, "deadline_exceeded", None)
            else:
                assert isinstance(first.exception(), httpx.ReadTimeout)
                left = 'bank_requests_total{adapter="",arm="main",route="/v1/vqa",status="499"}'
                wait_until(lambda: scraped(http, left) >= 1)
        assert [other.result().status_code for other in others] == [200] * 3
    assert num_looks(http) == (before[0] + 1, before[1] + 1)


def test_a_request_that_never_had_a_chance_is_late(http: httpx.Client) -> None:
    response = http.post("/v1/vqa", json=QUESTION, headers={"X-Request-Timeout-Ms": "1"})
    assert error_of(response)[:2] == (504, "deadline_exceeded")


def test_only_registered_names_become_labels(http: httpx.Client, serving: Serving) -> None:
    ask(http)
    ask(http, adapter="made-up")
    adapters = {
        sample.labels["adapter"] for metric in serving.runtime.metrics.requests.collect() for sample in metric.samples
    }
    assert "vqa" in adapters and adapters <= {"", "vqa", "retrieval", "__base__"}
