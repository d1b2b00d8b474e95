"""Tones and noises: as samples, and as files that the media workers' code reads."""

from pathlib import Path
from random import Random

import av
import numpy as np
import pytest

from service.demo.perception import SPECTROGRAM
from service.demo.sounds import (
    KINDS,
    LENGTHS_S,
    PITCHES,
    SOUND_LENGTH_S,
    Noise,
    Sound,
    random_noises,
    synthesise,
    write_sound,
)
from service.media.sound import SAMPLING_RATE, decode_sound, spectrogram

SOUNDS = [Sound((Noise(kind, pitch, length),), 3) for kind in KINDS for pitch in PITCHES for length in LENGTHS_S]


@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.key)
def test_a_noise_lasts_and_sounds_as_it_is_told(sound: Sound) -> None:
    samples = synthesise(sound)
    noise = sound.noises[0]
    assert samples.shape == (int(SOUND_LENGTH_S * SAMPLING_RATE),)
    assert np.abs(samples).max() <= 1.0
    loud = np.flatnonzero(np.abs(samples) > 0.1)
    assert (loud[-1] - loud[0]) / SAMPLING_RATE == pytest.approx(LENGTHS_S[noise.length], rel=0.3)
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE)
    pitch = PITCHES[noise.pitch]
    near = spectrum[(frequencies > 0.55 * pitch) & (frequencies < 1.7 * pitch)].sum()
    assert near > 0.6 * spectrum.sum()


def test_two_noises_follow_each_other_and_do_not_overlap() -> None:
    rng = Random(1)
    for grain in range(50):
        noises = random_noises(rng)
        samples = synthesise(Sound(noises, grain))
        quiet = np.convolve(np.abs(samples) < 0.05, np.ones(300), mode="valid") == 300  # 19 ms of hum alone
        loud = np.flatnonzero(np.abs(samples) > 0.1)
        if len(noises) == 2:
            assert quiet[loud[0] : loud[-1]].any()
        assert np.array_equal(samples, synthesise(Sound(noises, grain)))


@pytest.mark.parametrize(("suffix", "codec", "tolerance"), [("wav", "pcm_s16le", 0.02), ("m4a", "aac", 0.06)])
def test_a_file_holds_what_was_written(tmp_path: Path, suffix: str, codec: str, tolerance: float) -> None:
    sound = Sound((Noise("tone", "middle", "long"), Noise("hiss", "high", "short")), 5)
    samples, path = synthesise(sound), tmp_path / f"sound.{suffix}"
    write_sound(samples, path)
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context.name == codec
    decoded = decode_sound(path.read_bytes(), SPECTROGRAM)
    assert decoded.duration_s == pytest.approx(SOUND_LENGTH_S, abs=0.05)
    assert np.abs(decoded.banks - spectrogram(samples, SPECTROGRAM)).mean() < tolerance
