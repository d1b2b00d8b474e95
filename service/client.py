"""A typed client of the HTTP API.

with Client("http://127.0.0.1:8000") as bank:
    bank.vqa("vqa", "what colour is the ball?", image="ball.jpg").answer
    bank.retrieve("clips", text="a dog catches a ball", k=5, rerank="frames").hits
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, JsonValue, ValidationError

from service.http.schemas import (
    AdapterDetails,
    AdaptersReply,
    ErrorReply,
    GalleriesReply,
    GalleryDetails,
    GalleryMediaRef,
    GenerateOptions,
    RankOptions,
    RetrieveReply,
    VqaReply,
)

DEFAULT_URL = "http://127.0.0.1:8000"
GRACE_S = 5.0  # how much longer than the deadline we wait for the server to say that it has passed

MediaInput = bytes | str | os.PathLike[str] | GalleryMediaRef
"""The bytes of a file, its path, or an item of a gallery."""

Reply = TypeVar("Reply", bound=BaseModel)


class ServiceError(Exception):
    """The server refused or failed. `code` says why, for programs; `retry_after_s` when to come back, if that helps."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class Client:
    """Talks to one server over kept connections. Use as a context manager, or `close`. Safe to share between threads.

    Every method raises `ServiceError` for what the server answers, and `httpx.TransportError` when it cannot be reached.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=url, timeout=timeout_s + GRACE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def vqa(
        self,
        adapter: str,
        question: str,
        *,
        image: MediaInput | None = None,
        video: MediaInput | None = None,
        decode: GenerateOptions | RankOptions | None = None,
        timeout_s: float | None = None,
    ) -> VqaReply:
        """Ask about a picture or a clip: exactly one of `image` and `video`."""
        fields: dict[str, JsonValue] = {"adapter": adapter, "question": question}
        if decode is not None:
            fields["decode"] = decode.model_dump(mode="json")
        kind, media = _one_medium(image=image, video=video)
        if isinstance(media, GalleryMediaRef):
            return self._send(VqaReply, "/v1/vqa", timeout_s, json=fields | {kind: media.model_dump()})
        return self._send(VqaReply, "/v1/vqa", timeout_s, **_form(fields, kind, media))

    def retrieve(
        self,
        gallery: str,
        *,
        text: str | None = None,
        image: MediaInput | None = None,
        video: MediaInput | None = None,
        k: int = 10,
        rerank: Literal["none", "frames", "match"] = "none",
        rerank_depth: int | None = None,
        adapter: str | None = None,
        timeout_s: float | None = None,
    ) -> RetrieveReply:
        """Search a gallery: exactly one of `text`, `image` and `video`."""
        fields: dict[str, JsonValue] = {
            "gallery": gallery,
            "k": k,
            "rerank": rerank,
            "rerank_depth": rerank_depth,
            "adapter": adapter,
        }
        if text is not None:
            if image is not None or video is not None:
                raise ValueError("give exactly one of text, image and video")
            return self._send(RetrieveReply, "/v1/retrieve", timeout_s, json=fields | {"query": {"text": text}})
        kind, media = _one_medium(image=image, video=video)
        if isinstance(media, GalleryMediaRef):
            return self._send(
                RetrieveReply, "/v1/retrieve", timeout_s, json=fields | {"query": {kind: media.model_dump()}}
            )
        return self._send(RetrieveReply, "/v1/retrieve", timeout_s, **_form(fields, kind, media))

    def adapters(self) -> list[AdapterDetails]:
        """All registered adapters."""
        return AdaptersReply.model_validate_json(self.download("/v1/adapters")).adapters

    def galleries(self) -> list[GalleryDetails]:
        """All galleries that can be searched."""
        return GalleriesReply.model_validate_json(self.download("/v1/galleries")).galleries

    def ready(self) -> bool:
        """Whether the server takes requests."""
        try:
            self.download("/health/ready")
        except ServiceError as error:
            if error.status == 503:
                return False
            raise
        return True

    def download(self, path: str) -> bytes:
        """The bytes behind a path of the server, such as a hit's `thumbnail` or `media`."""
        return _answered(self._http.get(path)).content

    def _send(self, schema: type[Reply], path: str, timeout_s: float | None, **body: Any) -> Reply:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        headers = {"X-Request-Timeout-Ms": str(max(1, math.ceil(1000 * seconds)))}
        response = self._http.post(path, headers=headers, timeout=seconds + GRACE_S, **body)
        return schema.model_validate_json(_answered(response).content)


def _one_medium(**given: MediaInput | None) -> tuple[str, MediaInput]:
    """(kind, medium) of the one that is not None. Raises: ValueError unless it is exactly one."""
    media = [(kind, medium) for kind, medium in given.items() if medium is not None]
    if len(media) != 1:
        raise ValueError(f"give exactly one of {' and '.join(given)}")
    return media[0]


def _form(fields: Mapping[str, JsonValue], kind: str, media: bytes | str | os.PathLike[str]) -> dict[str, Any]:
    """A multipart body, as arguments of httpx."""
    data = media if isinstance(media, bytes) else Path(media).read_bytes()
    return {"data": {"request": json.dumps(fields)}, "files": {kind: (kind, data, "application/octet-stream")}}


def _answered(response: httpx.Response) -> httpx.Response:
    """The response when it is an answer. Raises: ServiceError."""
    if response.is_success:
        return response
    wait = response.headers.get("Retry-After", "")
    retry_after_s = float(wait) if wait.isdecimal() else None
    try:
        error = ErrorReply.model_validate_json(response.content).error
    except ValidationError:  # from something in between, such as a proxy
        message = response.text[:200] or response.reason_phrase
        raise ServiceError(response.status_code, "unknown", message, retry_after_s=retry_after_s) from None
    raise ServiceError(
        response.status_code,
        error.code,
        error.message,
        param=error.param,
        request_id=error.request_id,
        retry_after_s=retry_after_s,
    )
