import base64
import inspect
import json
import random
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from service.http import schemas
from service.http.schemas import (
    RetrieveRequest,
    UploadedMedia,
    VqaRequest,
    decode_base64,
    item_path,
    media_source,
)
from service.types import GalleryMedia, GenerateDecode, MediaBytes, RankDecode, VqaQuery

PICTURE = {"base64": base64.b64encode(b"bytes").decode()}
VQA = {"adapter": "vqa", "question": "what?", "image": PICTURE}
SEARCH: dict[str, Any] = {"gallery": "clips", "query": {"text": "a dog"}}

MODELS = [
    model
    for _, model in inspect.getmembers(schemas, inspect.isclass)
    if issubclass(model, BaseModel)
    and model.__module__ == schemas.__name__
    and not model.__name__.startswith("_")
    and model not in (schemas.Model, schemas.RequestModel)
]


def vqa(**changes: Any) -> VqaRequest:
    return VqaRequest.model_validate_json(json.dumps(VQA | changes))


def search(**changes: Any) -> RetrieveRequest:
    return RetrieveRequest.model_validate_json(json.dumps(SEARCH | changes))


def error_types(build: Any, **changes: Any) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        build(**changes)
    return {error["type"] for error in caught.value.errors()}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_has_examples_and_they_are_valid(model: type[BaseModel]) -> None:
    examples = model.model_json_schema()["examples"]
    assert examples
    for example in examples:
        model.model_validate_json(json.dumps(example))


def test_free_words_are_the_default() -> None:
    query = vqa().with_media(MediaBytes("image", b"x"))
    assert query == VqaQuery("vqa", "what?", MediaBytes("image", b"x"), GenerateDecode())


def test_ranking_takes_candidates() -> None:
    request = vqa(decode={"mode": "rank", "candidates": ["yes", "no"], "k": 1})
    assert request.with_media(GalleryMedia("g", "i")).decode == RankDecode(("yes", "no"), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": None},
        {"video": PICTURE},
        {"extra": 1},
        {"question": "a" * 100_001},
        {"adapter": ""},
        {"adapter": 7},
        {"image": {}},
        {"image": {"base64": "eHg=", "gallery": "g", "item": "i"}},
        {"image": {"gallery": "g"}},
        {"decode": {"mode": "guess"}},
        {"decode": {"mode": "generate", "k": 3}},
        {"decode": {"mode": "rank", "num_beams": 3}},
        {"decode": {"mode": "rank", "k": 0}},
        {"decode": {"mode": "rank", "candidates": []}},
        {"decode": {"mode": "generate", "num_beams": 0}},
        {"decode": {"mode": "generate", "num_beams": "3"}},
        {"decode": {"mode": "generate", "num_beams": True}},
    ],
)
def test_a_wrong_question_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        vqa(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"k": 2.5},
        {"query": {}},
        {"query": {"text": "a", "image": PICTURE}},
        {"query": {"text": "a" * 100_001}},
        {"rerank": "magic"},
        {"rerank": "match", "rerank_depth": 0},
        {"rerank_depth": 5},
        {"limit": 3},
    ],
)
def test_a_wrong_search_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        search(**changes)


@pytest.mark.parametrize(
    "media", ["https://example.org/a.png", {"url": "file:///etc/passwd"}, {"url": "x", "base64": "eA=="}]
)
def test_addresses_are_refused_as_such(media: Any) -> None:
    assert error_types(vqa, image=media) == {"media_url"}
    assert error_types(search, query={"image": media}) == {"media_url"}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 3 * 2**16 - 1, 3 * 2**16, 3 * 2**16 + 1, 500_000])
def test_base64_is_decoded_across_pieces(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert decode_base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "text",
    [
        "eA",
        "eA=",
        "e=A=",
        "eA==eA==",
        "eHh4\neHh4",
        "data:image/png;base64,eA==",
        "_-__",
        "ä===",
        "A" * 2**18 + "eA==" + "AAAA",
    ],
)
def test_what_is_not_strict_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        decode_base64(text)


def test_uploads_keep_their_kind() -> None:
    assert media_source("video", UploadedMedia(base64="eHh4")) == MediaBytes("video", b"xxx")


def test_item_ids_are_quoted_whole() -> None:
    assert (
        item_path("clips", "a/b c?#%.mp4", "media", 3)
        == "/v1/galleries/clips/items/a%2Fb%20c%3F%23%25.mp4/media?version=3"
    )
