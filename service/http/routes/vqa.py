"""POST /vqa: a question about a picture or a clip."""

from fastapi import APIRouter, Request

from adapters import errors as adapter_errors
from service import errors as service_errors
from service.config import MIB
from service.http.bodies import read_vqa
from service.http.dependencies import ExchangeDep, RuntimeDep
from service.http.errors import WRONG_CONTENT_TYPE, RefusedRequest, responses
from service.http.openapi import request_body
from service.http.schemas import VqaFields, VqaReply, VqaRequest
from service.types import RankDecode

router = APIRouter(
    tags=["ask"],
    responses=responses(
        adapter_errors.InvalidReference,
        adapter_errors.AdapterNotFound,
        adapter_errors.MissingPart,
        adapter_errors.BackboneMismatch,
        service_errors.GalleryNotFound,
        service_errors.MissingMedia,
        service_errors.BadQuery,
        service_errors.UnsupportedMedia,
        service_errors.CorruptMedia,
        service_errors.MediaTooLarge,
        service_errors.TooLarge,
        service_errors.Overloaded,
        service_errors.NotReady,
        service_errors.EngineFailed,
        WRONG_CONTENT_TYPE,
    ),
)


@router.post("/v1/vqa", openapi_extra=request_body(VqaRequest, VqaFields))
@router.post("/vqa", openapi_extra=request_body(VqaRequest, VqaFields))
async def ask(request: Request, runtime: RuntimeDep, exchange: ExchangeDep) -> VqaReply:
    """Answer a question about a picture or a clip, in free words or by choosing among candidates."""
    settings = runtime.settings
    with runtime.metrics.stage("receive", exchange.context):
        query = await read_vqa(request, max_bytes=settings.max_request_mib * MIB)
    if isinstance(query.decode, RankDecode) and len(query.decode.candidates or ()) > settings.max_candidates:
        raise RefusedRequest(f"at most {settings.max_candidates} candidates", param="decode.candidates")
    answer = await runtime.vqa.answer(query, exchange.context)
    exchange.adapter = answer.adapter
    return VqaReply.of(answer)
