"""The vision transformer: a frozen BLIP's vision tower, and the building blocks that other towers share with it.

Shapes: B rows, P tokens of a picture (CLS first), L tokens, K keys, D width, H heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.base import Site, Terms
from service.backbone.config import VisionConfig
from service.backbone.linear import FrozenLinear


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H*d] -> [B, H, L, d]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H*d]."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one query-key-value map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = FrozenLinear(width, 3 * width)
        self.proj = FrozenLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention output [B, L, D] of x [B, L, D], every position over all."""
        q, k, v = self.split(x)
        return self.attend(q, k, v, None)

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys and values [3, B, H, L, d] of x [B, L, D]: a view of one product."""
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention output [B, L, D]; `mask` broadcasts to [B, H, L, K], True where a key is seen."""
        return self.proj(merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear maps with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = FrozenLinear(width, hidden)
        self.fc2 = FrozenLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, "gelu"))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """Pre-norm transformer block; the adapter's term is parallel to the MLP."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        self.site = Site("vision", layer, "mlp")
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = SelfAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, adaptation: Terms | None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out = x + self.mlp(self.norm2(x))
        return out if adaptation is None else adaptation.add(self.site, x, out)


class VisionTower(nn.Module):
    """Patches, positions, blocks and the final LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.blocks = nn.ModuleList(VisionBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def embed(self, pixels: Tensor) -> Tensor:
        """What enters the first block, [B, P, D], of pixels [B, 3, R, R]."""
        patches = self.patch_embed(pixels)  # [B, D, rows, columns]
        positions = interpolate_positions(self.pos_embed, patches.shape[-2], patches.shape[-1])
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + positions

    def forward(self, pixels: Tensor, adaptation: Terms | None = None) -> Tensor:
        """Hidden states [B, P, D], after the final LayerNorm, of pixels [B, 3, R, R]."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x, adaptation)
        return self.norm(x)  # type: ignore[no-any-return]


def interpolate_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings [1, 1 + g*g, D] on another grid [1, 1 + rows*columns, D]: CLS kept, patches bicubic.

    Source: the authors' `interpolate_pos_embed` (align_corners false).
    """
    grid = math.isqrt(positions.shape[1] - 1)
    if (grid, grid) == (rows, columns):
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    patches = patches.transpose(1, 2).unflatten(2, (grid, grid))
    resized = functional.interpolate(patches.float(), (rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)
