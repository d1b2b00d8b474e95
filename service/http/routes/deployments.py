"""/v1/adapters for operators: push, promote, roll back, retire, delete. What takes long answers 202 with an operation."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Body, Depends, Header, Query, Request
from pydantic import ValidationError

from adapters import errors as adapter_errors
from adapters.artifacts import fetch_package
from adapters.config import check_name
from adapters.package import unpack_tar
from adapters.registry.references import check_alias
from service import errors as service_errors
from service.config import MIB, Settings
from service.folders import push_folder
from service.http.dependencies import ExchangeDep, RuntimeDep, known_adapter
from service.http.errors import WRONG_CONTENT_TYPE, RefusedRequest, invalid_body, responses
from service.http.operator_schemas import (
    AliasReply,
    ExpectedVersion,
    OperationReply,
    PackageSource,
    PromoteRequest,
    Reason,
    ReasonRequest,
    RollbackRequest,
    UnloadReply,
)
from service.http.routes.adapters import tiers
from service.http.schemas import AdapterVersionReply
from service.runtime import Runtime

T = TypeVar("T")

router = APIRouter(prefix="/v1/adapters", tags=["deployment"], dependencies=[Depends(known_adapter)])

TAR_TYPES = ("application/x-tar", "application/octet-stream")
MAX_DRAIN_S = 300.0
MAX_SOURCE_BYTES = 16_384

IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=200, description="Sent again, nothing is done again."),
]
WRITES = (
    adapter_errors.InvalidReference,
    adapter_errors.AdapterNotFound,
    adapter_errors.Conflict,
    adapter_errors.RegistryUnavailable,
    adapter_errors.RegistryLost,
)


@router.put(
    "/{name}",
    status_code=202,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in TAR_TYPES},
                "application/json": {"schema": {"$ref": "#/components/schemas/PackageSource"}},
            },
        }
    },
    responses=responses(
        *WRITES,
        adapter_errors.InvalidPackage,
        adapter_errors.UnsafePath,
        adapter_errors.TensorMismatch,
        adapter_errors.NonFiniteTensor,
        adapter_errors.ArtifactUnavailable,
        service_errors.TooLarge,
        service_errors.InsufficientRoom,
        WRONG_CONTENT_TYPE,
    ),
)
async def push(name: str, request: Request, runtime: RuntimeDep, exchange: ExchangeDep) -> OperationReply:
    """Push a package: an uncompressed tar of its files, or `{"source": URL}` of a kind that the operator allows.

    It is staged, and served by nobody until its validation succeeded.
    The same package again is the same version; one that had failed is validated again.
    """
    check_name(name)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (*TAR_TYPES, "application/json"):
        message = f"send {TAR_TYPES[0]}, or application/json with a source"
        raise RefusedRequest(message, rule=WRONG_CONTENT_TYPE, param="Content-Type")
    limit = runtime.settings.max_package_mib * MIB
    with _refusing_what_does_not_fit(), push_folder(runtime.settings.home) as folder:
        archive, package = folder / "package.tar", folder / "package"
        if content_type == "application/json":
            source = await _read_source(request, runtime.settings)
            await to_thread.run_sync(partial(fetch_package, source, package, max_bytes=limit))
        else:
            with archive.open("wb") as file:
                async for chunk in request.stream():
                    await to_thread.run_sync(file.write, chunk)
            await to_thread.run_sync(_unpack, archive, package, limit)
        record = await _call(partial(runtime.deployments.push, package, name, actor=exchange.context.client))
    await runtime.loader.refresh()
    return OperationReply.of(runtime.deployments.of_version(record))


@contextmanager
def _refusing_what_does_not_fit() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise service_errors.InsufficientRoom(f"there is no room for the package here: {error.strerror}") from error


async def _read_source(request: Request, settings: Settings) -> str:
    """The URL a package shall be fetched from. Raises: RefusedRequest, also for a scheme that is not allowed."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_SOURCE_BYTES:
            raise service_errors.TooLarge(f"the JSON is larger than {MAX_SOURCE_BYTES} bytes")
    try:
        source = PackageSource.model_validate_json(bytes(body)).source
    except ValidationError as error:
        raise invalid_body(error) from error
    scheme = source.partition("://")[0].lower()
    if "://" not in source or scheme not in settings.package_schemes():
        allowed = ", ".join(f"{name}://" for name in settings.package_schemes()) or "none"
        raise RefusedRequest(f"packages are fetched from {allowed} here (BANK_PACKAGE_SOURCES)", param="source")
    return source


def _unpack(archive: Path, package: Path, max_bytes: int) -> None:
    with archive.open("rb") as file:
        unpack_tar(file, package, max_bytes=max_bytes)


