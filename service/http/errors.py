"""The one place where errors become HTTP: a table from error class to status and code, and one body for all of them.

    {"error": {"code": "adapter_not_found", "message": "...", "param": "adapter", "request_id": "..."}}

A code is a promise: clients branch on it, so it never changes its meaning. Messages are for people.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adapters import errors as adapter_errors
from adapters.errors import AdapterBankError
from service import errors as service_errors
from service.http.schemas import MEDIA_URL, UNION_TAGS, ErrorBody, ErrorReply

MAX_NAMED_FIELDS = 5  # wrong fields an error message spells out
MAX_PARAM_CHARS = 200


@dataclass(frozen=True)
class Rule:
    """How a class of errors is answered. `retry_after_s`: when to come back, unless the error itself says so."""

    status: int
    code: str
    retry_after_s: float | None = None


# Every class of both trees has a row of its own (a test compares), except the root: an error without a row is a bug.
TABLE: Mapping[type[AdapterBankError], Rule] = {
    adapter_errors.InvalidReference: Rule(422, "invalid_reference"),
    adapter_errors.NotFound: Rule(404, "not_found"),
    adapter_errors.AdapterNotFound: Rule(404, "adapter_not_found"),
    adapter_errors.BackboneNotFound: Rule(404, "backbone_not_found"),
    adapter_errors.ArtifactNotFound: Rule(404, "artifact_not_found"),
    service_errors.GalleryNotFound: Rule(404, "gallery_not_found"),
    adapter_errors.Conflict: Rule(409, "conflict"),
    service_errors.GalleryBusy: Rule(409, "gallery_busy"),
    service_errors.IndexStale: Rule(409, "index_stale"),
    adapter_errors.InvalidPackage: Rule(422, "invalid_package"),
    adapter_errors.UnsafePath: Rule(422, "unsafe_path"),
    adapter_errors.TensorMismatch: Rule(422, "tensor_mismatch"),
    adapter_errors.NonFiniteTensor: Rule(422, "non_finite_tensor"),
    adapter_errors.DigestMismatch: Rule(422, "digest_mismatch"),
    adapter_errors.BackboneMismatch: Rule(422, "backbone_mismatch"),
    adapter_errors.ProbeFailed: Rule(422, "probe_failed"),
    adapter_errors.MissingPart: Rule(422, "missing_part"),
    adapter_errors.RankTooLarge: Rule(422, "rank_too_large"),
    adapter_errors.ConversionError: Rule(422, "conversion_error"),
    service_errors.Unauthenticated: Rule(401, "unauthenticated"),
    service_errors.Forbidden: Rule(403, "forbidden"),
    service_errors.BadQuery: Rule(422, "bad_query"),
    service_errors.BadMedia: Rule(422, "bad_media"),
    service_errors.UnsupportedMedia: Rule(422, "unsupported_media"),
    service_errors.CorruptMedia: Rule(422, "corrupt_media"),
    service_errors.MediaTimeout: Rule(422, "media_timeout"),
    service_errors.MediaTooLarge: Rule(413, "media_too_large"),
    service_errors.TooLarge: Rule(413, "too_large"),
    service_errors.MissingMedia: Rule(410, "missing_media"),
    service_errors.Overloaded: Rule(429, "overloaded", retry_after_s=1.0),
    service_errors.NoFreeSlot: Rule(429, "no_free_slot", retry_after_s=1.0),
    service_errors.InsufficientRoom: Rule(507, "insufficient_room"),
    service_errors.AdapterDamaged: Rule(503, "adapter_damaged", retry_after_s=30.0),
    service_errors.GalleryDamaged: Rule(503, "gallery_damaged", retry_after_s=30.0),
    service_errors.NotReady: Rule(503, "not_ready", retry_after_s=5.0),
    adapter_errors.ArtifactUnavailable: Rule(503, "artifact_unavailable", retry_after_s=5.0),
    adapter_errors.RegistryLost: Rule(503, "registry_lost", retry_after_s=10.0),
    adapter_errors.RegistryUnavailable: Rule(503, "registry_unavailable", retry_after_s=2.0),
    service_errors.DeadlineExceeded: Rule(504, "deadline_exceeded"),
    service_errors.EngineFailed: Rule(500, "engine_failed"),
}

INTERNAL = Rule(500, "internal")
# Problems only HTTP has.
INVALID_REQUEST = Rule(422, "invalid_request")
MEDIA_URL_REFUSED = Rule(422, "media_url_refused")
WRONG_CONTENT_TYPE = Rule(415, "unsupported_content_type")
FORWARDED = Rule(400, "forwarded_request")
FOREIGN_HOST = Rule(421, "foreign_host")
FOREIGN_ORIGIN = Rule(403, "foreign_origin")
# What the framework refuses; whatever is not here is named after its status.
FRAMEWORK_CODES: Mapping[int, str] = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    416: "range_not_satisfiable",
}


class RefusedRequest(AdapterBankError):
    """A request that HTTP itself makes wrong: its fields, headers or content type. Answered as it says."""

    def __init__(self, message: str, *, rule: Rule = INVALID_REQUEST, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.rule = rule


def rule_of(error: AdapterBankError) -> Rule:
    """The row of the error's class, or of the nearest class above that has one."""
    if isinstance(error, RefusedRequest):
        return error.rule
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), INTERNAL)


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """The answer to any error. What is not meant for clients is answered as `internal`, without a word about it."""
    headers: dict[str, str] = {}
    match error:
        case RequestValidationError():
            rule = INVALID_REQUEST
            message, param = describe_invalid([{**each, "loc": each["loc"][1:]} for each in error.errors()])
        case HTTPException():
            rule = Rule(error.status_code, FRAMEWORK_CODES.get(error.status_code, f"http_{error.status_code}"))
            message, param = str(error.detail), None
            headers.update(error.headers or {})
        case AdapterBankError() if (rule := rule_of(error)) is not INTERNAL:
            message, param = error.message, error.param
            if rule.status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if rule.retry_after_s is not None:
                headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after_s", rule.retry_after_s))))
        case _:
            rule, message, param = INTERNAL, "the server failed; its log has the reason under this request id", None
    body = ErrorBody(code=rule.code, message=message, param=param, request_id=request_id)
    return JSONResponse(ErrorReply(error=body).model_dump(), rule.status, headers)


