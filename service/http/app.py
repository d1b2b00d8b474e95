"""Ties the parts together: `create_app(settings)` is the whole service as one ASGI application."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from service.admission import Admission
from service.config import MIB, Settings
from service.http.access import Door, open_keychain
from service.http.errors import error_response
from service.http.exchange import Exchange
from service.http.limits import BodyLimit, LoopbackOnly
from service.http.middleware import Attended, Exchanges
from service.http.openapi import describe
from service.http.routes import (
    adapters,
    caption,
    deployments,
    galleries,
    gallery_changes,
    operations,
    ops,
    retrieve,
    vqa,
)
from service.http.routes.ops import CONSOLE_FOLDER
from service.metrics import Metrics
from service.runtime import Runtime

DESCRIPTION = """Many task adapters over one frozen vision-language backbone.

`/vqa`, `/caption` and `/retrieve` are `/v1/vqa` and so on. Every request may carry `X-Request-Id` and `X-Request-Timeout-Ms`; every reply
says in `Server-Timing` and `X-Stage-...-Ms` where its time went, and in `X-Adapter` which adapter answered. Every error has the body
`{"error": {"code", "message", "param", "request_id"}}`. A server that has API keys wants one with every request, as
`Authorization: Bearer KEY` or `X-API-Key: KEY`."""

TAGS = [
    {"name": "ask", "description": "Questions and searches."},
    {"name": "adapters", "description": "What is registered."},
    {"name": "deployment", "description": "Push, promote, roll back; what is under way, and what was done."},
    {"name": "galleries", "description": "What can be searched."},
    {"name": "operation", "description": "Health and metrics."},
]


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """The service over HTTP. Without a `runtime` it makes its own, and starts, drains and closes it; a given one is the caller's.

    Raises: InvalidKeys.
    """
    keys = open_keychain(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if runtime is not None:
            yield
            return
        own = app.state.runtime = Runtime(settings)
        try:
            await own.start()
            yield
            await own.drain()
        finally:
            await own.close()

    def metrics() -> Metrics:
        serving: Runtime = app.state.runtime
        return serving.metrics

    def admission() -> Admission:
        serving: Runtime = app.state.runtime
        return serving.admission

    def routes() -> Iterator[RouteContext]:
        return iter_route_contexts(app.routes)

    app = FastAPI(
        title="adapter-bank",
        version=version("adapter-bank"),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={RequestValidationError: answer_error, HTTPException: answer_error},
        middleware=[
            Middleware(Exchanges, settings=settings, metrics=metrics),
            *([Middleware(LoopbackOnly)] if keys is None and not settings.allow_public else []),
            Middleware(Door, routes=routes, keys=keys, metrics=metrics),
            Middleware(
                BodyLimit,
                max_bytes=settings.max_request_mib * MIB,
                max_package_bytes=settings.max_package_mib * MIB,
                admission=admission,
            ),
            Middleware(Attended),
        ],
    )
    app.state.runtime = runtime
    app.state.keys = keys
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    for module in (vqa, caption, retrieve, adapters, deployments, operations, galleries, gallery_changes, ops):
        app.include_router(module.router)
    app.mount("/console", StaticFiles(directory=CONSOLE_FOLDER), name="console")
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """What the framework refuses; all other errors reach `Exchanges`."""
    exchange: Exchange = request.state.exchange
    return error_response(error, exchange.context.request_id)
