"""For operators and browsers: health, metrics, the console and the API's documentation."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from prometheus_client.exposition import choose_encoder

from service.auth import Keychain
from service.errors import NotReady
from service.http.dependencies import PrincipalDep, RuntimeDep, ViewDep
from service.http.errors import responses
from service.http.schemas import LiveReply, ReadyReply

CONSOLE_FOLDER = Path(__file__).parent.parent / "console"

# Pages load nothing from elsewhere. Swagger UI writes styles into the page.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

# Of the details of health, those that tell a key nothing about adapters it may not use.
SHARED_DETAILS = ("ready", "reasons", "last_forward_age_s", "registry_generation", "backbone", "backbones", "device")

router = APIRouter()


@router.get("/health/live", tags=["operation"])
async def live() -> LiveReply:
    """Whether the process answers at all."""
    return LiveReply()


@router.get("/health/ready", tags=["operation"], responses=responses(NotReady))
async def ready(request: Request, runtime: RuntimeDep, principal: PrincipalDep, view: ViewDep) -> ReadyReply:
    """Whether requests should be sent here; if not, why not. What is loaded is told to those with a key."""
    status = runtime.status()
    reply = ReadyReply.model_validate(status)
    if not reply.ready:
        raise NotReady("; ".join(reply.reasons) or "not ready")
    if not principal.is_known:
        return ReadyReply(ready=reply.ready, reasons=reply.reasons)
    if principal.sees_all:
        keys: Keychain | None = request.app.state.keys
        return ReadyReply.model_validate(status | {"api_keys_error": keys.error if keys is not None else None})
    shared = {name: status[name] for name in SHARED_DETAILS}
    resident = {
        tier: {digest: size for digest, size in held.items() if view.with_digest(digest)}
        for tier, held in runtime.backbones.residency().items()
    }
    return ReadyReply.model_validate(shared | {"resident": resident})


@router.get("/metrics", tags=["operation"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request, runtime: RuntimeDep) -> Response:
    """Prometheus metrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(runtime.metrics.registry), headers={"Content-Type": content_type})


@router.get("/", include_in_schema=False)
async def console() -> FileResponse:
    """The console."""
    return FileResponse(CONSOLE_FOLDER / "index.html", headers=PAGE_HEADERS)


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """The API's documentation."""
    return FileResponse(CONSOLE_FOLDER / "docs.html", headers=PAGE_HEADERS)
