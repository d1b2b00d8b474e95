import inspect
import json
from types import ModuleType
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters import errors as adapter_errors
from adapters.errors import AdapterBankError, AdapterNotFound
from service import errors as service_errors
from service.errors import NotReady, Overloaded
from service.http.errors import INTERNAL, TABLE, RefusedRequest, error_response, invalid_body, responses, rule_of
from service.http.schemas import VqaRequest


def classes_of(module: ModuleType) -> set[type[AdapterBankError]]:
    return {
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, AdapterBankError) and cls.__module__ == module.__name__
    }


def body_of(response: Response) -> dict[str, Any]:
    whole: dict[str, dict[str, Any]] = json.loads(bytes(response.body))
    assert whole.keys() == {"error"}
    return whole["error"]


def test_every_error_of_both_trees_has_a_row() -> None:
    assert TABLE.keys() == (classes_of(adapter_errors) | classes_of(service_errors)) - {AdapterBankError}


def test_codes_are_unique_and_statuses_are_errors() -> None:
    assert len({rule.code for rule in TABLE.values()}) == len(TABLE)
    assert all(400 <= rule.status < 600 for rule in TABLE.values())


@pytest.mark.parametrize(
    "error, status",
    [
        (service_errors.Overloaded("", retry_after_s=1), 429),
        (service_errors.TooLarge(""), 413),
        (service_errors.MediaTooLarge(""), 413),
        (service_errors.DeadlineExceeded(""), 504),
        (service_errors.NotReady(""), 503),
        (service_errors.GalleryNotFound(""), 404),
        (service_errors.IndexStale(""), 409),
        (service_errors.MissingMedia(""), 410),
        (service_errors.UnsupportedMedia(""), 422),
        (adapter_errors.AdapterNotFound(""), 404),
        (adapter_errors.MissingPart(""), 422),
        (adapter_errors.BackboneMismatch(""), 422),
    ],
)
def test_statuses_are_the_documented_ones(error: AdapterBankError, status: int) -> None:
    assert rule_of(error).status == status


def test_a_subclass_without_a_row_is_answered_as_its_parent() -> None:
    class Renamed(AdapterNotFound):
        pass

    assert rule_of(Renamed("gone")) == TABLE[AdapterNotFound]


def test_the_body_names_code_message_param_and_request() -> None:
    response = error_response(AdapterNotFound("no adapter 'x'", param="adapter"), "id-1")
    assert response.status_code == 404
    assert body_of(response) == {
        "code": "adapter_not_found",
        "message": "no adapter 'x'",
        "param": "adapter",
        "request_id": "id-1",
    }


@pytest.mark.parametrize("seconds, header", [(0.01, "1"), (1.0, "1"), (2.1, "3")])
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, header: str) -> None:
    assert error_response(Overloaded("busy", retry_after_s=seconds), "").headers["retry-after"] == header


def test_not_ready_says_when_to_come_back() -> None:
    assert int(error_response(NotReady("starting"), "").headers["retry-after"]) >= 1


@pytest.mark.parametrize("error", [RuntimeError("secret"), AdapterBankError("secret"), KeyError("secret")])
def test_what_is_not_meant_for_clients_is_not_told(error: Exception) -> None:
    response = error_response(error, "id-1")
    assert response.status_code == INTERNAL.status
    assert body_of(response)["code"] == "internal"
    assert b"secret" not in bytes(response.body)


def test_the_framework_s_refusals_have_the_same_body() -> None:
    response = error_response(HTTPException(405, headers={"Allow": "GET"}), "")
    assert response.headers["allow"] == "GET"
    assert body_of(response)["code"] == "method_not_allowed"


def test_parameters_of_the_url_are_named_without_their_place() -> None:
    error = RequestValidationError([{"loc": ("query", "limit"), "msg": "too big", "type": "less_than"}])
    body = body_of(error_response(error, ""))
    assert (body["code"], body["param"], body["message"]) == ("invalid_request", "limit", "limit: too big")


def refused(text: str, where: str = "") -> RefusedRequest:
    with pytest.raises(ValidationError) as caught:
        VqaRequest.model_validate_json(text)
    return invalid_body(caught.value, where)


def test_a_wrong_field_is_named_by_its_path() -> None:
    error = refused('{"adapter": "a", "question": "q", "image": {"base64": ""}, "decode": {"mode": "rank", "k": 0}}')
    assert error.param == "decode.k"
    assert "image.base64: " in error.message


def test_a_wrong_field_of_a_form_is_named_below_its_part() -> None:
    assert refused('{"question": "q"}', "request").param == "request.adapter"


def test_many_wrong_fields_are_counted_not_listed() -> None:
    fields = ", ".join(f'"extra{i}": 1' for i in range(20))
    assert refused("{" + fields + "}").message.endswith("; and 17 more")


def test_openapi_lists_the_codes_of_each_status() -> None:
    described = responses(AdapterNotFound, service_errors.GalleryNotFound)
    assert described[404]["description"] == "Not Found: `adapter_not_found`, `gallery_not_found`"
    assert {422, 500, 504} <= described.keys()
