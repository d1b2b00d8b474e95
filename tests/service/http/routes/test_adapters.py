import httpx


def test_adapters_are_listed_with_versions_and_aliases(http: httpx.Client) -> None:
    adapters = {adapter["name"]: adapter for adapter in http.get("/v1/adapters").json()["adapters"]}
    assert adapters.keys() == {"vqa", "retrieval"}
    vqa = adapters["vqa"]
    assert (vqa["tasks"], vqa["aliases"]) == (["vqa"], {"prod": 1})
    assert [(version["version"], version["status"], version["rank"]) for version in vqa["versions"]] == [
        (1, "ready", 4)
    ]


def test_one_adapter_is_described(http: httpx.Client) -> None:
    assert http.get("/v1/adapters/vqa").json()["name"] == "vqa"


def test_an_adapter_that_answered_is_on_the_device(http: httpx.Client) -> None:
    http.post("/v1/retrieve", json={"gallery": "texts", "query": {"text": "a red circle"}})
    assert http.get("/v1/adapters/retrieval").json()["versions"][0]["tier"] == "device"


def test_an_unknown_adapter_is_not_found(http: httpx.Client) -> None:
    response = http.get("/v1/adapters/nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


def test_a_name_that_cannot_be_is_refused(http: httpx.Client) -> None:
    response = http.get("/v1/adapters/No%20Body")
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_reference")
