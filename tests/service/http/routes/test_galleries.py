from urllib.parse import quote

import httpx
import pytest

from tests.service.http.serving import Serving
from tests.service.http.tiny import NUM_PICTURES, ODD_ID, SUFFIX_ID, picture

ITEMS = "/v1/galleries/pictures/items"


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_galleries_are_listed(http: httpx.Client) -> None:
    galleries = {gallery["name"]: gallery for gallery in http.get("/v1/galleries").json()["galleries"]}
    assert {name: gallery["kind"] for name, gallery in galleries.items()} == {
        "clips": "video",
        "pictures": "image",
        "texts": "text",
    }
    assert galleries["pictures"]["adapter"]["name"] == "retrieval"


def test_one_gallery_is_described(http: httpx.Client) -> None:
    gallery = http.get("/v1/galleries/clips").json()
    assert (gallery["version"], gallery["versions"], gallery["num_items"]) == (1, [1], 2)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("nothing", (404, "gallery_not_found")),
        ("nothing/items", (404, "gallery_not_found")),
        ("pictures?version=9", (404, "gallery_not_found")),
        ("pictures?version=0", (422, "invalid_request")),
        ("pictures/items?limit=0", (422, "invalid_request")),
        ("pictures/items?limit=1000", (422, "invalid_request")),
        ("pictures/items?page=7", (422, "invalid_request")),
        ("pictures/items?page=v1.2&version=2", (422, "invalid_request")),
        ("pictures/items?page=v2.0", (404, "gallery_not_found")),
        ("pictures/items/nothing", (404, "gallery_not_found")),
        ("pictures/items/nothing/media", (404, "gallery_not_found")),
        ("texts/items/text-0/media", (410, "missing_media")),
        ("texts/items/text-0/thumbnail", (410, "missing_media")),
    ],
)
def test_what_is_not_there_says_so(http: httpx.Client, path: str, expected: tuple[int, str]) -> None:
    assert error_of(http.get(f"/v1/galleries/{path}")) == expected


def test_pages_follow_each_other_within_a_version(http: httpx.Client) -> None:
    ids: list[str] = []
    page: str | None = "v1.0"
    while page:
        reply = http.get(ITEMS, params={"limit": 3, "page": page}).json()
        ids += [item["id"] for item in reply["items"]]
        page = reply["next_page"]
    assert len(ids) == NUM_PICTURES + 2 == len(set(ids))
    assert ids == [item["id"] for item in http.get(ITEMS).json()["items"]]


def test_a_page_beyond_the_end_is_empty(http: httpx.Client) -> None:
    reply = http.get(ITEMS, params={"page": "v1.999999"}).json()
    assert reply["items"] == [] and reply["next_page"] is None


@pytest.mark.parametrize("item_id", ["0.png", ODD_ID, SUFFIX_ID])
def test_an_item_is_found_by_its_quoted_id(http: httpx.Client, item_id: str) -> None:
    item = http.get(f"{ITEMS}/{quote(item_id, safe='')}").json()
    assert item["id"] == item_id
    assert http.get(item["media"]).content.startswith(b"\x89PNG")
    assert http.get(item["thumbnail"]).content.startswith(b"\xff\xd8\xff")


def test_files_of_a_named_version_may_be_kept(http: httpx.Client) -> None:
    assert "immutable" in http.get(f"{ITEMS}/0.png/media?version=1").headers["cache-control"]
    assert http.get(f"{ITEMS}/0.png/media").headers["cache-control"] == "no-cache"


def test_a_clip_s_frames_and_duration_are_told(http: httpx.Client) -> None:
    item = http.get("/v1/galleries/clips/items/clip-0").json()
    assert len(item["frame_times_s"]) == 4 and item["duration_s"] > 0
    assert http.get(item["media"]).headers["content-type"] == "video/mp4"


def test_ranges_of_media_are_served(http: httpx.Client) -> None:
    whole = http.get(f"{ITEMS}/0.png/media")
    part = http.get(f"{ITEMS}/0.png/media", headers={"Range": "bytes=10-19"})
    assert whole.headers["accept-ranges"] == "bytes"
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"


@pytest.mark.parametrize(
    "asked, expected", [("bytes=99999999-", (416, "range_not_satisfiable")), ("bytes=x", (400, "bad_request"))]
)
def test_ranges_that_cannot_be_served_are_refused(http: httpx.Client, asked: str, expected: tuple[int, str]) -> None:
    response = http.get(f"{ITEMS}/0.png/media", headers={"Range": asked})
    assert error_of(response) == expected


def test_a_media_file_that_changed_is_gone(http: httpx.Client, serving: Serving) -> None:
    path = serving.settings.home / "media" / "4.png"
    original = path.read_bytes()
    path.write_bytes(picture((1, 2, 3), size=50))
    try:
        assert error_of(http.get(f"{ITEMS}/4.png/media")) == (410, "missing_media")
        asked = {"adapter": "vqa", "question": "is it red", "image": {"gallery": "pictures", "item": "4.png"}}
        assert error_of(http.post("/v1/vqa", json=asked)) == (410, "missing_media")
    finally:
        path.write_bytes(original)
    assert http.get(f"{ITEMS}/4.png/thumbnail").status_code == 200
