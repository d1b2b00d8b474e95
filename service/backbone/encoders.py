"""Perceptual encoders of a language model: what a picture, a clip or a sound looks like to each of their blocks.

An encoder gives its first token after every block, each through the final LayerNorm: the residual stream itself stays
as it is. Weights come from elsewhere; the computation is here.
Sources: ViT (Dosovitskiy et al., 2021), TimeSformer (Bertasius et al., 2021, divided space-time attention), AST (Gong et
al., 2021), and how eP-ALM's authors read them (`models/epalm.py`).

Shapes: B rows, T frames, P patches of a frame, F frequency bins, S time steps, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.backbone.config import AstConfig, TimesformerConfig, VisionConfig
from service.backbone.linear import FrozenLinear
from service.backbone.vit import Mlp, SelfAttention, VisionBlock, VisionTower


class Vit(VisionTower):
    """Looks at pictures: pixels [B, 3, R, R]."""

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """[B, blocks, D]."""
        x, states = self.embed(pixels), []
        for block in self.blocks:
            x = block(x, None)
            states.append(self.norm(x[:, 0]))
        return torch.stack(states, dim=1)


class TimesformerBlock(nn.Module):
    """Attention over time, then over space, then the MLP. The first token sees space alone."""

    def __init__(self, config: TimesformerConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.temporal_norm = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = SelfAttention(width, config.heads)
        self.temporal_fc = FrozenLinear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config.mlp_width)

    def forward(self, first: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first token [B, 1, D] and the patches [B, P, T, D] after this block.

        Every frame attends with a copy of the first token as it came in; what the copies become is averaged.
        """
        over_time = self.temporal_norm(x).flatten(0, 1)  # [B*P, T, D]
        x = x + self.temporal_fc(self.temporal_attn(over_time)).view_as(x)
        num_frames = x.shape[2]
        frames = x.transpose(1, 2).flatten(0, 1)  # [B*T, P, D]
        over_space = torch.cat([first.repeat_interleave(num_frames, dim=0), frames], dim=1)
        seen = self.attn(self.norm1(over_space))
        copies, patches = seen[:, :1], seen[:, 1:]
        first = first + copies.unflatten(0, (-1, num_frames)).mean(dim=1)
        x = x + patches.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return first + self.mlp(self.norm2(first)), x + self.mlp(self.norm2(x))


class Timesformer(nn.Module):
    """Looks at clips: pixels [B, T, 3, R, R]."""

    def __init__(self, config: TimesformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        self.time_embed = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.blocks = nn.ModuleList(TimesformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """[B, blocks, D]."""
        num_rows, num_frames = pixels.shape[:2]
        patches = self.patch_embed(pixels.flatten(0, 1))  # [B*T, D, rows, columns]
        positions = _nearest_positions(self.pos_embed, patches.shape[-2], patches.shape[-1])
        x = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        x = x.unflatten(0, (num_rows, num_frames)).transpose(1, 2)  # [B, P, T, D]
        x = x + _nearest_times(self.time_embed, num_frames)[:, None]
        first, states = (self.cls_token + positions[:, :1]).expand(num_rows, -1, -1), []
        for block in self.blocks:
            first, x = block(first, x)
            states.append(self.norm(first[:, 0]))
        return torch.stack(states, dim=1)


def _nearest_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings [1, 1 + g*g, D] on another grid by the nearest neighbour, as TimeSformer's authors do."""
    grid = round((positions.shape[1] - 1) ** 0.5)
    if (grid, grid) == (rows, columns):
        return positions
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    resized = functional.interpolate(patches, (rows, columns), mode="nearest")
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _nearest_times(times: Tensor, num_frames: int) -> Tensor:
    """Time embeddings [1, T, D] for another number of frames, by the nearest neighbour."""
    if times.shape[1] == num_frames:
        return times
    return functional.interpolate(times.transpose(1, 2), size=num_frames, mode="nearest").transpose(1, 2)


class Ast(nn.Module):
    """Listens to sounds: log mel spectrograms [B, S, F]. Its second token, of distillation, is not read."""

    def __init__(self, config: AstConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 2, width))
        strides = (config.frequency_stride, config.time_stride)
        self.patch_embed = nn.Conv2d(1, width, config.patch, strides)
        blocks = config.as_vision()
        self.blocks = nn.ModuleList(VisionBlock(blocks, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def first_tokens(self, spectrograms: Tensor) -> Tensor:
        """[B, blocks, D]."""
        patches = self.patch_embed(spectrograms.transpose(1, 2)[:, None])  # [B, D, frequencies, times]
        first = torch.cat([self.cls_token, self.dist_token], dim=1).expand(len(spectrograms), -1, -1)
        x, states = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + self.pos_embed, []
        for block in self.blocks:
            x = block(x, None)
            states.append(self.norm(x[:, 0]))
        return torch.stack(states, dim=1)


Encoder = Vit | Timesformer | Ast


def make_encoder(config: VisionConfig | TimesformerConfig | AstConfig) -> Encoder:
    """The encoder of a config."""
    match config:
        case TimesformerConfig():
            return Timesformer(config)
        case AstConfig():
            return Ast(config)
        case VisionConfig():
            return Vit(config)
