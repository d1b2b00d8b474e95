"""Decoding with what does not change kept, against running the language model over the whole text for every token.

    python -m loadtest.bench decode [--size tiny|opt-350m] [--batch 1] [--tokens 30]

The authors of eP-ALM decode without a cache, since the token they inject does not fit one. Both sides write the same number
of tokens greedily, for the same rows; the sequences must be equal. The window ends at the last layer but one, as in all
released configurations. Weights are random; speed does not know.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adapters.families.base import NOTHING, Schedule, SlotView, UniformAdaptation
from adapters.families.epalm import EPalm
from loadtest.bench.harness import Bench, Table, take_turns
from loadtest.bench.models import randomize
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
    randomize(model, device, dtype)
    model.pack()
    return model


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
    bench = Bench("decode", __doc__, sorted(SIZES, reverse=True), repeats=3)
    bench.parser.add_argument("--batch", type=int, default=1)
    bench.parser.add_argument("--tokens", type=int, default=30)
    arguments = bench.start(words)
    device, dtype, config = bench.device, bench.dtype, SIZES[arguments.size]
    model, adaptation = make_model(config, device, dtype), make_adaptation(config, device, dtype)
    generator = torch.Generator().manual_seed(2)
    shape = (arguments.batch, QUESTION_LENGTH)
    ids = torch.randint(FIRST_WORD, config.vocab_size, shape, generator=generator).to(device)
    features = [
        torch.randn(FEATURES, ENCODER_WIDTH, generator=generator).to(device, dtype) for _ in range(arguments.batch)
    ]
    ways = {
        name: partial(way, model, ids, features, adaptation, arguments.tokens)
        for name, way in (("cached", cached), ("uncached", uncached))
    }
    with torch.inference_mode():
        is_equal = bool(torch.equal(*(way() for way in ways.values())))
    seconds = take_turns(ways, arguments.repeats, device)
    count = arguments.batch * arguments.tokens
    table = Table(f"decoding, batch {arguments.batch}, {arguments.tokens} tokens", ("", "tokens/s", "of uncached"))
    for name, spread in seconds.items():
        table.rows.append((name, count / spread.median, seconds["uncached"].median / spread.median))
    table.rows.append(("the same sequences", str(is_equal), ""))
    bench.report([table], {"equal": is_equal, "seconds": seconds})
