"""POST /caption: a picture, a clip or a sound in words."""

from fastapi import APIRouter, Request

from service.config import MIB
from service.http.bodies import ANY_MEDIUM, read_caption
from service.http.dependencies import ExchangeDep, RuntimeDep
from service.http.errors import ASK_ERRORS, responses
from service.http.openapi import request_body
from service.http.schemas import CaptionFields, CaptionReply, CaptionRequest

router = APIRouter(tags=["ask"], responses=responses(*ASK_ERRORS))


@router.post("/v1/caption", openapi_extra=request_body(CaptionRequest, CaptionFields, ANY_MEDIUM))
@router.post("/caption", openapi_extra=request_body(CaptionRequest, CaptionFields, ANY_MEDIUM))
async def caption(request: Request, runtime: RuntimeDep, exchange: ExchangeDep) -> CaptionReply:
    """Put a picture, a clip or a sound into words."""
    with runtime.metrics.stage("receive", exchange.context):
        query = await read_caption(request, max_bytes=runtime.settings.max_request_mib * MIB)
    answer = await runtime.vqa.caption(query, exchange.context)
    exchange.adapter = answer.adapter
    return CaptionReply.of(answer)
