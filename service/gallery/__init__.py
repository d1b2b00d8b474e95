"""Galleries: named, versioned, searchable collections of videos, pictures or texts, embedded by one adapter."""

from service.gallery.build import EmbeddedItem, GalleryBuild
from service.gallery.frames import (
    DEFAULT_TAU,
    FrameScores,
    Pooling,
    frame_attention_weights,
    normalise,
    pool,
    query_weights,
    rerank_frames,
)
from service.gallery.index import IndexKind, SearchResult, VectorIndex
from service.gallery.manifest import (
    NUMERICS_VERSION,
    EmbeddedBy,
    GalleryItem,
    GalleryKind,
    GalleryManifest,
    GalleryPlan,
    MediaReference,
    Quarantined,
    check_item_id,
    embedding_key,
)
from service.gallery.sources import Source, read_sources, sources_digest
from service.gallery.store import Gallery, GalleryStore
from service.gallery.trees import GalleryTrees

__all__ = [
    "DEFAULT_TAU",
    "NUMERICS_VERSION",
    "EmbeddedBy",
    "EmbeddedItem",
    "FrameScores",
    "Gallery",
    "GalleryBuild",
    "GalleryItem",
    "GalleryKind",
    "GalleryManifest",
    "GalleryPlan",
    "GalleryStore",
    "GalleryTrees",
    "IndexKind",
    "MediaReference",
    "Pooling",
    "Quarantined",
    "SearchResult",
    "Source",
    "VectorIndex",
    "check_item_id",
    "embedding_key",
    "frame_attention_weights",
    "normalise",
    "pool",
    "query_weights",
    "read_sources",
    "rerank_frames",
    "sources_digest",
]
