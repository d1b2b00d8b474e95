"""Tones and noises, one or two to a sound, as samples and as WAV or AAC files. Knows no words and no tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import numpy as np
from numpy.typing import NDArray

from service.media.sound import SAMPLING_RATE

Samples = NDArray[np.float32]

PITCHES = {"low": 240.0, "middle": 720.0, "high": 2160.0}  # Hz
LENGTHS_S = {"short": 0.18, "long": 0.42}
SOUND_LENGTH_S = 1.2
MAX_DETUNING = 0.12
FADE_S = 0.01
HISS_BAND = 0.35  # a hiss holds the frequencies within this share of its pitch


@dataclass(frozen=True)
class Noise:
    """One thing that sounds: `kind` is one of KINDS, `pitch` of PITCHES, `length` of LENGTHS_S."""

    kind: str
    pitch: str
    length: str

    @property
    def key(self) -> str:
        """Identity of what is told."""
        return f"{self.length} {self.pitch} {self.kind}"


@dataclass(frozen=True)
class Sound:
    """One or two noises, one after the other. `grain` seeds what no caption tells: loudness, detuning, pauses, hum."""

    noises: tuple[Noise, ...]
    grain: int

    @property
    def key(self) -> str:
        """Identity of the content."""
        return ", then ".join(noise.key for noise in self.noises)


def synthesise(sound: Sound) -> Samples:
    """The sound's samples [SOUND_LENGTH_S * SAMPLING_RATE], between -1 and 1; equal sounds give equal samples."""
    rng = Random(sound.grain)
    waves = [_wave(noise, rng) for noise in sound.noises]
    samples = np.zeros(int(SOUND_LENGTH_S * SAMPLING_RATE), np.float32)
    spare = len(samples) - sum(map(len, waves))
    shortest = min(spare // (len(waves) + 1), int(0.06 * SAMPLING_RATE))
    start = 0
    for wave in waves:
        pause = rng.randint(shortest, max(shortest, spare // (len(waves) + 1)))
        samples[start + pause : start + pause + len(wave)] += wave
        start += pause + len(wave)
    hum = np.random.default_rng(sound.grain).standard_normal(len(samples), dtype=np.float32)
    return np.clip(samples + hum * np.float32(rng.uniform(0.0005, 0.003)), -1.0, 1.0)


def _wave(noise: Noise, rng: Random) -> Samples:
    """The noise, faded in and out."""
    pitch = PITCHES[noise.pitch] * (1.0 + rng.uniform(-MAX_DETUNING, MAX_DETUNING))
    length = LENGTHS_S[noise.length] * (1.0 + rng.uniform(-MAX_DETUNING, MAX_DETUNING))
    times = np.arange(int(length * SAMPLING_RATE)) / SAMPLING_RATE
    wave = KINDS[noise.kind](times, pitch, rng)
    fade = np.minimum(1.0, np.minimum(times, times[::-1]) / FADE_S)
    return (wave * fade * rng.uniform(0.25, 0.6)).astype(np.float32)


def _tone(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    return np.sin(2 * np.pi * pitch * times + rng.uniform(0.0, 6.28))


def _buzz(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    """Odd overtones: a square wave that keeps below half the sampling rate."""
    orders = [order for order in (1, 3, 5, 7, 9) if order * pitch < 0.45 * SAMPLING_RATE]
    return np.asarray(sum(np.sin(2 * np.pi * order * pitch * times) / order for order in orders))


def _sweep(times: NDArray[np.float64], pitch: float, octaves: float) -> NDArray[np.float64]:
    """A tone that glides by so many octaves around its pitch."""
    course = times / times[-1] - 0.5
    frequency = pitch * 2.0 ** (octaves * course)
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def _rise(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    return _sweep(times, pitch, 1.0)


def _fall(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    return _sweep(times, pitch, -1.0)


def _hiss(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    """Noise of a band around the pitch."""
    white = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(times))
    spectrum = np.fft.rfft(white)
    frequencies = np.fft.rfftfreq(len(times), 1 / SAMPLING_RATE)
    spectrum[np.abs(frequencies - pitch) > HISS_BAND * pitch] = 0.0
    band = np.fft.irfft(spectrum, len(times))
    return np.asarray(0.8 * band / np.abs(band).max())


def _rattle(times: NDArray[np.float64], pitch: float, rng: Random) -> NDArray[np.float64]:
    """A tone chopped 22 times a second."""
    gate = np.sin(2 * np.pi * 22.0 * times + rng.uniform(0.0, 6.28)) > 0.2
    return np.sin(2 * np.pi * pitch * times) * gate


KINDS: dict[str, Callable[[NDArray[np.float64], float, Random], NDArray[np.float64]]] = {
    "tone": _tone,
    "buzz": _buzz,
    "rise": _rise,
    "fall": _fall,
    "hiss": _hiss,
    "rattle": _rattle,
}


def random_noises(rng: Random) -> tuple[Noise, ...]:
    """One or two noises, alike perhaps."""
    return tuple(
        Noise(rng.choice(list(KINDS)), rng.choice(list(PITCHES)), rng.choice(list(LENGTHS_S)))
        for _ in range(rng.choice((1, 2, 2)))
    )


def write_sound(samples: Samples, path: str | Path) -> None:
    """Mono samples [S] at SAMPLING_RATE as a file: AAC where its name ends in .m4a, else 16-bit WAV."""
    is_aac = str(path).endswith(".m4a")
    with av.open(str(path), "w", format="ipod" if is_aac else "wav") as container:
        stream = container.add_stream("aac" if is_aac else "pcm_s16le", rate=SAMPLING_RATE)
        stream.layout = "mono"
        if is_aac:
            stream.bit_rate = 96_000
        stream.time_base = Fraction(1, SAMPLING_RATE)
        if is_aac:
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        else:
            whole = np.round(samples[None] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(whole, format="s16", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
