"""What handlers are given: the running parts and the exchange they belong to.

All are coroutines, though they wait for nothing: what is none is run in a thread, and the way there and back takes longer.
"""

from typing import Annotated

from fastapi import Depends, Request

from adapters.config import check_name
from adapters.registry import AliasReference, Snapshot
from service.auth import Principal
from service.http.exchange import Exchange
from service.runtime import Runtime


async def runtime_of(request: Request) -> Runtime:
    """The parts behind the API."""
    runtime: Runtime = request.app.state.runtime
    return runtime


async def exchange_of(request: Request) -> Exchange:
    """The exchange a handler belongs to."""
    exchange: Exchange = request.state.exchange
    return exchange


RuntimeDep = Annotated[Runtime, Depends(runtime_of)]
ExchangeDep = Annotated[Exchange, Depends(exchange_of)]


async def principal_of(exchange: ExchangeDep) -> Principal:
    """Who asks."""
    return exchange.context.principal


PrincipalDep = Annotated[Principal, Depends(principal_of)]


async def view_of(runtime: RuntimeDep, principal: PrincipalDep) -> Snapshot:
    """The registry as whoever asks may see it. Handlers read no other."""
    return runtime.loader.view(principal)


ViewDep = Annotated[Snapshot, Depends(view_of)]


async def known_adapter(name: str, request: Request, runtime: RuntimeDep, principal: PrincipalDep) -> None:
    """For routes that change the adapter their path names: whoever may not see all names is told which there are from their
    view, before the registry is asked. A push (PUT) may bring a new name.

    Raises: AdapterNotFound.
    """
    if principal.sees_all or request.method == "PUT":
        return
    if name not in runtime.loader.view(principal).adapters:
        await runtime.loader.refresh()
    view = runtime.loader.view(principal)
    if name not in view.adapters:
        view.resolve(AliasReference(check_name(name)))
