"""What handlers are given: the running parts and the exchange they belong to."""

from typing import Annotated

from fastapi import Depends, Request

from service.http.exchange import Exchange
from service.runtime import Runtime


def runtime_of(request: Request) -> Runtime:
    """The parts behind the API."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def exchange_of(request: Request) -> Exchange:
    """The exchange a handler belongs to."""
    exchange: Exchange = request.state.exchange
    return exchange


RuntimeDep = Annotated[Runtime, Depends(runtime_of)]
ExchangeDep = Annotated[Exchange, Depends(exchange_of)]
