"""POST /retrieve: search a gallery."""

from fastapi import APIRouter, Request

from service.config import MIB
from service.errors import IndexStale
from service.http.bodies import read_retrieve
from service.http.dependencies import ExchangeDep, RuntimeDep
from service.http.errors import ASK_ERRORS, responses
from service.http.openapi import request_body
from service.http.schemas import RetrieveFields, RetrieveReply, RetrieveRequest

router = APIRouter(tags=["ask"], responses=responses(*ASK_ERRORS, IndexStale))


@router.post("/v1/retrieve", openapi_extra=request_body(RetrieveRequest, RetrieveFields))
@router.post("/retrieve", openapi_extra=request_body(RetrieveRequest, RetrieveFields))
async def search(request: Request, runtime: RuntimeDep, exchange: ExchangeDep) -> RetrieveReply:
    """Search a gallery by a sentence, a picture or a clip."""
    settings = runtime.settings
    with runtime.metrics.stage("receive", exchange.context):
        query = await read_retrieve(request, max_bytes=settings.max_request_mib * MIB)
    answer = await runtime.retrieve.search(query, exchange.context)
    exchange.adapter = answer.adapter
    return RetrieveReply.of(answer)
