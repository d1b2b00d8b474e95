"""Sound files made with FFmpeg's own encoders."""

from io import BytesIO

import av
import numpy as np
import numpy.typing as npt


def tone(hz: float, seconds: float, rate: int = 16_000) -> npt.NDArray[np.float32]:
    """A sine of half the full amplitude."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def make_sound_file(
    channels: npt.NDArray[np.float32], *, container: str = "wav", codec: str = "pcm_s16le", rate: int = 16_000
) -> bytes:
    """Samples, [N] or [channels, N] of one or two channels, in a file."""
    samples = np.ascontiguousarray(np.atleast_2d(channels), np.float32)
    layout = "mono" if len(samples) == 1 else "stereo"
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=stream.format, layout=layout, rate=rate, frame_size=stream.codec_context.frame_size or 1024
        )
        output.start_encoding()
        for whole in (frame, None) if samples.size else ():
            for part in resampler.resample(whole):
                output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()
