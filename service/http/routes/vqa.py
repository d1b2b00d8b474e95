"""POST /vqa: a question about a picture, a clip or a sound."""

from fastapi import APIRouter, Request

from service.config import MIB
from service.http.bodies import ANY_MEDIUM, read_vqa
from service.http.dependencies import ExchangeDep, RuntimeDep
from service.http.errors import ASK_ERRORS, RefusedRequest, responses
from service.http.openapi import request_body
from service.http.schemas import VqaFields, VqaReply, VqaRequest
from service.types import RankDecode

router = APIRouter(tags=["ask"], responses=responses(*ASK_ERRORS))


@router.post("/v1/vqa", openapi_extra=request_body(VqaRequest, VqaFields, ANY_MEDIUM))
@router.post("/vqa", openapi_extra=request_body(VqaRequest, VqaFields, ANY_MEDIUM))
async def ask(request: Request, runtime: RuntimeDep, exchange: ExchangeDep) -> VqaReply:
    """Answer a question about a picture, a clip or a sound, in free words or by choosing among candidates."""
    settings = runtime.settings
    with runtime.metrics.stage("receive", exchange.context):
        query = await read_vqa(request, max_bytes=settings.max_request_mib * MIB)
    if isinstance(query.decode, RankDecode) and len(query.decode.candidates or ()) > settings.max_candidates:
        raise RefusedRequest(f"at most {settings.max_candidates} candidates", param="decode.candidates")
    answer = await runtime.vqa.answer(query, exchange.context)
    exchange.adapter = answer.adapter
    return VqaReply.of(answer)
