"""Request bodies -> queries: JSON with media inside, or a multipart form with a JSON field and a file.

What grows with the upload (parsing, base64) runs in threads, in pieces: the event loop goes on meanwhile. What is small does not:
the way to a thread and back takes longer.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from anyio import to_thread
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import TooLarge
from service.http.errors import WRONG_CONTENT_TYPE, RefusedRequest, invalid_body
from service.http.schemas import (
    CaptionFields,
    CaptionRequest,
    GalleryMediaRef,
    RetrieveFields,
    RetrieveRequest,
    UploadedMedia,
    VqaFields,
    VqaRequest,
    media_source,
)
from service.types import CaptionQuery, MediaBytes, MediaKind, MediaSource, RetrieveQuery, TextQuery, VqaQuery

FORM_FIELD = "request"
VISIBLE: tuple[MediaKind, ...] = ("image", "video")
ANY_MEDIUM: tuple[MediaKind, ...] = (*VISIBLE, "audio")
MAX_JSON_PARTS = 100_000  # fields and elements: parsing them takes much memory, and holds the interpreter lock
MAX_LISTED_ERRORS = 1_000
PARSED_BY_THREADS_BYTES = 16 * 1024  # parsing so much takes some 0.08 ms, a thread 0.06 to 0.2

Query = TypeVar("Query")
Schema = TypeVar("Schema", bound=BaseModel)


async def read_vqa(request: Request, *, max_bytes: int) -> VqaQuery:
    """The body of POST /vqa. Raises: RefusedRequest."""
    return await _read(request, _vqa_from_json, _vqa_from_form, max_bytes, ANY_MEDIUM)


async def read_caption(request: Request, *, max_bytes: int) -> CaptionQuery:
    """The body of POST /caption. Raises: RefusedRequest."""
    return await _read(request, _caption_from_json, _caption_from_form, max_bytes, ANY_MEDIUM)


async def read_retrieve(request: Request, *, max_bytes: int) -> RetrieveQuery:
    """The body of POST /retrieve. Raises: RefusedRequest."""
    return await _read(request, _retrieve_from_json, _retrieve_from_form, max_bytes, VISIBLE)


def _vqa_from_json(body: bytearray) -> VqaQuery:
    parsed = _parse(VqaRequest, body)
    assert parsed.medium is not None, "the schema demands a medium. This is a bug."
    return parsed.with_media(_source(*parsed.medium))


def _vqa_from_form(field: bytes, media: MediaBytes) -> VqaQuery:
    return _parse(VqaFields, field, FORM_FIELD).with_media(media)


def _caption_from_json(body: bytearray) -> CaptionQuery:
    parsed = _parse(CaptionRequest, body)
    assert parsed.medium is not None, "the schema demands a medium. This is a bug."
    return parsed.with_media(_source(*parsed.medium))


def _caption_from_form(field: bytes, media: MediaBytes) -> CaptionQuery:
    return _parse(CaptionFields, field, FORM_FIELD).with_media(media)


def _retrieve_from_json(body: bytearray) -> RetrieveQuery:
    parsed = _parse(RetrieveRequest, body)
    if parsed.query.text is not None:
        return parsed.with_query(TextQuery(parsed.query.text))
    assert parsed.query.medium is not None, "the schema demands a query. This is a bug."
    return parsed.with_query(_source(*parsed.query.medium, inside="query."))


def _retrieve_from_form(field: bytes, media: MediaBytes) -> RetrieveQuery:
    return _parse(RetrieveFields, field, FORM_FIELD).with_query(media)


def _parse(schema: type[Schema], text: bytes | bytearray, where: str = "") -> Schema:
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
        raise TooLarge(f"the JSON has more than {MAX_JSON_PARTS} fields and elements", param=where or None)
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        if error.error_count() > MAX_LISTED_ERRORS:
            raise RefusedRequest(f"{error.error_count()} fields are wrong", param=where or None) from error
        raise invalid_body(error, where) from error


def _source(kind: MediaKind, media: UploadedMedia | GalleryMediaRef, inside: str = "") -> MediaSource:
    try:
        return media_source(kind, media)
    except ValueError as error:
        message = f"not base64 of the standard alphabet, padded, without line breaks or a data: prefix ({error})"
        raise RefusedRequest(message, param=f"{inside}{kind}.base64") from error


async def _read(
    request: Request,
    from_json: Callable[[bytearray], Query],
    from_form: Callable[[bytes, MediaBytes], Query],
    max_bytes: int,
    kinds: tuple[MediaKind, ...],
) -> Query:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
        return await _parsed(partial(from_json, body), len(body))
    if content_type == "multipart/form-data":
        field, media = await _read_form(request, max_bytes, kinds)
        return await _parsed(partial(from_form, field, media), len(field))
    message = f"send application/json, or multipart/form-data with a field `{FORM_FIELD}` and a file {_any_of(kinds)}"
    raise RefusedRequest(message, rule=WRONG_CONTENT_TYPE, param="Content-Type")


async def _parsed(parse: Callable[[], Query], num_bytes: int) -> Query:
    """What comes of parsing so many bytes."""
    return parse() if num_bytes < PARSED_BY_THREADS_BYTES else await to_thread.run_sync(parse)


def _any_of(kinds: tuple[MediaKind, ...]) -> str:
    *others, last = (f"`{kind}`" for kind in kinds)
    return f"{', '.join(others)} or {last}"


async def _read_form(request: Request, max_bytes: int, kinds: tuple[MediaKind, ...]) -> tuple[bytes, MediaBytes]:
    """(the JSON field, the file). The field may come as a file too, which is how some clients give it a content type."""
    try:
        async with request.form(max_files=2, max_fields=2, max_part_size=max_bytes) as form:
            parts = form.multi_items()
            names = [name for name, _ in parts]
            kind = next((kind for kind in kinds if kind in names), kinds[0])
            for name in names:
                if name not in (FORM_FIELD, *kinds):
                    raise RefusedRequest("unknown part of the form", param=name[:64])
            if sorted(names) != sorted((FORM_FIELD, kind)):
                raise RefusedRequest(f"the form must have one part `{FORM_FIELD}` and one file {_any_of(kinds)}")
            field, media = form[FORM_FIELD], form[kind]
            if not isinstance(media, UploadFile):
                raise RefusedRequest("must be a file", param=kind)
            text = await field.read() if isinstance(field, UploadFile) else field.encode()
            return text, MediaBytes(kind, await media.read())
    except HTTPException as error:  # how the form parser says that the body is no form
        raise RefusedRequest(f"broken form: {error.detail}") from error
    except UnicodeError as error:  # of a charset that the form claims
        raise RefusedRequest("broken form: its text is not in the charset it names; send UTF-8") from error
