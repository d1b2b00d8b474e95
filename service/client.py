"""A typed client of the HTTP API.

with Client("http://127.0.0.1:8000") as bank:
    bank.vqa("vqa", "what colour is the ball?", image="ball.jpg").answer
    bank.retrieve("clips", text="a dog catches a ball", k=5, rerank="frames").hits
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, JsonValue, ValidationError

from adapters.package import pack_tar
from adapters.registry import DEFAULT_ALIAS, UNSET, Expect
from adapters.registry.rules import Unset
from service.config import CLIENT_KEY_VARIABLE
from service.http.operator_schemas import (
    AliasReply,
    AuditLine,
    AuditReply,
    DeletedGalleryReply,
    OperationReply,
    OperationsReply,
    ReplicasReply,
    UnloadReply,
)
from service.http.schemas import (
    AdapterDetails,
    AdaptersReply,
    AdapterVersionReply,
    CaptionReply,
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
TAR_TYPE = "application/x-tar"
POLL_S = 0.5
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
    `api_key` is for servers that want one; without it the variable BANK_API_KEY is asked.
    """

    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        key = (os.environ.get(CLIENT_KEY_VARIABLE, "") if api_key is None else api_key).strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s + GRACE_S)

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
        audio: MediaInput | None = None,
        decode: GenerateOptions | RankOptions | None = None,
        timeout_s: float | None = None,
    ) -> VqaReply:
        """Ask about a picture, a clip or a sound: exactly one of `image`, `video` and `audio`."""
        fields: dict[str, JsonValue] = {"adapter": adapter, "question": question}
        if decode is not None:
            fields["decode"] = decode.model_dump(mode="json")
        kind, media = _one_medium(image=image, video=video, audio=audio)
        if isinstance(media, GalleryMediaRef):
            return self._send(VqaReply, "/v1/vqa", timeout_s, json=fields | {kind: media.model_dump()})
        return self._send(VqaReply, "/v1/vqa", timeout_s, **_form(fields, kind, media))

    def caption(
        self,
        adapter: str,
        *,
        image: MediaInput | None = None,
        video: MediaInput | None = None,
        audio: MediaInput | None = None,
        decode: GenerateOptions | None = None,
        timeout_s: float | None = None,
    ) -> CaptionReply:
        """Put a picture, a clip or a sound into words: exactly one of `image`, `video` and `audio`."""
        fields: dict[str, JsonValue] = {"adapter": adapter}
        if decode is not None:
            fields["decode"] = decode.model_dump(mode="json")
        kind, media = _one_medium(image=image, video=video, audio=audio)
        if isinstance(media, GalleryMediaRef):
            return self._send(CaptionReply, "/v1/caption", timeout_s, json=fields | {kind: media.model_dump()})
        return self._send(CaptionReply, "/v1/caption", timeout_s, **_form(fields, kind, media))

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

    def adapter(self, name: str) -> AdapterDetails:
        """One adapter with its versions and aliases."""
        return AdapterDetails.model_validate_json(self.download(f"/v1/adapters/{_quoted(name)}"))

    # --- deploying ---------------------------------------------------------------------------------------

    def push(self, package: str | os.PathLike[str], name: str) -> OperationReply:
        """Push the package in a folder, or the one at a URL that the service may fetch from. The operation is its validation.

        Raises: InvalidPackage for a folder that is no package.
        """
        if "://" in str(package):
            path = f"/v1/adapters/{_quoted(name)}"
            return self._request(OperationReply, "PUT", path, json={"source": str(package)})
        with tempfile.TemporaryFile() as file:
            pack_tar(package, file)
            file.seek(0)
            return self._request(
                OperationReply, "PUT", f"/v1/adapters/{_quoted(name)}", content=file, headers={"Content-Type": TAR_TYPE}
            )

    def promote(
        self,
        name: str,
        version: int,
        *,
        alias: str = DEFAULT_ALIAS,
        expect: Expect = UNSET,
        traffic: float | None = None,
        migrate: bool = True,
        force: bool = False,
        timeout_s: float | None = None,
        reason: str | None = None,
        key: str | None = None,
    ) -> OperationReply:
        """Let an alias serve a version; with `traffic`, a share of it. `expect`: the version that must be there now, None for none.

        `key` names the request: sent again with it, nothing is done again.
        """
        fields: dict[str, JsonValue] = {"version": version, "migrate": migrate, "force": force}
        fields |= _given(expect=expect, traffic=traffic, timeout_s=timeout_s, reason=reason)
        return self._request(OperationReply, "POST", _alias_path(name, alias), json=fields, headers=_named(key))

    def roll_back(
        self,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expect: Expect = UNSET,
        reason: str | None = None,
        key: str | None = None,
    ) -> OperationReply:
        """Leave the version an alias names (`expect`, to be sure) for the one before, at once."""
        path = f"{_alias_path(name, alias)}/rollback"
        return self._request(
            OperationReply, "POST", path, json=_given(expect=expect, reason=reason), headers=_named(key)
        )

    def end_canary(
        self, name: str, *, alias: str = DEFAULT_ALIAS, expect: int | None = None, reason: str | None = None
    ) -> AliasReply:
        """Take a canary's share back."""
        query = {key: value for key, value in {"expect": expect, "reason": reason}.items() if value is not None}
        return self._request(AliasReply, "DELETE", f"{_alias_path(name, alias)}/canary", params=query)

    def retire(self, name: str, version: int, *, reason: str | None = None) -> AdapterVersionReply:
        """Take a version out of service."""
        return self._request(
            AdapterVersionReply, "POST", f"{_version_path(name, version)}/retire", json=_given(reason=reason)
        )

    def reinstate(self, name: str, version: int, *, reason: str | None = None) -> AdapterVersionReply:
        """Bring a retired version back."""
        return self._request(
            AdapterVersionReply, "POST", f"{_version_path(name, version)}/reinstate", json=_given(reason=reason)
        )

    def delete(self, name: str, version: int, *, reason: str | None = None) -> UnloadReply:
        """Give a version up for good; what became free on the server that answered."""
        query = {} if reason is None else {"reason": reason}
        return self._request(UnloadReply, "DELETE", _version_path(name, version), params=query)

    def unload(self, name: str, version: int) -> UnloadReply:
        """Free what a version takes on the server that answers. It stays in service."""
        return self._request(UnloadReply, "POST", f"{_version_path(name, version)}/unload")

    def operations(self) -> list[OperationReply]:
        """Operations under way and lately ended, the latest first."""
        return self._request(OperationsReply, "GET", "/v1/operations").operations

    def operation(self, operation_id: str) -> OperationReply:
        """How an operation stands."""
        return self._request(OperationReply, "GET", f"/v1/operations/{_quoted(operation_id)}")

    def abort(self, operation_id: str, *, reason: str | None = None) -> OperationReply:
        """End a rollout before its commit."""
        query = {} if reason is None else {"reason": reason}
        return self._request(OperationReply, "DELETE", f"/v1/operations/{_quoted(operation_id)}", params=query)

    def wait(
        self,
        operation_id: str,
        *,
        timeout_s: float = 3600.0,
        report: Callable[[OperationReply], None] | None = None,
    ) -> OperationReply:
        """Wait until an operation ended, well or not. Raises: TimeoutError; it goes on all the same."""
        end = time.monotonic() + timeout_s
        while True:
            operation = self.operation(operation_id)
            if report is not None:
                report(operation)
            if operation.status != "running":
                return operation
            if time.monotonic() > end:
                raise TimeoutError(f"operation {operation_id} still runs after {timeout_s:g} s")
            time.sleep(POLL_S)

    def audit(self, *, limit: int = 100) -> list[AuditLine]:
        """Who changed what, when and why; the latest first."""
        return self._request(AuditReply, "GET", "/v1/audit", params={"limit": limit}).lines

    def replicas(self) -> ReplicasReply:
        """The servers of the registry, and where it stands."""
        return self._request(ReplicasReply, "GET", "/v1/replicas")

    # --- galleries ---------------------------------------------------------------------------------------

    def galleries(self) -> list[GalleryDetails]:
        """All galleries that can be searched."""
        return GalleriesReply.model_validate_json(self.download("/v1/galleries")).galleries

    def gallery(self, name: str) -> GalleryDetails:
        """One gallery: the version that is searched, and which others there are."""
        return self._request(GalleryDetails, "GET", f"/v1/galleries/{_quoted(name)}")

    def build_gallery(
        self,
        name: str,
        source: str | os.PathLike[str],
        adapter: str,
        *,
        pooling: str = "mean",
        index: str = "flat",
        copy_media: bool = False,
        key: str | None = None,
    ) -> OperationReply:
        """Let a gallery be built from a folder or manifest of the server's, and go live. `key` as in `promote`."""
        fields: dict[str, JsonValue] = {"source": os.fspath(source), "adapter": adapter}
        fields |= {"pooling": pooling, "index": index, "copy_media": copy_media}
        path = f"/v1/galleries/{_quoted(name)}/builds"
        return self._request(OperationReply, "POST", path, json=fields, headers=_named(key))

    def rebuild_gallery(self, name: str, *, adapter: str | None = None, key: str | None = None) -> OperationReply:
        """Let what a gallery holds be embedded anew, by default with what the alias it follows names now, and go live."""
        path = f"/v1/galleries/{_quoted(name)}/rebuild"
        return self._request(OperationReply, "POST", path, json=_given(adapter=adapter), headers=_named(key))

    def delete_gallery(self, name: str, *, expect: int | None = None, reason: str | None = None) -> DeletedGalleryReply:
        """Give a gallery up with all its versions. `expect`: the version that must be live now."""
        query = {key: value for key, value in {"expect": expect, "reason": reason}.items() if value is not None}
        return self._request(DeletedGalleryReply, "DELETE", f"/v1/galleries/{_quoted(name)}", params=query)

    def delete_gallery_version(self, name: str, version: int, *, reason: str | None = None) -> DeletedGalleryReply:
        """Give one version up that is not live."""
        query = {} if reason is None else {"reason": reason}
        path = f"/v1/galleries/{_quoted(name)}/versions/{version}"
        return self._request(DeletedGalleryReply, "DELETE", path, params=query)

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
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is no path: the key is for this server alone")
        return _answered(self._http.get(path)).content

    def _request(self, schema: type[Reply], method: str, path: str, **arguments: Any) -> Reply:
        return schema.model_validate_json(_answered(self._http.request(method, path, **arguments)).content)

    def _send(self, schema: type[Reply], path: str, timeout_s: float | None, **body: Any) -> Reply:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        headers = {"X-Request-Timeout-Ms": str(max(1, math.ceil(1000 * seconds)))}
        response = self._http.post(path, headers=headers, timeout=seconds + GRACE_S, **body)
        return schema.model_validate_json(_answered(response).content)


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _alias_path(name: str, alias: str) -> str:
    return f"/v1/adapters/{_quoted(name)}/aliases/{_quoted(alias)}"


def _version_path(name: str, version: int) -> str:
    return f"/v1/adapters/{_quoted(name)}/versions/{version}"


def _named(key: str | None) -> dict[str, str]:
    """The header that names a request."""
    return {} if key is None else {"Idempotency-Key": key}


def _given(*, expect: Expect = UNSET, **fields: JsonValue) -> dict[str, JsonValue]:
    """Fields that say something; None of `expect` does."""
    given: dict[str, JsonValue] = {name: value for name, value in fields.items() if value is not None}
    if not isinstance(expect, Unset):
        given["expect"] = expect
    return given


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
