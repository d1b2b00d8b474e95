"""For operators and browsers: health, metrics, the console and the API's documentation."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from prometheus_client.exposition import choose_encoder

from service.errors import NotReady
from service.http.dependencies import RuntimeDep
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

router = APIRouter()


@router.get("/health/live", tags=["operation"])
async def live() -> LiveReply:
    """Whether the process answers at all."""
    return LiveReply()


@router.get("/health/ready", tags=["operation"], responses=responses(NotReady))
async def ready(runtime: RuntimeDep) -> ReadyReply:
    """Whether requests should be sent here; if not, why not."""
    status = ReadyReply.model_validate(runtime.status())
    if not status.ready:
        raise NotReady("; ".join(status.reasons) or "not ready")
    return status


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
