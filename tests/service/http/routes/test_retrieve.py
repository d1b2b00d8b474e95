import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.service.http.serving import Serving, scraped
from tests.service.http.tiny import NUM_PICTURES, ODD_ID, picture

SEARCH: dict[str, Any] = {"gallery": "pictures", "query": {"text": "a red circle"}}


def search(http: httpx.Client, path: str = "/v1/retrieve", **changes: Any) -> httpx.Response:
    return http.post(path, json=SEARCH | changes)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_sentence_finds_pictures_best_first(http: httpx.Client) -> None:
    response = search(http, k=3)
    body = response.json()
    assert (body["gallery"], body["gallery_version"], body["num_items"]) == ("pictures", 1, NUM_PICTURES + 2)
    scores = [hit["score"] for hit in body["hits"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert all(hit["scores"] == {"search": hit["score"]} for hit in body["hits"])
    assert body["adapter"]["name"] == "retrieval"
    assert response.headers["x-adapter"] == "retrieval@1"
    assert search(http, "/retrieve", k=3).json() == body


def test_k_above_the_gallery_returns_all_of_it(http: httpx.Client) -> None:
    assert len(search(http, k=50).json()["hits"]) == NUM_PICTURES + 2


def test_links_of_hits_lead_to_thumbnails_and_media(http: httpx.Client) -> None:
    for hit in search(http, k=50).json()["hits"]:
        assert http.get(hit["thumbnail"]).headers["content-type"] == "image/jpeg"
        assert http.get(hit["media"]).headers["content-type"] == "image/png"


def test_frames_are_weighed(http: httpx.Client) -> None:
    hit = search(http, gallery="clips", rerank="frames").json()["hits"][0]
    assert sum(frame["weight"] for frame in hit["frames"]) == pytest.approx(1)
    assert hit["frames"] == sorted(hit["frames"], key=lambda frame: frame["time_s"])
    assert hit["scores"].keys() == {"search", "frames"} and hit["score"] == hit["scores"]["frames"]


def test_candidates_are_matched(http: httpx.Client) -> None:
    body = search(http, k=2, rerank="match", rerank_depth=4).json()
    assert (body["rerank"], body["rerank_depth"]) == ("match", 4)
    assert all(hit["score"] == hit["scores"]["match"] for hit in body["hits"])


def test_a_picture_finds_itself_in_json_form_and_gallery(http: httpx.Client) -> None:
    data = picture((9, 9, 9))
    replies = [
        search(http, query={"image": {"base64": base64.b64encode(data).decode()}}),
        http.post("/v1/retrieve", data={"request": json.dumps({"gallery": "pictures"})}, files={"image": ("x", data)}),
        search(http, query={"image": {"gallery": "pictures", "item": ODD_ID}}),
    ]
    for reply in replies:
        first = reply.json()["hits"][0]
        assert first["id"] == ODD_ID and first["score"] == pytest.approx(1, abs=1e-4)


def test_many_searches_with_one_picture_look_at_it_once(http: httpx.Client) -> None:
    query = {"image": {"base64": base64.b64encode(picture((14, 15, 16))).decode()}}
    looked = 'bank_batch_jobs_sum{stage="vision"}'
    before = scraped(http, looked)
    searches: list[dict[str, Any]] = [
        {"gallery": "pictures"},
        {"gallery": "clips", "rerank": "frames"},
        {"gallery": "texts", "rerank": "match"},
    ]
    with ThreadPoolExecutor(6) as clients:
        replies = [clients.submit(search, http, query=query, **fields) for fields in searches * 2]
        answers = [reply.result() for reply in replies]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert [answer.json()["hits"] for answer in answers[:3]] == [answer.json()["hits"] for answer in answers[3:]]
    assert scraped(http, looked) == before + 1


def test_texts_are_found_and_have_no_media(http: httpx.Client) -> None:
    hits = search(http, gallery="texts").json()["hits"]
    assert {hit["text"] for hit in hits} == {"a red circle", "a green circle", "a blue circle"}
    assert all(hit["thumbnail"] is None and hit["media"] is None for hit in hits)


def test_metadata_comes_along(http: httpx.Client) -> None:
    hits = {hit["id"]: hit for hit in search(http, k=50).json()["hits"]}
    assert hits["2.png"]["metadata"] == {"number": 2}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"k": 0}, (422, "invalid_request", "k")),
        ({"k": 51}, (422, "bad_query", "k")),
        ({"rerank": "match", "rerank_depth": 9}, (422, "bad_query", "rerank_depth")),
        ({"rerank_depth": 3}, (422, "invalid_request", None)),
        ({"rerank": "match", "k": 5, "rerank_depth": 2}, (422, "bad_query", "rerank_depth")),
        ({"gallery": "nothing"}, (404, "gallery_not_found", "gallery")),
        ({"gallery": "texts", "rerank": "match"}, (422, "bad_query", "rerank")),
        ({"adapter": "__base__"}, (409, "index_stale", "adapter")),
        ({"adapter": "vqa"}, (422, "bad_query", "adapter")),
        ({"query": {"text": ""}}, (422, "bad_query", "query.text")),
        ({"query": {"text": "word " * 10_000}}, (422, "bad_query", "query.text")),
        ({"gallery": "../pictures"}, (422, "invalid_reference", "gallery")),
        ({"query": {"image": {"base64": "?"}}}, (422, "invalid_request", "query.image.base64")),
        ({"query": {"video": "https://example.org/a.mp4"}}, (422, "media_url_refused", "query.video")),
        ({"query": {}}, (422, "invalid_request", "query")),
        ({"where": {}}, (422, "invalid_request", "where")),
    ],
)
def test_a_wrong_search_is_refused(
    http: httpx.Client, changes: dict[str, Any], expected: tuple[int, str, str | None]
) -> None:
    assert error_of(search(http, **changes)) == expected


def test_an_unknown_gallery_is_answered_with_those_there_are(http: httpx.Client) -> None:
    message = search(http, gallery="nothing").json()["error"]["message"]
    assert all(name in message for name in ("clips", "pictures", "texts"))


def test_the_adapter_may_be_named_when_it_is_the_gallery_s_own(http: httpx.Client, serving: Serving) -> None:
    assert search(http, adapter="retrieval@prod").json()["hits"] == search(http).json()["hits"]
