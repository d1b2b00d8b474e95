"""/v1/adapters: what is registered."""

from collections.abc import Callable

from fastapi import APIRouter

from adapters.config import check_name
from adapters.errors import AdapterNotFound, InvalidReference
from adapters.registry import AliasReference
from service.http.dependencies import RuntimeDep, ViewDep
from service.http.errors import responses
from service.http.schemas import AdapterDetails, AdaptersReply, Tier
from service.runtime import Runtime

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.get("", responses=responses())
async def list_adapters(runtime: RuntimeDep, view: ViewDep) -> AdaptersReply:
    """Every adapter that the key may use, with its versions and aliases."""
    tier = tiers(runtime)
    return AdaptersReply(adapters=[AdapterDetails.of(name, view, tier) for name in sorted(view.adapters)])


@router.get("/{name}", responses=responses(AdapterNotFound, InvalidReference))
async def get_adapter(name: str, runtime: RuntimeDep, view: ViewDep) -> AdapterDetails:
    """One adapter with its versions and aliases."""
    if name not in view.adapters:
        view.resolve(AliasReference(check_name(name)))  # says which names there are
    return AdapterDetails.of(name, view, tiers(runtime))


def tiers(runtime: Runtime) -> Callable[[str], Tier]:
    """Where the adapter of a weights digest is at this moment."""
    resident = runtime.backbones.residency()

    def tier(digest: str) -> Tier:
        if digest in resident["device"]:
            return "device"
        return "host" if digest in resident["host"] else "disk"

    return tier
