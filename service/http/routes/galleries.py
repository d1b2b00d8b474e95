"""/v1/galleries: what can be searched, item by item, with thumbnails and media. Item ids in paths are URL-quoted whole."""

import logging
from pathlib import Path
from typing import Annotated, NamedTuple

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from adapters.errors import AdapterBankError, ArtifactUnavailable, InvalidReference
from service.errors import Forbidden, GalleryDamaged, GalleryNotFound, MissingMedia, UnsupportedMedia
from service.gallery import Gallery, GalleryManifest
from service.http.dependencies import ExchangeDep, PrincipalDep, RuntimeDep, ViewDep
from service.http.errors import RefusedRequest, responses
from service.http.schemas import GalleriesReply, GalleryDetails, ItemReply, ItemsReply, item_path
from service.media.source import clip_format, picture_format
from service.pipelines.stages import within_deadline

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/galleries", tags=["galleries"])

OPENING = (GalleryNotFound, InvalidReference, GalleryDamaged, ArtifactUnavailable)  # what opening a version may raise
DEFAULT_PAGE_ITEMS = 50
MAX_PAGE_ITEMS = 200
PAGE_PATTERN = r"^v[1-9][0-9]{0,8}\.[0-9]{1,12}$"
MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "mp4": "video/mp4",
    "matroska": "video/webm",
    "avi": "video/x-msvideo",
}


Version = Annotated[int | None, Query(ge=1, description="Default: the live version.")]


async def open_gallery(name: str, runtime: RuntimeDep, exchange: ExchangeDep, version: Version = None) -> Gallery:
    """The version of a gallery that a request is about, fetched within its deadline where it is not here."""
    context = exchange.context
    async with within_deadline(context):
        if version is not None:
            return await runtime.galleries.version(name, version, context.principal)
        _, gallery = await runtime.galleries.live(name, context.principal)
        return gallery


async def read_manifest(
    name: str, runtime: RuntimeDep, exchange: ExchangeDep, version: Version = None
) -> GalleryManifest:
    """What the version is that a request is about; it is not fetched for that."""
    async with within_deadline(exchange.context):
        return await runtime.galleries.manifest(name, version, exchange.context.principal)


GalleryDep = Annotated[Gallery, Depends(open_gallery)]
ManifestDep = Annotated[GalleryManifest, Depends(read_manifest)]


@router.get("", responses=responses())
async def list_galleries(runtime: RuntimeDep, view: ViewDep, exchange: ExchangeDep) -> GalleriesReply:
    """Every gallery that the key may search. One that cannot be opened is left out, and the log says why."""
    principal = exchange.context.principal
    galleries = []
    for name in sorted(view.gallery_versions):
        try:
            manifest = await read_manifest(name, runtime, exchange)
            galleries.append(await get_gallery(manifest, runtime, principal))
        except Forbidden:
            continue  # older versions may be seen, the live one may not
        except AdapterBankError as error:
            log.warning("gallery %s is not listed: %s", name, error)
    return GalleriesReply(galleries=galleries)


@router.get("/{name}", responses=responses(*OPENING))
async def get_gallery(manifest: ManifestDep, runtime: RuntimeDep, principal: PrincipalDep) -> GalleryDetails:
    """One gallery: what it holds and how it was embedded."""
    versions = await runtime.galleries.versions(manifest.name, principal)
    return GalleryDetails.of(manifest, runtime.loader.view(principal), versions)


class PageStart(NamedTuple):
    """Where a page begins: `v3.50` is item 50 of version 3, so that pages of one listing never mix versions."""

    version: int | None
    offset: int

    @classmethod
    def of(cls, page: str | None) -> "PageStart":
        """Read a token of the form PAGE_PATTERN; without one, the beginning."""
        if page is None:
            return cls(None, 0)
        version, _, offset = page.removeprefix("v").partition(".")
        return cls(int(version), int(offset))


@router.get("/{name}/items", responses=responses(*OPENING))
async def list_items(
    name: str,
    runtime: RuntimeDep,
    exchange: ExchangeDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_ITEMS)] = DEFAULT_PAGE_ITEMS,
    page: Annotated[str | None, Query(pattern=PAGE_PATTERN, description="`next_page` of the page before.")] = None,
    version: Annotated[int | None, Query(ge=1, description="Default: the page's, else the live version.")] = None,
) -> ItemsReply:
    """Items in the gallery's order, page by page."""
    start = PageStart.of(page)
    if version is not None and start.version not in (None, version):
        raise RefusedRequest(f"the page belongs to version {start.version}", param="version")
    gallery = await open_gallery(name, runtime, exchange, version or start.version)
    return await to_thread.run_sync(items_page, gallery, start.offset, limit)


