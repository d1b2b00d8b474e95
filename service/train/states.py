"""What a frozen encoder makes of media, kept within a budget: no adapter has a part in it, so once for each file will do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.config import AudioPreprocessing, Preprocessing
from adapters.families.epalm import EncoderName
from service.backbone.opt import Opt
from service.media import AnyMediaKind, MediaWorkers
from service.train.media import MediaStore


class StateStore(MediaStore[Tensor]):
    """The first token after each of an encoder's last blocks, [blocks, d] float32 on the host.

    Media are perceived one at a time: a file's states are the same bits whoever is beside it and whenever they are made.
    """

    def __init__(
        self,
        files: Sequence[Path],
        kind: AnyMediaKind,
        preprocessing: Preprocessing | AudioPreprocessing,
        workers: MediaWorkers,
        *,
        max_bytes: int,
        model: Opt,
        encoder: EncoderName,
        num_blocks: int,
    ) -> None:
        super().__init__(files, kind, preprocessing, workers, max_bytes=max_bytes)
        self._model = model
        self._encoder = encoder
        self._num_blocks = num_blocks

    def states(self, files: Sequence[int]) -> Tensor:
        """[B, blocks, d]. Raises: as `get`."""
        return torch.stack(self.get(files))

    @torch.no_grad()  # an inference tensor could not be saved for the backward pass
    def make(self, values: npt.NDArray[np.float32]) -> Tensor:
        """See MediaStore."""
        inputs = torch.from_numpy(values)[None].to(self._model.device)
        states = self._model.perceive(self._encoder, inputs)[0, -self._num_blocks :]
        return states.float().cpu().clone()  # a view would keep all blocks
