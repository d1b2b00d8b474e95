"""How a peer talks to the benchmark: names of ways come in, one a line; the seconds each took go out, as lines of JSON.

The first line out is about the peer itself. A peer runs in an environment of its own and imports nothing of this project. By hand:

    printf 'frozen\\nmixed\\n' | .peers/peft/bin/python loadtest/peers/peft_lora.py
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


def read_arguments(doc: str | None) -> argparse.Namespace:
    """What every peer is told; the defaults are BERT-base and a ViT-B/16 at 384 pixels."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("text", "vision"), default="text")
    parser.add_argument("--batch", type=int, default=16, help="rows, each with an adapter of its own")
    parser.add_argument("--length", type=int, default=35, help="tokens of a text")
    parser.add_argument("--parameters", type=int, default=2_370_048, help="of an adapter, as nearly as its rank allows")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--mlp-width", type=int, default=3072)
    parser.add_argument("--vocab-size", type=int, default=30524)
    parser.add_argument("--max-positions", type=int, default=512)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: as many as it takes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def make_inputs(arguments: argparse.Namespace) -> Tensor:
    """Random ids [B, L], or pixels [B, 3, R, R]."""
    if arguments.stage == "text":
        inputs = torch.randint(5, arguments.vocab_size, (arguments.batch, arguments.length))
    else:
        inputs = torch.randn(arguments.batch, 3, arguments.resolution, arguments.resolution)
        inputs = inputs.to(getattr(torch, arguments.dtype))
    return inputs.to(arguments.device)


def check_mixing(frozen: Tensor, alone: Tensor, mixed: Tensor, dtype: str) -> None:
    """Hold a mixed batch [B, L, D] to its last row's adapter alone, and to the model without adapters. Raises: RuntimeError."""
    tolerance = TOLERANCE[dtype]
    if not torch.allclose(mixed[-1], alone[-1], rtol=tolerance, atol=tolerance):
        raise RuntimeError("a row of the mixed batch differs from the same row with its adapter alone")
    unchanged = [row for row in range(len(mixed)) if torch.equal(mixed[row], frozen[row])]
    if unchanged:
        raise RuntimeError(f"rows {unchanged} of the mixed batch are as they are without an adapter")


def serve(facts: Mapping[str, object], ways: Mapping[str, Callable[[], object]], device: str) -> None:
    """Tell the facts, then run what is asked for until there is no more."""
    print(json.dumps({**facts, "torch": torch.__version__, "ways": list(ways)}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            way = ways[line.strip()]
            start = time.perf_counter()
            way()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