def items_page(gallery: Gallery, offset: int, limit: int) -> ItemsReply:
    """Items [offset, offset + limit)."""
    end = min(offset + limit, len(gallery))
    version = gallery.manifest.version
    return ItemsReply(
        gallery=gallery.manifest.name,
        version=version,
        num_items=len(gallery),
        items=[item_reply(gallery, position) for position in range(offset, end)],
        next_page=f"v{version}.{end}" if end < len(gallery) else None,
    )


def item_reply(gallery: Gallery, position: int) -> ItemReply:
    """One item as clients see it."""
    item = gallery.item(position)
    name, version = gallery.manifest.name, gallery.manifest.version
    has_thumbnail = gallery.thumbnail(position) is not None
    return ItemReply(
        id=item.id,
        metadata=dict(item.metadata),
        text=item.text,
        frame_times_s=list(item.frame_times_s),
        duration_s=item.duration_s,
        thumbnail=item_path(name, item.id, "thumbnail", version) if has_thumbnail else None,
        media=item_path(name, item.id, "media", version) if item.media is not None else None,
    )


# The two below come first: an item's own path would match theirs.


@router.get(
    "/{name}/items/{item_id:path}/thumbnail",
    responses=responses(*OPENING, MissingMedia) | {200: {"content": {"image/jpeg": {}}}},
    response_class=Response,
)
def get_thumbnail(item_id: str, request: Request, gallery: GalleryDep) -> Response:
    """A small JPEG of the item."""
    if is_part_of_id(request, "thumbnail"):
        return whole_item(gallery, f"{item_id}/thumbnail")
    thumbnail = gallery.thumbnail(gallery.position_of(item_id))
    if thumbnail is None:
        raise MissingMedia(f"{item_id!r} has no thumbnail", param="item")
    return Response(thumbnail, media_type="image/jpeg", headers=caching(request))


@router.get(
    "/{name}/items/{item_id:path}/media",
    responses=responses(*OPENING, MissingMedia, UnsupportedMedia)
    | {
        200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
        206: {"description": "A range of it."},
    },
    response_class=Response,
)
def get_media(item_id: str, request: Request, gallery: GalleryDep) -> Response:
    """The item's picture or clip, after checking that it is the one that was embedded. Ranges are supported."""
    if is_part_of_id(request, "media"):
        return whole_item(gallery, f"{item_id}/media")
    path = gallery.media_path(gallery.position_of(item_id))
    return MediaFile(path, media_type=media_type_of(path), headers=caching(request))


@router.get("/{name}/items/{item_id:path}", responses=responses(*OPENING))
def get_item(item_id: str, gallery: GalleryDep) -> ItemReply:
    """One item."""
    return item_reply(gallery, gallery.position_of(item_id))


def is_part_of_id(request: Request, last: str) -> bool:
    """Whether the path's last word belongs to a quoted item id, as in `/items/beach%2Fmedia`."""
    raw_path: bytes = request.scope["raw_path"]
    return not raw_path.endswith(b"/" + last.encode())


def whole_item(gallery: Gallery, item_id: str) -> Response:
    """`get_item` for an id that looked like another route."""
    return Response(item_reply(gallery, gallery.position_of(item_id)).model_dump_json(), media_type="application/json")


def caching(request: Request) -> dict[str, str]:
    """A version's files never change; the live version may be another one next time. Nothing is kept for other keys."""
    is_fixed = "version" in request.query_params
    return {
        "Cache-Control": "private, max-age=86400, immutable" if is_fixed else "no-cache",
        "Vary": "Authorization, X-API-Key",
    }


def media_type_of(path: Path) -> str:
    """By the first bytes, as when it was decoded, never by its name. Raises: UnsupportedMedia, MissingMedia."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise MissingMedia(f"the media file cannot be read: {error.strerror}", param="item") from error
    found = picture_format(head) or clip_format(head)
    if found is None:
        raise UnsupportedMedia("the media file is neither a picture nor a clip", param="item")
    return MEDIA_TYPES[found]


class MediaFile(FileResponse):
    """A file, with the common error body where a range cannot be served."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: HTTPException."""

        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = {
                    name.decode(): value.decode() for name, value in message["headers"] if name == b"content-range"
                }
                raise HTTPException(message["status"], "the Range header cannot be served", headers)
            await send(message)

        await super().__call__(scope, receive, checked)
