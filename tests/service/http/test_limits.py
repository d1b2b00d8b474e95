import pytest
from starlette.datastructures import Headers

from service.http.errors import FOREIGN_HOST, FOREIGN_ORIGIN, FORWARDED, RefusedRequest, Rule
from service.http.limits import check_local, is_loopback

HOST = "127.0.0.1:8000"


@pytest.mark.parametrize(
    "url",
    [
        "//127.0.0.1",
        "//127.0.0.1:8000",
        "//localhost",
        "//LOCALHOST:80",
        "//[::1]:8000",
        "//127.8.8.8",
        "http://localhost:3000",
    ],
)
def test_this_machine_is_known_by_name_and_address(url: str) -> None:
    assert is_loopback(url)


@pytest.mark.parametrize(
    "url",
    [
        "//",
        "//example.org",
        "//localhost.example.org",
        "//127.0.0.1.example.org",
        "//0.0.0.0",
        "//10.0.0.1",
        "//[::2]",
        "//[::1",
        "//1.2",
        "null",
        "http://user@evil.org",
    ],
)
def test_other_machines_are_foreign(url: str) -> None:
    assert not is_loopback(url)


def test_a_local_request_passes() -> None:
    check_local(Headers({"host": HOST, "origin": "http://localhost:5173"}))


@pytest.mark.parametrize(
    "headers, rule",
    [
        ({"host": HOST, "forwarded": "for=1.2.3.4"}, FORWARDED),
        ({"host": HOST, "x-forwarded-for": "1.2.3.4"}, FORWARDED),
        ({"host": HOST, "x-forwarded-host": HOST}, FORWARDED),
        ({"host": "bank.example.org"}, FOREIGN_HOST),
        ({}, FOREIGN_HOST),
        ({"host": HOST, "origin": "https://example.org"}, FOREIGN_ORIGIN),
        ({"host": HOST, "origin": "null"}, FOREIGN_ORIGIN),
    ],
)
def test_a_borrowed_locality_is_refused(headers: dict[str, str], rule: Rule) -> None:
    with pytest.raises(RefusedRequest) as caught:
        check_local(Headers(headers))
    assert caught.value.rule == rule
