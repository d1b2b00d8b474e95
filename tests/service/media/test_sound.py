import random

import kaldi_native_fbank
import numpy as np
import numpy.typing as npt
import pytest

from service.errors import BadMedia, CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media import MediaLimits, MediaWorkers, SpectrogramPreprocessing, decode_sound
from service.media.sound import SAMPLING_RATE, filter_banks, load_sound, spectrogram
from service.media.source import DEFAULT_LIMITS, sound_format
from tests.service.media.clips import make_clip
from tests.service.media.sounds import make_sound_file, tone

PREP = SpectrogramPreprocessing()
KINDS = {
    "wav": ("wav", "pcm_s16le", 44_100),
    "wav, 24 bits": ("wav", "pcm_s24le", 48_000),
    "wav, floats": ("wav", "pcm_f32le", 22_050),
    "wav, telephone": ("wav", "pcm_mulaw", 8_000),
    "flac": ("flac", "flac", 44_100),
    "ogg opus": ("ogg", "libopus", 48_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "aac": ("adts", "aac", 44_100),
    "m4a": ("mp4", "aac", 48_000),
    "mkv opus": ("matroska", "libopus", 48_000),
}


def kaldi(samples: npt.NDArray[np.float32], num_mel_bins: int) -> npt.NDArray[np.float32]:
    """What Kaldi computes, in C++ by others, with eP-ALM's options."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = num_mel_bins
    options.use_energy = False
    options.htk_compat = True
    banks = kaldi_native_fbank.OnlineFbank(options)
    banks.accept_waveform(SAMPLING_RATE, samples.tolist())
    banks.input_finished()
    return np.stack([banks.get_frame(i) for i in range(banks.num_frames_ready)])


@pytest.mark.parametrize("num_mel_bins", [24, 128])
@pytest.mark.parametrize("kind", ["tone", "noise", "quiet", "clicks"])
def test_filter_banks_are_kaldis(kind: str, num_mel_bins: int) -> None:
    generator = np.random.default_rng(1)
    noise = generator.standard_normal(20_000).astype(np.float32)
    samples = {
        "tone": tone(440, 1.25) + 0.01 * noise,
        "noise": 0.3 * noise,
        "quiet": 1e-4 * noise,
        "clicks": 1e-3 * noise + (np.arange(20_000) % 3_000 == 0).astype(np.float32),
    }[kind].astype(np.float32)
    ours, theirs = filter_banks(samples, num_mel_bins, 1024), kaldi(samples, num_mel_bins)
    assert ours.shape == theirs.shape == (123, num_mel_bins)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tone_is_heard_at_its_pitch_whatever_the_file_and_its_rate(kind: str) -> None:
    container, codec, rate = KINDS[kind]
    data = make_sound_file(tone(1000, 1.5, rate), container=container, codec=codec, rate=rate)
    heard = decode_sound(data, PREP)
    expected = spectrogram(tone(1000, 1.5), PREP)
    assert heard.banks.shape == (1024, 128) and heard.banks.dtype == np.float32
    assert heard.duration_s == pytest.approx(1.5, abs=0.06)
    assert heard.banks[60].argmax() == expected[60].argmax()


def test_silence_is_added_before_the_banks_are_normalised() -> None:
    banks = decode_sound(make_sound_file(tone(300, 0.5)), PREP).banks
    assert banks[48:] == pytest.approx(
        4.2677393 / (2 * 4.5689974)
    )  # 48 steps of 25 ms each 10 ms fit into half a second
    assert np.ptp(banks[:48]) > 1


def test_what_is_too_long_for_the_encoder_is_cut() -> None:
    long, short = tone(300, 3.0), tone(300, 1.0)
    prep = SpectrogramPreprocessing(num_mel_bins=24, max_steps=40)
    banks = decode_sound(make_sound_file(long), prep).banks
    assert banks.shape == (40, 24)
    np.testing.assert_allclose(banks, decode_sound(make_sound_file(short), prep).banks, atol=1e-3)


def test_a_constant_offset_is_not_heard() -> None:
    samples = tone(300, 1.0)
    np.testing.assert_allclose(spectrogram(samples + 0.25, PREP), spectrogram(samples, PREP), atol=5e-3)


def test_channels_are_mixed() -> None:
    left, silence = tone(500, 1.0), np.zeros(16_000, np.float32)
    mixed = load_sound(make_sound_file(np.stack([left, silence])), DEFAULT_LIMITS)
    np.testing.assert_allclose(mixed, left / 2, atol=1e-3)


def test_the_sound_of_a_clip_is_heard(tmp_path: object) -> None:
    heard = decode_sound(make_sound_file(tone(1000, 1.0), container="mp4", codec="aac"), PREP)
    assert heard.duration_s == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", UnsupportedMedia),
        (b"this is no sound at all", UnsupportedMedia),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", CorruptMedia),
        (make_sound_file(np.zeros(0, np.float32)), CorruptMedia),
        (make_sound_file(tone(440, 0.02)), CorruptMedia),
        (make_clip(), UnsupportedMedia),
        (make_sound_file(tone(440, 0.5), container="matroska", codec="ac3", rate=44_100), UnsupportedMedia),
    ],
    ids=["nothing", "text", "half a header", "no sample", "too short", "a clip without sound", "a codec of no trust"],
)
def test_what_is_no_sound_is_refused(data: bytes, error: type[BadMedia]) -> None:
    with pytest.raises(error):
        decode_sound(data, PREP)


def test_limits_hold() -> None:
    data = make_sound_file(tone(440, 2.0))
    with pytest.raises(MediaTooLarge, match=r"longer than 1 s"):
        decode_sound(data, PREP, MediaLimits(max_duration_s=1.0))
    with pytest.raises(MediaTooLarge, match="bytes"):
        decode_sound(data, PREP, MediaLimits(max_bytes=1000))


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_bad_media_or_heard_and_nothing_else(kind: str) -> None:
    container, codec, rate = KINDS[kind]
    whole = make_sound_file(tone(440, 0.5, rate), container=container, codec=codec, rate=rate)
    chance = random.Random(7)
    for _ in range(20):
        data = bytearray(whole[: chance.randrange(12, len(whole))])
        for _ in range(chance.randrange(1, 30)):
            data[chance.randrange(12, len(data))] = chance.randrange(256)
        try:
            banks = decode_sound(bytes(data), PREP).banks
        except BadMedia:
            continue
        assert np.isfinite(banks).all()


def test_first_bytes_claim_a_format() -> None:
    assert sound_format(b"\xff\xf1\x50\x80") == "aac"
    assert sound_format(b"\xff\xfb\x90\x00") == "mp3"
    assert sound_format(b"ID3\x04") == "mp3"
    assert sound_format(b"\xff\xd8\xff\xe0") is None  # a JPEG
    assert sound_format(b"RIFF\x00\x00\x00\x00AVI ") is None


async def _heard(data: bytes) -> npt.NDArray[np.float32]:
    with MediaWorkers(1) as workers:
        return (await workers.sound(data, PREP)).banks


def test_a_worker_hears_the_same() -> None:
    import asyncio

    data = make_sound_file(tone(440, 0.5))
    np.testing.assert_array_equal(asyncio.run(_heard(data)), decode_sound(data, PREP).banks)
