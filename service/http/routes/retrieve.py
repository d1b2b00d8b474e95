"""POST /retrieve: search a gallery."""

from fastapi import APIRouter, Request

from adapters import errors as adapter_errors
from service import errors as service_errors
from service.config import MIB
from service.http.bodies import read_retrieve
from service.http.dependencies import ExchangeDep, RuntimeDep
from service.http.errors import WRONG_CONTENT_TYPE, responses
from service.http.openapi import request_body
from service.http.schemas import RetrieveFields, RetrieveReply, RetrieveRequest

router = APIRouter(
    tags=["ask"],
    responses=responses(
        adapter_errors.InvalidReference,
        adapter_errors.AdapterNotFound,
        adapter_errors.MissingPart,
        adapter_errors.BackboneMismatch,
        service_errors.GalleryNotFound,
        service_errors.GalleryDamaged,
        adapter_errors.ArtifactUnavailable,
        service_errors.IndexStale,
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
