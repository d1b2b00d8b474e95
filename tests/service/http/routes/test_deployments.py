"""Operators over HTTP, by the typed client: what they push, promote and roll back, on a service of its own."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from adapters.config import AdapterConfig
from adapters.families.uniadapter import init_tensors
from adapters.package import read_package, write_package
from service.client import Client, ServiceError
from service.lifecycle.writing import write_probed_package
from tests.service.http.serving import Serving, serving_tiny


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The whole service, for tests that change it."""
    with serving_tiny(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def bank(serving: Serving) -> Iterator[Client]:
    with Client(serving.url) as client:
        yield client


def package(serving: Serving, folder: Path, seed: int, *, probed: bool = True) -> Path:
    """A package like the home's `vqa`, with other weights."""
    config: AdapterConfig = read_package(serving.settings.home / "packages" / "vqa").config
    backbone = serving.runtime.backbone
    generator = torch.Generator().manual_seed(seed)
    tensors = init_tensors(config, backbone.dims(), generator)
    tensors = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    if probed:
        write_probed_package(folder, config, tensors, "# new\n", backbone)
    else:
        write_package(folder, config, tensors, "# new\n", None)
    return folder


def push(bank: Client, serving: Serving, folder: Path, name: str, seed: int) -> int:
    """Push a good package; its version."""
    operation = bank.wait(bank.push(package(serving, folder, seed), name).id, timeout_s=60)
    assert (operation.status, operation.error) == ("succeeded", None)
    return operation.to_version


def test_a_pushed_package_is_validated_and_the_first_becomes_prod(
    bank: Client, serving: Serving, tmp_path: Path
) -> None:
    begun = bank.push(package(serving, tmp_path / "p", 1), "first")
    assert (begun.kind, begun.subject, begun.status) == ("validation", "first@1", "running")
    ended = bank.wait(begun.id, timeout_s=60)
    assert (ended.status, ended.phase) == ("succeeded", "ready")
    assert bank.adapter("first").aliases == {"prod": 1}
    assert bank.vqa("first", "what is this?", image=_picture()).adapter.version == 1
    again = bank.push(tmp_path / "p", "first")
    assert (again.id, again.status) == (begun.id, "succeeded")


def test_a_package_that_fails_its_validation_serves_nobody_and_says_why(
    bank: Client, serving: Serving, tmp_path: Path
) -> None:
    push(bank, serving, tmp_path / "good", "guarded", 2)
    begun = bank.push(package(serving, tmp_path / "bad", 3, probed=False), "guarded")
    ended = bank.wait(begun.id, timeout_s=60)
    assert ended.status == "failed" and "carries no probe" in (ended.error or "")
    assert bank.adapter("guarded").aliases == {"prod": 1}
    with pytest.raises(ServiceError) as caught:
        bank.promote("guarded", 2)
    assert (caught.value.status, caught.value.code) == (409, "conflict")
    assert "guarded@2 is failed" in caught.value.message


def test_promote_roll_back_and_what_is_told_of_it(bank: Client, serving: Serving, tmp_path: Path) -> None:
    for seed in (11, 12):
        push(bank, serving, tmp_path / str(seed), "moved", seed)
    begun = bank.promote("moved", 2, expect=1, reason="better", key="deploy-17")
    assert bank.promote("moved", 2, expect=1, reason="better", key="deploy-17").id == begun.id
    ended = bank.wait(begun.id, timeout_s=60)
    assert (ended.kind, ended.status, ended.from_version, ended.to_version) == ("rollout", "succeeded", 1, 2)
    assert bank.vqa("moved", "what is this?", image=_picture()).adapter.version == 2
    with pytest.raises(ServiceError, match="names version 2, not version 1 as expected"):
        bank.promote("moved", 1, expect=1)
    back = bank.roll_back("moved", expect=2, reason="worse")
    assert (back.kind, back.status, back.to_version) == ("rollback", "succeeded", 1)
    assert bank.vqa("moved", "what is this?", image=_picture()).adapter.version == 1
    with pytest.raises(ServiceError, match="names version 1, not version 2 as expected"):
        bank.roll_back("moved", expect=2)
    lines = [line for line in bank.audit() if line.subject == "moved@prod"]
    assert [(line.action, line.reason) for line in lines[:2]] == [("roll_back", "worse"), ("set_alias", "better")]
    assert {begun.id, back.id} <= {operation.id for operation in bank.operations()}


def test_a_canary_and_its_end(bank: Client, serving: Serving, tmp_path: Path) -> None:
    for seed in (21, 22):
        push(bank, serving, tmp_path / str(seed), "tried", seed)
    begun = bank.promote("tried", 2, traffic=0.5)
    assert bank.wait(begun.id, timeout_s=60).kind == "canary"
    with httpx.Client(base_url=serving.url, timeout=30) as http:
        form = {"request": '{"adapter": "tried", "question": "what is this?"}'}
        answered = {
            http.post(
                "/vqa", data=form, files={"image": ("a.png", _picture())}, headers={"X-Routing-Key": str(number)}
            ).headers["x-adapter"]
            for number in range(16)
        }
    assert answered == {"tried@1", "tried@2"}
    assert bank.end_canary("tried", expect=2).canary is None
    with pytest.raises(ServiceError, match="no canary"):
        bank.end_canary("tried")


def test_retire_reinstate_unload_delete(bank: Client, serving: Serving, tmp_path: Path) -> None:
    for seed in (31, 32):
        push(bank, serving, tmp_path / str(seed), "leaving", seed)
    with pytest.raises(ServiceError, match="while prod names it"):
        bank.retire("leaving", 1)
    assert bank.retire("leaving", 2, reason="unused").status == "retired"
    assert bank.retire("leaving", 2).status == "retired"
    assert bank.reinstate("leaving", 2).status == "ready"
    bank.vqa("leaving@2", "what is this?", image=_picture())
    freed = bank.unload("leaving", 2).freed_bytes
    assert freed["host"] > 0 and freed["device"] > 0
    bank.vqa("leaving@2", "what is this?", image=_picture())
    assert bank.delete("leaving", 2).freed_bytes["host"] == freed["host"]
    with pytest.raises(ServiceError) as caught:
        bank.vqa("leaving@2", "what is this?", image=_picture())
    assert caught.value.status == 404
    assert [version.version for version in bank.adapter("leaving").versions] == [1]


def test_replicas_are_told_with_what_is_resident(bank: Client, serving: Serving) -> None:
    told = bank.replicas()
    (replica,) = [replica for replica in told.replicas if replica.id == serving.runtime.replica_id]
    assert replica.is_alive and replica.is_serving and replica.generation <= told.generation
    assert set(replica.details) >= {"url", "device", "backbone", "resident"}


@pytest.mark.parametrize("operation", ["nothing", "validation-nobody@1", "validation-vqa@99", "validation-../x@1"])
def test_operations_nobody_knows_are_not_found(bank: Client, operation: str) -> None:
    with pytest.raises(ServiceError) as caught:
        bank.operation(operation)
    assert caught.value.status in (404, 422)


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def linked() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("adapter_config.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"no tar", "application/x-tar", 422, "invalid_package"),
        (archive(**{"evil.pkl": b"x"}), "application/x-tar", 422, "invalid_package"),
        (archive(**{"../adapter_config.json": b"{}"}), "application/x-tar", 422, "unsafe_path"),
        (linked(), "application/x-tar", 422, "unsafe_path"),
        (b"{}", "text/plain", 415, "unsupported_content_type"),
        (b"", "application/x-tar", 422, "invalid_package"),
    ],
)
def test_what_is_no_package_is_refused_and_leaves_nothing(
    serving: Serving, body: bytes, content_type: str, status: int, code: str
) -> None:
    response = httpx.put(f"{serving.url}/v1/adapters/bad", content=body, headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert httpx.get(f"{serving.url}/v1/adapters/bad").status_code == 404
    assert not list(serving.settings.home.glob("adapter-bank-push-*"))


def test_a_package_is_fetched_from_where_the_operator_allows(bank: Client, serving: Serving, tmp_path: Path) -> None:
    url = f"file://{package(serving, tmp_path / 'far', 41)}"
    with pytest.raises(ServiceError, match="fetched from none here") as caught:
        bank.push(url, "far")
    assert (caught.value.status, caught.value.param) == (422, "source")
    allowed = serving.settings.model_copy(update={"package_sources": "s3, file"})
    serving.runtime.settings, settings = allowed, serving.runtime.settings
    try:
        ended = bank.wait(bank.push(url, "far").id, timeout_s=60)
        assert (ended.status, ended.subject) == ("succeeded", "far@1")
        with pytest.raises(ServiceError, match="holds no adapter_config"):
            bank.push(f"file://{tmp_path}", "far")
        for source in ("gs://bucket/x", "/etc", "file:/etc", "FILES://x", f"{url}::file://x"):
            response = httpx.put(f"{serving.url}/v1/adapters/far", json={"source": source})
            assert response.status_code == 422, source
    finally:
        serving.runtime.settings = settings
    for body in (b"{", b'{"source": 1}', b'{"source": "file:///x", "more": 1}'):
        sent = {"content": body, "headers": {"Content-Type": "application/json"}}
        assert httpx.put(f"{serving.url}/v1/adapters/far", **sent).status_code == 422


@pytest.mark.parametrize(
    "wanted",
    [{}, {"version": 0}, {"version": 1, "traffic": 1}, {"version": 1, "traffic": 0}, {"version": 1, "unknown": 1}],
)
def test_a_promotion_that_cannot_be_is_refused(serving: Serving, wanted: dict[str, object]) -> None:
    response = httpx.post(f"{serving.url}/v1/adapters/vqa/aliases/prod", json=wanted)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")


def _picture() -> bytes:
    from tests.service.http.tiny import picture

    return picture()
