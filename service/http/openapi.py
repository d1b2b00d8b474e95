"""What OpenAPI cannot see by itself: bodies that handlers read themselves, as JSON or as a form, and who may call what."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.errors import Forbidden, Unauthenticated
from service.http.access import KEY_HEADER, OPEN, access_of
from service.http.bodies import FORM_FIELD, VISIBLE
from service.http.errors import TABLE
from service.http.operator_schemas import PackageSource
from service.http.schemas import REQUESTS, ErrorReply
from service.types import MediaKind

_REFUSED_WITH = (Unauthenticated, Forbidden)
_REF_TEMPLATE = "#/components/schemas/{model}"


def request_body(
    body: type[BaseModel], fields: type[BaseModel], kinds: Sequence[MediaKind] = VISIBLE
) -> dict[str, Any]:
    """The `requestBody` of a route that takes `body` as JSON, or `fields` in a form beside one file of these kinds."""
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {FORM_FIELD: _ref(fields)} | dict.fromkeys(kinds, file),
        "required": [FORM_FIELD],
        "oneOf": [{"required": [kind]} for kind in kinds],
    }
    content = {
        "application/json": {"schema": _ref(body)},
        "multipart/form-data": {"schema": form, "encoding": {FORM_FIELD: {"contentType": "application/json"}}},
    }
    return {"requestBody": {"required": True, "content": content}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF_TEMPLATE.format(model=model.__name__)}


def _say_who_may(document: dict[str, Any]) -> None:
    """Write into every operation which scope it needs, and how a request without it is refused."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": KEY_HEADER},
    }
    refusals = {str(rule.status): _refusal(rule.status, rule.code) for rule in map(TABLE.get, _REFUSED_WITH) if rule}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            access = access_of(method.upper(), path)
            operation["security"] = [] if access == OPEN else [{"bearer": []}, {"header": []}]
            if access is not None and access.scopes:
                operation["description"] += (
                    f"\n\nScope of the key: {' or '.join(f'`{scope}`' for scope in sorted(access.scopes))}."
                )
            if access != OPEN:
                operation["responses"] = dict(sorted((operation["responses"] | refusals).items()))


def _refusal(status: int, code: str) -> dict[str, Any]:
    schema = {"$ref": _REF_TEMPLATE.format(model=ErrorReply.__name__)}
    return {
        "description": f"{HTTPStatus(status).phrase}: `{code}`",
        "content": {"application/json": {"schema": schema}},
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The API's OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        models: list[type[BaseModel]] = [*REQUESTS, PackageSource]
        _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF_TEMPLATE)
        schemas = document["components"]["schemas"]
        document["components"]["schemas"] = dict(sorted((schemas | definitions["$defs"]).items()))
        _say_who_may(document)
        app.openapi_schema = document
    return app.openapi_schema
