"""Sound: WAV, FLAC, Ogg, MP3, AAC and the sound of clips -> mono at one sampling rate -> log mel filter banks.

The filter banks are Kaldi's, as AST's authors and eP-ALM's compute them, but of sound that was resampled: theirs keeps a
file's own rate and so hears another pitch in each, and its first channel alone where ours mixes them. Source: the authors' `dataset/audio_caption.py`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import av
import numpy as np
import numpy.typing as npt
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer

from service.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media.source import DEFAULT_LIMITS, MediaLimits, MediaSource, media_errors, read_source, sound_format

SAMPLING_RATE = 16_000
FRAME_S, HOP_S = 0.025, 0.010
_FRAME, _HOP, _FFT = 400, 160, 512
_LOWEST_HZ, _PREEMPHASIS, _FLOOR = 20.0, 0.97, 1.1920929e-07
_INT16 = 32768.0

# Decoders we let bytes from outside reach.
_CODECS = (
    *("aac", "alac", "flac", "mp3", "mp3float", "opus", "vorbis"),
    *("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_u8", "pcm_alaw", "pcm_mulaw"),
)
_READ_BYTES = 2**20


@dataclass(frozen=True)
class SpectrogramPreprocessing:
    """How a waveform becomes a spectrogram: (x - mean) / (2 std) of `num_mel_bins` banks, padded or cut to `max_steps`."""

    num_mel_bins: int = 128
    max_steps: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974


@dataclass(frozen=True, eq=False)
class Spectrogram:
    """Log mel filter banks [max_steps, num_mel_bins], normalised, of a sound of that length."""

    banks: npt.NDArray[np.float32]
    duration_s: float


def decode_sound(
    source: MediaSource, prep: SpectrogramPreprocessing, limits: MediaLimits = DEFAULT_LIMITS
) -> Spectrogram:
    """The spectrogram of a sound file, or of the sound of a clip. Silence is added behind what is too short.

    Raises: `UnsupportedMedia`, `CorruptMedia`, `MediaTooLarge`, `MissingMedia`.
    """
    samples = load_sound(read_source(source, limits), limits)
    return Spectrogram(spectrogram(samples, prep), len(samples) / SAMPLING_RATE)


def load_sound(data: bytes, limits: MediaLimits) -> npt.NDArray[np.float32]:
    """The samples of the first sound stream, mono at SAMPLING_RATE, between -1 and 1."""
    claimed = sound_format(data)
    if claimed is None:
        raise UnsupportedMedia("not a WAV, FLAC, Ogg, MP3, AAC, MP4, WebM or Matroska file")
    with media_errors("sound"), _opened(data, claimed) as (container, stream):
        parts, num_samples = [], 0
        for part in _resampled(container, stream):
            parts.append(part)
            num_samples += len(part)
            if num_samples > limits.max_duration_s * SAMPLING_RATE:
                raise MediaTooLarge(
                    f"the sound lasts longer than {limits.max_duration_s:g} s, which is what is allowed"
                )
    if num_samples < _FRAME:
        raise CorruptMedia(f"the sound holds {num_samples} samples; at least {_FRAME} make a filter bank")
    return np.concatenate(parts)


@contextmanager
def _opened(data: bytes, claimed: str) -> Iterator[tuple[InputContainer, AudioStream]]:
    # The format is forced: a probe might pick a playlist format, which opens addresses named inside the file.
    with av.open(BytesIO(data), "r", format=claimed, buffer_size=_READ_BYTES) as container:
        if not container.streams.audio:
            raise UnsupportedMedia("the file holds no sound")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise CorruptMedia("the sound's header names no codec")
        codec = stream.codec_context.codec.canonical_name
        if codec not in _CODECS:
            raise UnsupportedMedia(f"the sound's codec {codec} is not one we read")
        stream.codec_context.thread_count = 1
        yield container, stream


def _resampled(container: InputContainer, stream: AudioStream) -> Iterator[npt.NDArray[np.float32]]:
    """Mono samples as they are decoded: the mean of the channels. A broken packet costs its samples only."""
    resampler = AudioResampler(format="fltp", rate=SAMPLING_RATE)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            for part in resampler.resample(frame):
                yield part.to_ndarray().mean(axis=0)
    for part in resampler.resample(None):
        yield part.to_ndarray().mean(axis=0)


def spectrogram(samples: npt.NDArray[np.float32], prep: SpectrogramPreprocessing) -> npt.NDArray[np.float32]:
    """Normalised log mel filter banks [max_steps, num_mel_bins] of samples at SAMPLING_RATE.

    The mean of the whole sound is taken away first; what is behind `max_steps` is not looked at.
    """
    banks = filter_banks(samples - samples.mean(), prep.num_mel_bins, prep.max_steps)
    padded = np.zeros((prep.max_steps, prep.num_mel_bins), np.float32)
    padded[: len(banks)] = banks
    return (padded - np.float32(prep.mean)) / np.float32(2 * prep.std)


def filter_banks(samples: npt.NDArray[np.float32], num_mel_bins: int, max_steps: int) -> npt.NDArray[np.float32]:
    """Kaldi's log mel filter banks [steps, bins] with a Hanning window, HTK's scale and no dither: frames of 25 ms each 10 ms.

    Samples between -1 and 1, as AST's authors have them: not Kaldi's own 16 bits.
    """
    from transformers import audio_utils  # slow to import, and only needed where somebody listens

    used = samples[: _FRAME + _HOP * (max_steps - 1)]
    banks = audio_utils.spectrogram(
        np.asarray(used, np.float64),
        audio_utils.window_function(_FRAME, "hann", periodic=False),
        frame_length=_FRAME,
        hop_length=_HOP,
        fft_length=_FFT,
        power=2.0,
        center=False,
        preemphasis=_PREEMPHASIS,
        mel_filters=_mel_filters(num_mel_bins),
        log_mel="log",
        mel_floor=_FLOOR,
        remove_dc_offset=True,
        dtype=np.dtype(np.float32),
    )
    return np.ascontiguousarray(banks.T, np.float32)


@lru_cache(maxsize=8)
def _mel_filters(num_mel_bins: int) -> npt.NDArray[np.float64]:
    """Triangles on the mel scale, [frequencies, bins]."""
    from transformers import audio_utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lowest of 128 triangles are narrower than a frequency, in Kaldi too
        filters: npt.NDArray[np.float64] = audio_utils.mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=num_mel_bins,
            min_frequency=_LOWEST_HZ,
            max_frequency=SAMPLING_RATE / 2,
            sampling_rate=SAMPLING_RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return filters
