"""PEFT: LoRA in the library's BLIP text or vision tower, a batch of many adapters by `adapter_names`.

LoRA is on query and value, where it is usually put; in the vision tower these are one map with the keys. Every adapter is random,
and the rank is what comes nearest to the parameters asked for. `frozen` is the library's model before PEFT has touched it.
"""

import argparse
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from turns import check_mixing, make_inputs, read_arguments, serve

# What LoRA is put on, as PEFT matches names, and the sum of a map's two widths over the model's width, for each layer.
TARGETS = {"text": (r".*\.attention\.self\.(query|value)", 2 * (1 + 1)), "vision": (r".*\.self_attn\.qkv", 1 + 3)}


def make_model(arguments: argparse.Namespace) -> nn.Module:
    """A random tower."""
    sizes = {
        "hidden_size": arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "intermediate_size": arguments.mlp_width,
    }
    if arguments.stage == "text":
        last = arguments.vocab_size - 1
        config = transformers.BlipTextConfig(
            **sizes,
            encoder_hidden_size=arguments.width,
            vocab_size=arguments.vocab_size,
            max_position_embeddings=arguments.max_positions,
            pad_token_id=0,
            bos_token_id=last,
            eos_token_id=last,
            sep_token_id=last,
        )
        return BlipTextModel(config, add_pooling_layer=False)
    config = transformers.BlipVisionConfig(
        **sizes, image_size=arguments.resolution, patch_size=arguments.patch, initializer_range=0.02
    )
    return BlipVisionModel(config)


def main() -> None:
    """Build, check that rows get what they ask for, and run what is told."""
    arguments = read_arguments(__doc__)
    pattern, widths = TARGETS[arguments.stage]
    rank = max(1, round(arguments.parameters / (arguments.layers * widths * arguments.width)))
    dtype = getattr(torch, arguments.dtype)
    plain, adapted = (make_model(arguments).to(arguments.device, dtype).eval() for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    names = [f"adapter-{number}" for number in range(arguments.batch)]
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern, init_lora_weights=False)
    model = peft.get_peft_model(adapted, lora, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, lora, autocast_adapter_dtype=False)
    model.to(dtype).eval().requires_grad_(False)
    model.set_adapter(names[-1], inference_mode=True)
    inputs = {"input_ids" if arguments.stage == "text" else "pixel_values": make_inputs(arguments)}
    ways: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: plain(**inputs).last_hidden_state,
        "one": lambda: model(**inputs).last_hidden_state,
        "mixed": lambda: model(**inputs, adapter_names=names).last_hidden_state,
    }
    with torch.inference_mode():
        check_mixing(*(ways[name]() for name in ("frozen", "one", "mixed")), arguments.dtype)
    counted = sum(p.numel() for name, p in model.named_parameters() if f".{names[0]}." in name)
    facts = {"peft": peft.__version__, "transformers": transformers.__version__, "rank": rank, "parameters": counted}
    serve(facts, ways, arguments.device)


if __name__ == "__main__":
    main()
