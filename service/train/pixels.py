"""Pixels of media as a vision tower reads them, kept in memory as bytes within a budget."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.config import Preprocessing
from service.train.media import MediaStore

Pictures = npt.NDArray[np.uint8]


class PixelStore(MediaStore[Pictures]):
    """Decoded pictures or clips as 8-bit frames [T, 3, R, R].

    What `pixels` gives is bit for bit what the service would feed the vision tower.
    """

    def pixels(self, files: Sequence[int]) -> Tensor:
        """Normalised pixels [B, T, 3, R, R]. Raises: as `get`."""
        return self._normalised(torch.from_numpy(np.stack(self.get(files))))

    def make(self, values: npt.NDArray[np.float32]) -> Pictures:
        """See MediaStore. Undoes the normalisation, which came after the last rounding: exact."""
        frames = values[None] if self.kind == "image" else values
        wanted = self._pixels
        scaled = (frames * _column(wanted.std) + _column(wanted.mean)) * 255
        return np.rint(scaled).astype(np.uint8)  # type: ignore[no-any-return]

    def _normalised(self, frames: Tensor) -> Tensor:
        """The same two operations, in the same order, as `service.media.picture`."""
        mean, std = np.array(self._pixels.mean), np.array(self._pixels.std)
        factor, shift = (torch.tensor(values, dtype=torch.float32) for values in (1 / (255 * std), mean / std))
        return frames.float().mul_(factor.view(3, 1, 1)).sub_(shift.view(3, 1, 1))

    @property
    def _pixels(self) -> Preprocessing:
        assert isinstance(self._preprocessing, Preprocessing), "a sound has no pixels. This is a bug."
        return self._preprocessing


def _column(values: Sequence[float]) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32).reshape(3, 1, 1)