@router.post("/{name}/aliases/{alias}", status_code=202, responses=responses(*WRITES))
async def promote(
    name: str,
    alias: str,
    wanted: PromoteRequest,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    key: IdempotencyKey = None,
) -> OperationReply:
    """Let an alias serve a version, or give the version a share as a canary."""
    operation = await _call(
        partial(
            runtime.deployments.promote,
            name,
            wanted.version,
            alias=check_alias(alias),
            expect=wanted.expected,
            traffic=wanted.traffic,
            migrate=wanted.migrate,
            force=wanted.force,
            timeout_s=wanted.timeout_s,
            reason=wanted.reason,
            actor=exchange.context.client,
            key=key,
        )
    )
    await runtime.loader.refresh()
    return OperationReply.of(operation)


@router.post("/{name}/aliases/{alias}/rollback", responses=responses(*WRITES))
async def roll_back(
    name: str,
    alias: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    wanted: Annotated[RollbackRequest | None, Body()] = None,
    key: IdempotencyKey = None,
) -> OperationReply:
    """Leave the version an alias names for the one it named before, at once, galleries with it.

    Say in `expect` which version to leave: then a request that is sent twice goes back once.
    """
    wanted = wanted or RollbackRequest()
    operation = await _call(
        partial(
            runtime.deployments.roll_back,
            name,
            alias=check_alias(alias),
            expect=wanted.expected,
            reason=wanted.reason,
            actor=exchange.context.client,
            key=key,
        )
    )
    await runtime.loader.refresh()
    return OperationReply.of(operation)


@router.delete("/{name}/aliases/{alias}/canary", responses=responses(*WRITES))
async def end_canary(
    name: str,
    alias: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    expect: Annotated[ExpectedVersion, Query()] = None,
    reason: Annotated[Reason, Query()] = None,
) -> AliasReply:
    """Take a canary's share back. `expect`: the canary's version."""
    expected = {} if expect is None else {"expect": expect}
    record = await _call(
        partial(
            runtime.deployments.end_canary,
            name,
            alias=check_alias(alias),
            reason=reason,
            actor=exchange.context.client,
            **expected,
        )
    )
    await runtime.loader.refresh()
    return AliasReply.of(record)


@router.post("/{name}/versions/{version}/retire", responses=responses(*WRITES))
async def retire(
    name: str,
    version: int,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    wanted: Annotated[ReasonRequest | None, Body()] = None,
) -> AdapterVersionReply:
    """Take a version out of service. It may be reinstated."""
    reason = wanted.reason if wanted else None
    retired = partial(runtime.deployments.retire, name, version, reason=reason, actor=exchange.context.client)
    record = await _call(retired)
    await runtime.loader.refresh()
    return AdapterVersionReply.of(record, tiers(runtime)(record.weights_digest))


@router.post("/{name}/versions/{version}/reinstate", responses=responses(*WRITES))
async def reinstate(
    name: str,
    version: int,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    wanted: Annotated[ReasonRequest | None, Body()] = None,
) -> AdapterVersionReply:
    """Bring a retired version back."""
    reason = wanted.reason if wanted else None
    reinstated = partial(runtime.deployments.reinstate, name, version, reason=reason, actor=exchange.context.client)
    record = await _call(reinstated)
    await runtime.loader.refresh()
    return AdapterVersionReply.of(record, tiers(runtime)(record.weights_digest))


@router.delete("/{name}/versions/{version}", responses=responses(*WRITES))
async def delete(
    name: str,
    version: int,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    reason: Annotated[Reason, Query()] = None,
    drain_s: Annotated[
        float, Query(ge=0, le=MAX_DRAIN_S, description="How long to wait for requests that use it.")
    ] = 30.0,
) -> UnloadReply:
    """Give a version up for good, wait for the requests that use it here, and free what it took."""
    deleted = partial(runtime.deployments.delete, name, version, reason=reason, actor=exchange.context.client)
    record = await _call(deleted)
    await runtime.loader.refresh()
    return await _unload(runtime, record.weights_digest, drain_s)


@router.post("/{name}/versions/{version}/unload", responses=responses(*WRITES))
async def unload(
    name: str,
    version: int,
    runtime: RuntimeDep,
    drain_s: Annotated[
        float, Query(ge=0, le=MAX_DRAIN_S, description="How long to wait for requests that use it.")
    ] = 30.0,
) -> UnloadReply:
    """Free what a version takes on this replica. It stays in service: the next request that needs it loads it again."""
    record = runtime.loader.snapshot.version(check_name(name), version)
    return UnloadReply(freed_bytes=await runtime.loader.unload(record.weights_digest, timeout_s=drain_s))


async def _unload(runtime: Runtime, digest: str, drain_s: float) -> UnloadReply:
    """Free an adapter's weights unless another version that is served has the same."""
    if runtime.loader.snapshot.with_digest(digest):
        return UnloadReply(freed_bytes={"device": 0, "host": 0})
    return UnloadReply(freed_bytes=await runtime.loader.unload(digest, timeout_s=drain_s))


async def _call(work: Callable[[], T]) -> T:
    """Registry and artifacts block: in a thread, and to its end whatever becomes of the client."""
    return await to_thread.run_sync(work)