def invalid_body(error: ValidationError, where: str = "") -> RefusedRequest:
    """A body (or its part `where`) that is not what a schema says, naming the wrong fields."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    prefix = (where,) if where else ()
    message, param = describe_invalid([{**each, "loc": (*prefix, *each["loc"])} for each in errors])
    is_address = any(each["type"] == MEDIA_URL for each in errors)
    return RefusedRequest(message, rule=MEDIA_URL_REFUSED if is_address else INVALID_REQUEST, param=param)


def describe_invalid(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(one line naming the wrong fields, path of the first)."""
    paths = [field_path(error["loc"]) for error in errors]
    lines = [f"{path or 'body'}: {error['msg']}" for path, error in zip(paths, errors, strict=True)]
    rest = len(lines) - MAX_NAMED_FIELDS
    message = "; ".join(lines[:MAX_NAMED_FIELDS]) + (f"; and {rest} more" if rest > 0 else "")
    return message, (paths[0] or None) if paths else None


def field_path(location: Sequence[str | int]) -> str:
    """("image", "uploaded media", "base64") -> "image.base64": without the variants of unions."""
    return ".".join(str(part) for part in location if part not in UNION_TAGS)[:MAX_PARAM_CHARS]


# What asking anything of a model may be answered with.
ASK_ERRORS: Sequence[type[AdapterBankError] | Rule] = (
    adapter_errors.InvalidReference,
    adapter_errors.AdapterNotFound,
    adapter_errors.MissingPart,
    adapter_errors.BackboneMismatch,
    adapter_errors.ArtifactUnavailable,
    service_errors.GalleryNotFound,
    service_errors.GalleryDamaged,
    service_errors.MissingMedia,
    service_errors.BadQuery,
    service_errors.UnsupportedMedia,
    service_errors.CorruptMedia,
    service_errors.MediaTooLarge,
    service_errors.TooLarge,
    service_errors.Overloaded,
    service_errors.NotReady,
    service_errors.EngineFailed,
    WRONG_CONTENT_TYPE,
)


def responses(*errors: type[AdapterBankError] | Rule) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the errors a route may answer: a description per status naming its codes, made from the table."""
    codes: dict[int, list[str]] = defaultdict(list)
    rules = [error if isinstance(error, Rule) else TABLE[error] for error in errors]
    for rule in (INVALID_REQUEST, INTERNAL, TABLE[service_errors.DeadlineExceeded], *rules):
        if rule.code not in codes[rule.status]:
            codes[rule.status].append(rule.code)
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": f"{HTTPStatus(status).phrase}: `{'`, `'.join(sorted(names))}`"}
        for status, names in sorted(codes.items())
    }
    return described | {
        "default": {"model": ErrorReply, "description": "Any other refusal, such as of a foreign host."}
    }
