"""The linear maps of a frozen model. Packed, they multiply faster on a CPU, and take no more memory than before."""

from typing import Any

import torch
from torch import Tensor, nn

from adapters.products import Activation, has_onednn, linear, pack, unpack


class FrozenLinear(nn.Linear):
    """A linear map whose matrix may be packed; its state is the plain matrix either way."""

    packed: Tensor | None = None

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """activation(x @ weight.T + bias), [..., out] of x [..., in]."""
        return linear(x, self.weight if self.packed is None else self.packed, self.bias, activation)

    def pack(self) -> None:
        """Put the packed matrix in the plain one's place. Nothing can be trained through it from then on."""
        if self.packed is None and has_onednn(self.weight.device, self.weight.dtype):
            self.packed = pack(self.weight)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = unpack(self.packed)


class WordHead(nn.Module):
    """Words' logits by a matrix that belongs to an embedding, which looks words up in the plain one: packed, it is a copy."""

    packed: Tensor | None = None

    def forward(self, h: Tensor, words: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., V] of h [..., D], by the embeddings `words` [V, D]."""
        return linear(h, words if self.packed is None else self.packed, bias)

    def pack(self, words: Tensor) -> None:
        """Keep a packed copy of the embeddings."""
        if self.packed is None and has_onednn(words.device, words.dtype):
            self.packed = pack(words)


def pack_linears(model: nn.Module) -> None:
    """Pack every frozen linear map of a model."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            with torch.no_grad():
                module.pack()
