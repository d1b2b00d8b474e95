"""AdapterHub's `adapters`: bottleneck adapters in a BERT, a batch of many adapters by its composition block `BatchSplit`.

The bottleneck follows the feed-forward (`SeqBnConfig`), and is as wide as comes nearest to the parameters asked for. Every adapter is
random. `frozen` is the BERT of transformers before `adapters` has touched it. It has a text tower only.
"""

import argparse
from collections.abc import Callable

import torch
import transformers
from adapters.composition import BatchSplit
from torch import Tensor, nn
from turns import check_mixing, make_inputs, read_arguments, serve

import adapters


def make_model(arguments: argparse.Namespace) -> nn.Module:
    """A random BERT."""
    config = transformers.BertConfig(
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        intermediate_size=arguments.mlp_width,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=arguments.max_positions,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def main() -> None:
    """Build, check that rows get what they ask for, and run what is told."""
    arguments = read_arguments(__doc__)
    if arguments.stage != "text":
        raise SystemExit("this peer has a text tower only")
    width = arguments.width
    bottleneck = max(1, round((arguments.parameters / arguments.layers - width) / (2 * width + 1)))
    dtype = getattr(torch, arguments.dtype)
    plain, model = (make_model(arguments) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    adapters.init(model)
    names = [f"adapter-{number}" for number in range(arguments.batch)]
    factor = width / (bottleneck + 0.5)  # the library divides the width by it and rounds down
    config = adapters.SeqBnConfig(reduction_factor=factor, init_weights="bert")
    for name in names:
        model.add_adapter(name, config=config)
    for module in (plain, model):
        module.to(arguments.device, dtype).eval().requires_grad_(False)
    ids = make_inputs(arguments)

    def run(setup: str | BatchSplit) -> Tensor:
        model.active_adapters = setup
        return model(ids).last_hidden_state

    split = BatchSplit(*names, batch_sizes=[1] * len(names))
    ways: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: plain(ids).last_hidden_state,
        "one": lambda: run(names[-1]),
        "mixed": lambda: run(split),
    }
    with torch.inference_mode():
        check_mixing(*(ways[name]() for name in ("frozen", "one", "mixed")), arguments.dtype)
    facts = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "rank": bottleneck,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if f".{names[0]}." in name),
    }
    serve(facts, ways, arguments.device)


if __name__ == "__main__":
    main()
