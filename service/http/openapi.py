"""What OpenAPI cannot see by itself: bodies that handlers read themselves, as JSON or as a form."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.bodies import FORM_FIELD
from service.http.schemas import REQUESTS

_REF_TEMPLATE = "#/components/schemas/{model}"


def request_body(body: type[BaseModel], fields: type[BaseModel]) -> dict[str, Any]:
    """The `requestBody` of a route that takes `body` as JSON, or `fields` in a form beside one file."""
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {FORM_FIELD: _ref(fields), "image": file, "video": file},
        "required": [FORM_FIELD],
        "oneOf": [{"required": ["image"]}, {"required": ["video"]}],
    }
    content = {
        "application/json": {"schema": _ref(body)},
        "multipart/form-data": {"schema": form, "encoding": {FORM_FIELD: {"contentType": "application/json"}}},
    }
    return {"requestBody": {"required": True, "content": content}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF_TEMPLATE.format(model=model.__name__)}


def describe(app: FastAPI) -> dict[str, Any]:
    """The API's OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        _, definitions = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=_REF_TEMPLATE)
        schemas = document["components"]["schemas"]
        document["components"]["schemas"] = dict(sorted((schemas | definitions["$defs"]).items()))
        app.openapi_schema = document
    return app.openapi_schema
