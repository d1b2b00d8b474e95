"""/v1/operations, /v1/audit, /v1/replicas: what is under way, what was done, who is there."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query

from adapters.errors import Conflict, NotFound, RegistryLost, RegistryUnavailable
from service.errors import Forbidden
from service.http.dependencies import ExchangeDep, PrincipalDep, RuntimeDep
from service.http.errors import responses
from service.http.operator_schemas import (
    AuditLine,
    AuditReply,
    OperationReply,
    OperationsReply,
    Reason,
    ReplicaReply,
    ReplicasReply,
)
from service.lifecycle.lifecycle import EXPIRY_S

router = APIRouter(prefix="/v1", tags=["deployment"])

AWAY = (RegistryUnavailable, RegistryLost)


@router.get("/operations", responses=responses(*AWAY))
async def list_operations(runtime: RuntimeDep, principal: PrincipalDep) -> OperationsReply:
    """Operations that are remembered: those under way, and those that ended within a day."""
    operations = await to_thread.run_sync(runtime.deployments.operations)
    visible = [operation for operation in operations if principal.allows(operation.adapter)]
    return OperationsReply(operations=[OperationReply.of(operation) for operation in visible])


@router.get("/operations/{operation}", responses=responses(NotFound, *AWAY))
async def get_operation(operation: str, runtime: RuntimeDep, principal: PrincipalDep) -> OperationReply:
    """How an operation stands."""
    try:
        found = await to_thread.run_sync(runtime.deployments.operation, operation)
    except NotFound:  # which may name adapters that are hidden
        raise NotFound(f"no operation {operation[:64]!r}", param="operation") from None
    if not principal.allows(found.adapter):
        raise Forbidden("this key may not use the adapter of this operation", reason="pattern", param="operation")
    return OperationReply.of(found)


@router.delete("/operations/{operation}", responses=responses(NotFound, Conflict, *AWAY))
async def abort_operation(
    operation: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    principal: PrincipalDep,
    reason: Annotated[Reason, Query()] = None,
) -> OperationReply:
    """End a rollout before its commit, or the build of a gallery: nothing that is served has changed."""
    await get_operation(operation, runtime, principal)
    actor = exchange.context.client
    aborted = await to_thread.run_sync(lambda: runtime.deployments.abort(operation, reason=reason, actor=actor))
    await runtime.loader.refresh()
    return OperationReply.of(aborted)


@router.get("/audit", responses=responses(*AWAY))
async def audit(runtime: RuntimeDep, limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> AuditReply:
    """Who changed what, when and why; the latest first."""
    lines = await to_thread.run_sync(lambda: runtime.registry.audit(limit=limit))
    return AuditReply(lines=[AuditLine.of(line) for line in lines])


@router.get("/replicas", responses=responses(*AWAY))
async def replicas(runtime: RuntimeDep) -> ReplicasReply:
    """The servers of this registry: which state each serves, and what is resident where."""
    found = await to_thread.run_sync(runtime.registry.replicas)
    revision = await to_thread.run_sync(runtime.registry.revision)
    return ReplicasReply(
        generation=revision.generation,
        replicas=[ReplicaReply.of(replica, is_alive=replica.age_s < EXPIRY_S) for replica in found],
    )
