import re
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from service.http.errors import INTERNAL, INVALID_REQUEST, TABLE, WRONG_CONTENT_TYPE
from tests.service.http.serving import Serving


@pytest.fixture(scope="module")
def document(serving: Serving) -> dict[str, Any]:
    loaded: dict[str, Any] = httpx.get(f"{serving.url}/openapi.json").json()
    return loaded


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r"'#/components/schemas/([^']+)'", str(document)))
    assert names and names <= document["components"]["schemas"].keys()


def test_every_model_has_an_example(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert [name for name, schema in schemas.items() if "properties" in schema and "examples" not in schema] == []


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    assert [name for name, operation in operations(document) if not operation.get("description")] == []


def test_unversioned_paths_are_the_versioned_ones(document: dict[str, Any]) -> None:
    for path in ("/vqa", "/caption", "/retrieve"):
        plain, versioned = document["paths"][path]["post"], document["paths"][f"/v1{path}"]["post"]
        assert plain | {"operationId": ""} == versioned | {"operationId": ""}


def test_bodies_come_as_json_or_as_a_form(document: dict[str, Any]) -> None:
    for path, schema, kinds in (
        ("/v1/vqa", "VqaRequest", {"image", "video", "audio"}),
        ("/v1/caption", "CaptionRequest", {"image", "video", "audio"}),
        ("/v1/retrieve", "RetrieveRequest", {"image", "video"}),
    ):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{schema}"}
        form = content["multipart/form-data"]["schema"]
        assert form["properties"].keys() == {"request"} | kinds
        assert form["oneOf"] == [{"required": [kind]} for kind in ("image", "video", "audio") if kind in kinds]


def test_described_codes_are_of_the_table(document: dict[str, Any]) -> None:
    rules = (*TABLE.values(), INVALID_REQUEST, INTERNAL, WRONG_CONTENT_TYPE)
    known = {(str(rule.status), rule.code) for rule in rules}
    for _, operation in operations(document):
        for status, reply in operation["responses"].items():
            if status != "default" and int(status) >= 400:
                codes = re.findall(r"`([a-z_]+)`", reply["description"])
                assert codes and {(status, code) for code in codes} <= known


def test_whatever_is_sent_is_answered_as_described(serving: Serving) -> None:
    described: Any = schemathesis.openapi.from_url(f"{serving.url}/openapi.json")

    def check(case: Any) -> None:
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ]
        )

    few = settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for operation in described.get_all_operations():
        few(given(case=operation.ok().as_strategy())(check))()
