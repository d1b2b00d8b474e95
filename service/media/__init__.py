"""Bytes -> pixels and frames, within limits; `MediaWorkers` does it in processes that may be killed.

Knows nothing of models, requests or torch: arrays are NumPy.
"""

from service.media.clip import VideoFrames, decode_video, sample_times
from service.media.picture import CLIP_MEAN, CLIP_STD, Preprocessing, decode_image
from service.media.sound import Spectrogram, SpectrogramPreprocessing, decode_sound
from service.media.source import (
    AnyMediaKind,
    MediaKind,
    MediaLimits,
    MediaSource,
    any_media_kind,
    media_digest,
    media_kind,
)
from service.media.thumbnails import thumbnail
from service.media.workers import MediaWorkers

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "AnyMediaKind",
    "MediaKind",
    "MediaLimits",
    "MediaSource",
    "MediaWorkers",
    "Preprocessing",
    "Spectrogram",
    "SpectrogramPreprocessing",
    "VideoFrames",
    "any_media_kind",
    "decode_image",
    "decode_sound",
    "decode_video",
    "media_digest",
    "media_kind",
    "sample_times",
    "thumbnail",
]
