"""Decoding with what does not change kept, against running the language model over the whole text for every token.

    python -m loadtest.bench decode [--size tiny|opt-350m] [--device cpu|cuda] [--dtype float32|bfloat16] [--batch 1]
                                    [--tokens 30] [--repeats 3]

The authors of eP-ALM decode without a cache, since the token they inject does not fit one. Both sides write the same number
of tokens greedily, for the same rows; the sequences must be equal. The window ends at the last layer but one, as in all
released configurations. Weights are random; speed does not know. A table for people, the last line JSON.
"""

import argparse
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.families.base import NOTHING, Schedule, SlotView, UniformAdaptation
from adapters.families.epalm import EPalm
from loadtest.bench.timing import medians
from service.backbone.config import LanguageModelConfig, OptConfig, OptSpecialIds
from service.backbone.opt import Opt

SIZES = {
    "tiny": LanguageModelConfig(
        width=64, layers=6, heads=4, mlp_width=256, vocab_size=1000, max_positions=128, word_width=64
    ),
    "opt-350m": LanguageModelConfig(
        width=1024,
        layers=24,
        heads=16,
        mlp_width=4096,
        vocab_size=50272,
        max_positions=2048,
        word_width=512,
        pre_norm=False,
        final_norm=False,
    ),
}
ENCODER_WIDTH, FEATURES, PROMPT_LENGTH, QUESTION_LENGTH = 768, 6, 10, 8
FIRST_WORD = 5


def make_model(config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> Opt:
    """A random model; small numbers, so that nothing overflows."""
    with torch.device(device):
        model = Opt(OptConfig(language_model=config, special_ids=OptSpecialIds(pad=1, bos=2, eos=2)))
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


def make_adaptation(config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> UniformAdaptation:
    """One connector a feature and a prompt, over a window of the upper layers."""
    generator = torch.Generator().manual_seed(1)
    start = config.layers // 2
    layers = [
        min((layer - start) // 2, FEATURES - 1) if start <= layer < config.layers - 1 else NOTHING
        for layer in range(config.layers)
    ]
    tensors = {
        "connector.weight": torch.randn(FEATURES, config.width, ENCODER_WIDTH, generator=generator) * 0.05,
        "connector.bias": torch.zeros(FEATURES, config.width),
        "prompt": torch.randn(PROMPT_LENGTH, config.word_width, generator=generator) * 0.1,
    }
    slot = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return UniformAdaptation(SlotView(EPalm(), slot, Schedule(FEATURES, tuple(layers))))


def cached(model: Opt, ids: Tensor, features: list[Tensor], adaptation: UniformAdaptation, num_tokens: int) -> Tensor:
    """[B, L + num_tokens], greedily, by `Opt.decode`."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    decoding = model.decode(ids, mask, features, adaptation, max_new_tokens=num_tokens)
    logits = decoding.logits()
    for step in range(num_tokens):
        words = logits.argmax(-1)
        ids = torch.cat([ids, words[:, None]], dim=1)
        if step + 1 < num_tokens:
            logits = decoding.step(words)
    return ids


def uncached(model: Opt, ids: Tensor, features: list[Tensor], adaptation: UniformAdaptation, num_tokens: int) -> Tensor:
    """The same by whole forwards."""
    for _ in range(num_tokens):
        hidden = model.score(ids, torch.ones_like(ids, dtype=torch.bool), features, adaptation)
        ids = torch.cat([ids, hidden[:, -1].argmax(-1)[:, None]], dim=1)
    return ids


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        prog="loadtest.bench decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(words)
    device, dtype, config = torch.device(arguments.device), getattr(torch, arguments.dtype), SIZES[arguments.size]
    model, adaptation = make_model(config, device, dtype), make_adaptation(config, device, dtype)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(FIRST_WORD, config.vocab_size, (arguments.batch, QUESTION_LENGTH), generator=generator).to(
        device
    )
    features = [
        torch.randn(FEATURES, ENCODER_WIDTH, generator=generator).to(device, dtype) for _ in range(arguments.batch)
    ]
    with torch.inference_mode():
        results = [way(model, ids, features, adaptation, arguments.tokens) for way in (cached, uncached)]
    is_equal = bool(torch.equal(*results))
    seconds = medians(
        {
            "cached": lambda: cached(model, ids, features, adaptation, arguments.tokens),
            "uncached": lambda: uncached(model, ids, features, adaptation, arguments.tokens),
        },
        arguments.repeats,
        device,
    )
    count = arguments.batch * arguments.tokens
    print(
        f"decoding, {arguments.size}, batch {arguments.batch}, {arguments.tokens} tokens, {arguments.dtype} on {device}\n"
    )
    print(f"{'':24s}{'tokens/s':>10s}{'of uncached':>14s}")
    for name, value in seconds.items():
        print(f"{name:24s}{count / value:10.1f}{seconds['uncached'] / value:14.2f}")
    print(f"the same sequences: {is_equal}")
    result = {"bench": "decode", "size": arguments.size, "batch": arguments.batch, "tokens": arguments.tokens}
    result |= {"dtype": arguments.dtype, "device": str(device), "equal": is_equal}
    print(json.dumps(result | {"median_s": seconds}))
