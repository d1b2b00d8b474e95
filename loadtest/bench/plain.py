"""An independent BLIP forward: what one writes with torch and scaled-dot-product attention, and nothing of the service's.

It reads a model's weights by name. Sizes as in `service.backbone.blip`: D width, H heads; no padding, no adapters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x through a linear map."""
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """x through a LayerNorm."""
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of q [B, L, D] over k and v [B, M, D]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def vision(weights: Weights, pixels: Tensor, *, layers: int, heads: int, patch: int) -> Tensor:
    """Hidden states [B, P, D] of pixels [B, 3, R, R] at the native resolution."""
    x = functional.conv2d(pixels, weights["vision.patch_embed.weight"], weights["vision.patch_embed.bias"], patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["vision.cls_token"].expand(len(x), -1, -1), x], dim=1) + weights["vision.pos_embed"]
    for layer in range(layers):
        at = f"vision.blocks.{layer}"
        q, k, v = linear(weights, f"{at}.attn.qkv", norm(weights, f"{at}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(weights, f"{at}.attn.proj", attend(q, k, v, heads))
        h = functional.gelu(linear(weights, f"{at}.mlp.fc1", norm(weights, f"{at}.norm2", x, 1e-6)))
        x = x + linear(weights, f"{at}.mlp.fc2", h)
    return norm(weights, "vision.norm", x, 1e-6)


def text(weights: Weights, ids: Tensor, *, layers: int, heads: int) -> Tensor:
    """Hidden states [B, L, D] of texts ids [B, L] of one length, read without a memory."""
    at = "text_encoder.embeddings"
    h = weights[f"{at}.word.weight"][ids] + weights[f"{at}.position.weight"][: ids.shape[1]]
    h = norm(weights, f"{at}.norm", h, 1e-12)
    for layer in range(layers):
        at = f"text_encoder.layers.{layer}"
        q, k, v = linear(weights, f"{at}.attention.qkv", h).chunk(3, dim=-1)
        read = linear(weights, f"{at}.attention.proj", attend(q, k, v, heads))
        h = norm(weights, f"{at}.attention_norm", h + read, 1e-12)
        wide = functional.gelu(linear(weights, f"{at}.mlp.fc1", h))
        h = norm(weights, f"{at}.mlp_norm", h + linear(weights, f"{at}.mlp.fc2", wide), 1e-12)
    return h


def decode_step(
    weights: Weights,
    ids: Tensor,
    past: list[tuple[Tensor, Tensor]],
    memory: list[tuple[Tensor, Tensor]],
    *,
    heads: int,
) -> Tensor:
    """Logits [B, V] behind one more token, ids [B]; `past` [B, S, D] are keys and values so far, `memory` [B, M, D] what is read."""
    at = "decoder.body.embeddings"
    position = past[0][0].shape[1]
    h = weights[f"{at}.word.weight"][ids][:, None] + weights[f"{at}.position.weight"][position]
    h = norm(weights, f"{at}.norm", h, 1e-12)
    for layer, ((keys, values), (k_memory, v_memory)) in enumerate(zip(past, memory, strict=True)):
        at = f"decoder.body.layers.{layer}"
        q, k, v = linear(weights, f"{at}.attention.qkv", h).chunk(3, dim=-1)
        read = attend(q, torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1), heads)
        h = norm(weights, f"{at}.attention_norm", h + linear(weights, f"{at}.attention.proj", read), 1e-12)
        read = attend(linear(weights, f"{at}.crossattention.query", h), k_memory, v_memory, heads)
        h = norm(weights, f"{at}.crossattention_norm", h + linear(weights, f"{at}.crossattention.proj", read), 1e-12)
        wide = functional.gelu(linear(weights, f"{at}.mlp.fc1", h))
        h = norm(weights, f"{at}.mlp_norm", h + linear(weights, f"{at}.mlp.fc2", wide), 1e-12)
    h = functional.gelu(linear(weights, "decoder.transform", h[:, -1]))
    h = norm(weights, "decoder.transform_norm", h, 1e-12)
    return functional.linear(h, weights["decoder.body.embeddings.word.weight"], weights["decoder.bias"])
