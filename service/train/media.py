"""The media of a run: what files claim to be, and a store that makes something of each and keeps it within a budget."""

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from adapters.config import AudioPreprocessing, Preprocessing
from adapters.errors import ConversionError
from service.errors import BadMedia, MissingMedia, UnsupportedMedia
from service.media import (
    AnyMediaKind,
    MediaWorkers,
    Spectrogram,
    SpectrogramPreprocessing,
    VideoFrames,
    any_media_kind,
    decode_image,
    decode_sound,
    decode_video,
)
from service.media import Preprocessing as PixelPreprocessing

IN_FLIGHT = 32  # files given to the workers at once: all stay busy, and results do not pile up
NAMES: Mapping[AnyMediaKind, str] = {"image": "a picture", "video": "a clip", "audio": "a sound"}


def kind_of(path: Path, kinds: Sequence[AnyMediaKind]) -> AnyMediaKind:
    """What a file claims to be. Raises: MissingMedia; UnsupportedMedia for what is none of these kinds."""
    try:
        with open(path, "rb") as stream:
            kind = any_media_kind(stream.read(12))
    except OSError as error:
        raise MissingMedia(f"{path.name} cannot be read: {error.strerror}") from error
    if kind is None or kind not in kinds:
        raise UnsupportedMedia(f"neither {' nor '.join(NAMES[one] for one in kinds)} we read")
    return kind


def shared_kind(
    files: Sequence[Path], kinds: Sequence[AnyMediaKind], lines_of: Callable[[int], Sequence[int]]
) -> tuple[AnyMediaKind | None, dict[int, str]]:
    """The kind of all files, None where none can be used; and the reasons, by file, why some cannot.

    Raises: ConversionError naming lines where kinds are mixed.
    """
    firsts: dict[AnyMediaKind, int] = {}
    broken: dict[int, str] = {}
    for file, path in enumerate(files):
        try:
            firsts.setdefault(kind_of(path, kinds), file)
        except (BadMedia, MissingMedia) as error:
            broken[file] = error.message
    if len(firsts) > 1:
        places = " and ".join(f"{NAMES[kind]} in line {lines_of(file)[0]}" for kind, file in firsts.items())
        raise ConversionError(f"{places}: an adapter is trained on one or the other", param="data")
    return next(iter(firsts), None), broken


class Kept(Protocol):
    """What a store keeps of a file: an array or a tensor."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""


K = TypeVar("K", bound=Kept)


class MediaStore(ABC, Generic[K]):
    """What is made of media of one kind; those used least recently make room. For one thread at a time."""

    def __init__(
        self,
        files: Sequence[Path],
        kind: AnyMediaKind,
        preprocessing: Preprocessing | AudioPreprocessing,
        workers: MediaWorkers,
        *,
        max_bytes: int,
    ) -> None:
        self.files = files
        self.kind = kind
        self._preprocessing = preprocessing
        self._workers = workers
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, K] = OrderedDict()
        self._bytes = 0

    @abstractmethod
    def make(self, values: npt.NDArray[np.float32]) -> K:
        """What is kept of a medium: of pixels [3, R, R] or [T, 3, R, R], or of a spectrogram [S, M], preprocessed."""

    def check(self, files: Iterable[int], report: Callable[[], object]) -> dict[int, str]:
        """Make what is kept of each of these files once; the reasons, by file, why some cannot be used.

        `report` is called after each file.
        """
        broken: dict[int, str] = {}
        waiting = iter(files)
        pending = deque((file, self._decode(file)) for file in islice(waiting, IN_FLIGHT))
        while pending:
            file, decoding = pending.popleft()
            try:
                self._keep(file, self.make(_values(decoding.result())))
            except (BadMedia, MissingMedia) as error:
                broken[file] = error.message
            pending.extend((file, self._decode(file)) for file in islice(waiting, 1))
            report()
        return broken

    def get(self, files: Sequence[int]) -> list[K]:
        """What was made of each of these files. Raises: BadMedia, MissingMedia for what was fine when it was checked."""
        missing = [file for file in dict.fromkeys(files) if file not in self._kept]
        found = {file: self._kept[file] for file in files if file in self._kept}
        decoding = {file: self._decode(file) for file in missing}
        for file, future in decoding.items():
            found[file] = self.make(_values(future.result()))
            self._keep(file, found[file])
        for file in found:
            if file in self._kept:
                self._kept.move_to_end(file)
        return [found[file] for file in files]

    def _decode(self, file: int) -> "Future[Any]":
        source, workers, wanted = self.files[file], self._workers, self._preprocessing
        if isinstance(wanted, AudioPreprocessing):
            banks = SpectrogramPreprocessing(wanted.num_mel_bins, wanted.max_steps, wanted.mean, wanted.std)
            return workers.submit(decode_sound, source, banks, workers.limits)
        prep = PixelPreprocessing(wanted.resolution, wanted.mean, wanted.std)
        if self.kind == "image":
            return workers.submit(decode_image, source, prep, workers.limits)
        return workers.submit(decode_video, source, prep, wanted.num_frames, workers.limits)

    def _keep(self, file: int, made: K) -> None:
        if file in self._kept or made.nbytes > self._max_bytes:
            return
        self._kept[file] = made
        self._bytes += made.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


def _values(decoded: Any) -> npt.NDArray[np.float32]:
    """The numbers of what a media worker gave."""
    match decoded:
        case VideoFrames(frames=frames):
            return frames
        case Spectrogram(banks=banks):
            return banks
    return decoded  # type: ignore[no-any-return]
