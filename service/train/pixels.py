"""Media files -> pixels: decoded by media workers, kept in memory as bytes within a budget."""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.config import Preprocessing
from adapters.errors import ConversionError
from service.errors import BadMedia, MissingMedia, UnsupportedMedia
from service.media import MediaKind, MediaWorkers, decode_image, decode_video, media_kind
from service.media import Preprocessing as PixelPreprocessing

Pictures = npt.NDArray[np.uint8]

IN_FLIGHT = 32  # files given to the workers at once: all stay busy, and results do not pile up
_NAMES: dict[MediaKind, str] = {"image": "a picture", "video": "a clip"}


class PixelStore:
    """Decoded media as 8-bit frames [T, 3, R, R]; those used least recently make room. For one thread at a time.

    What `pixels` gives is bit for bit what the service would feed the vision tower.
    """

    def __init__(
        self, files: Sequence[Path], preprocessing: Preprocessing, workers: MediaWorkers, *, max_bytes: int
    ) -> None:
        self.files = files
        self.kind: MediaKind | None = None
        self._preprocessing = preprocessing
        self._workers = workers
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, Pictures] = OrderedDict()
        self._bytes = 0

    def check(self, lines_of: Callable[[int], Sequence[int]], report: Callable[[], object]) -> dict[int, str]:
        """Decode every file once; the reasons, by file, why some cannot be used. The others are of one kind.

        `report` is called after each file. Raises: ConversionError where pictures and clips are mixed.
        """
        kinds, broken = self._sniff()
        self._set_kind(kinds, lines_of)
        for _ in broken:
            report()
        waiting = iter(kinds)
        pending = deque((file, self._decode(file)) for file in islice(waiting, IN_FLIGHT))
        while pending:
            file, decoding = pending.popleft()
            try:
                self._keep(file, self._to_bytes(decoding.result()))
            except (BadMedia, MissingMedia) as error:
                broken[file] = error.message
            pending.extend((file, self._decode(file)) for file in islice(waiting, 1))
            report()
        return broken

    def _sniff(self) -> tuple[dict[int, MediaKind], dict[int, str]]:
        """What each file claims to be, and why some are nothing we read."""
        kinds: dict[int, MediaKind] = {}
        broken: dict[int, str] = {}
        for file in range(len(self.files)):
            try:
                kinds[file] = self._kind_of(file)
            except (BadMedia, MissingMedia) as error:
                broken[file] = error.message
        return kinds, broken

    def _set_kind(self, kinds: Mapping[int, MediaKind], lines_of: Callable[[int], Sequence[int]]) -> None:
        firsts = {kind: file for file, kind in reversed(list(kinds.items()))}
        if len(firsts) > 1:
            ordered = sorted(firsts.items(), key=lambda item: item[1])
            places = " and ".join(f"{_NAMES[kind]} in line {lines_of(file)[0]}" for kind, file in ordered)
            raise ConversionError(f"{places}: an adapter is trained on one or the other", param="data")
        self.kind = next(iter(firsts), None)

    def trust(self, file: int) -> None:
        """Take an earlier check's word that all usable files are of the kind of this one."""
        self.kind = self._kind_of(file)

    def pixels(self, files: Sequence[int]) -> Tensor:
        """Normalised pixels [B, T, 3, R, R]. Raises: BadMedia, MissingMedia for what was fine when it was checked."""
        missing = [file for file in dict.fromkeys(files) if file not in self._kept]
        found = {file: self._kept[file] for file in files if file in self._kept}
        decoding = {file: self._decode(file) for file in missing}
        for file, future in decoding.items():
            found[file] = self._to_bytes(future.result())
            self._keep(file, found[file])
        for file in found:
            if file in self._kept:
                self._kept.move_to_end(file)
        return self._normalised(torch.from_numpy(np.stack([found[file] for file in files])))

    def _kind_of(self, file: int) -> MediaKind:
        path = self.files[file]
        try:
            with open(path, "rb") as stream:
                kind = media_kind(stream.read(12))
        except OSError as error:
            raise MissingMedia(f"{path.name} cannot be read: {error.strerror}") from error
        if kind is None:
            raise UnsupportedMedia("neither a picture nor a clip we read")
        return kind

    def _decode(self, file: int) -> "Future[Any]":
        wanted = self._preprocessing
        prep = PixelPreprocessing(wanted.resolution, wanted.mean, wanted.std)
        limits = self._workers.limits
        if self.kind == "image":
            return self._workers.submit(decode_image, self.files[file], prep, limits)
        return self._workers.submit(decode_video, self.files[file], prep, wanted.num_frames, limits)

    def _to_bytes(self, decoded: Any) -> Pictures:
        """Undo the normalisation, which came after the last rounding: exact."""
        frames = decoded[None] if self.kind == "image" else decoded.frames
        scaled = (frames * _column(self._preprocessing.std) + _column(self._preprocessing.mean)) * 255
        return np.rint(scaled).astype(np.uint8)  # type: ignore[no-any-return]

    def _normalised(self, frames: Tensor) -> Tensor:
        """The same two operations, in the same order, as `service.media.picture`."""
        mean, std = np.array(self._preprocessing.mean), np.array(self._preprocessing.std)
        factor, shift = (torch.tensor(values, dtype=torch.float32) for values in (1 / (255 * std), mean / std))
        return frames.float().mul_(factor.view(3, 1, 1)).sub_(shift.view(3, 1, 1))

    def _keep(self, file: int, frames: Pictures) -> None:
        if file in self._kept or frames.nbytes > self._max_bytes:
            return
        self._kept[file] = frames
        self._bytes += frames.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


def _column(values: Sequence[float]) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32).reshape(3, 1, 1)
