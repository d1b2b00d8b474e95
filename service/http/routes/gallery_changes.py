"""/v1/galleries for operators: build, embed anew, delete. What takes long answers 202 with an operation."""

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Body, Path, Query

from adapters import errors as adapter_errors
from adapters.registry import UNSET
from service import errors as service_errors
from service.http.dependencies import ExchangeDep, PrincipalDep, RuntimeDep
from service.http.errors import responses
from service.http.operator_schemas import (
    BuildRequest,
    DeletedGalleryReply,
    ExpectedVersion,
    OperationReply,
    Reason,
    RebuildRequest,
)
from service.http.routes.deployments import IdempotencyKey
from service.lifecycle.jobs import JobArguments

router = APIRouter(prefix="/v1/galleries", tags=["deployment"])

CHANGES = (
    adapter_errors.InvalidReference,
    service_errors.GalleryNotFound,
    adapter_errors.Conflict,
    adapter_errors.RegistryUnavailable,
    adapter_errors.RegistryLost,
)
EMBEDS = (*CHANGES, adapter_errors.AdapterNotFound, service_errors.BadQuery)


@router.post(
    "/{name}/builds",
    status_code=202,
    responses=responses(*EMBEDS, adapter_errors.UnsafePath, adapter_errors.ConversionError),
)
async def build(
    name: str,
    wanted: BuildRequest,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    principal: PrincipalDep,
    key: IdempotencyKey = None,
) -> OperationReply:
    """Embed a folder or a manifest of the server's, and make it live. The gallery follows the alias that `adapter` names.

    The same build that is under way already is answered again; another one of the gallery is a 409.
    """
    folders = tuple(str(folder) for folder in runtime.settings.source_folders)
    arguments = JobArguments(within=folders, **wanted.model_dump())
    operation = await to_thread.run_sync(
        partial(
            runtime.deployments.build_gallery,
            name,
            arguments,
            principal=principal,
            actor=exchange.context.client,
            key=key,
        )
    )
    await runtime.loader.refresh()
    return OperationReply.of(operation)


@router.post("/{name}/rebuild", status_code=202, responses=responses(*EMBEDS))
async def rebuild(
    name: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    principal: PrincipalDep,
    wanted: Annotated[RebuildRequest | None, Body()] = None,
    key: IdempotencyKey = None,
) -> OperationReply:
    """Embed what the live version holds anew, and make that live. Without an adapter: with the one the gallery goes with."""
    operation = await to_thread.run_sync(
        partial(
            runtime.deployments.rebuild_gallery,
            name,
            wanted.adapter if wanted else None,
            principal=principal,
            actor=exchange.context.client,
            key=key,
        )
    )
    await runtime.loader.refresh()
    return OperationReply.of(operation)


@router.delete("/{name}", responses=responses(*CHANGES))
async def delete(
    name: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    principal: PrincipalDep,
    expect: Annotated[ExpectedVersion, Query()] = None,
    reason: Annotated[Reason, Query()] = None,
) -> DeletedGalleryReply:
    """Give a gallery up with all its versions. Searches under way finish; files go after a day. `expect`: the live version."""
    records = await to_thread.run_sync(
        partial(
            runtime.deployments.delete_gallery,
            name,
            expect=UNSET if expect is None else expect,
            reason=reason,
            principal=principal,
            actor=exchange.context.client,
        )
    )
    await runtime.loader.refresh()
    return DeletedGalleryReply(name=name, versions=[record.version for record in records])


@router.delete("/{name}/versions/{version}", responses=responses(*CHANGES))
async def delete_version(
    name: str,
    version: Annotated[int, Path(ge=1)],
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    principal: PrincipalDep,
    reason: Annotated[Reason, Query()] = None,
) -> DeletedGalleryReply:
    """Give one version up. One that is searched is a 409."""
    record = await to_thread.run_sync(
        partial(
            runtime.deployments.delete_gallery_version,
            name,
            version,
            reason=reason,
            principal=principal,
            actor=exchange.context.client,
        )
    )
    await runtime.loader.refresh()
    return DeletedGalleryReply(name=name, versions=[record.version])
