"""Sets that nobody recorded: other sizes, options and names, written by the plain reference in float64.

    python -m tests.parity.synthetic OUT      then      PARITY_DATA=OUT python -m pytest tests/parity

The checkpoints have the trainers' layout: every adapter under all its names, momentum copies, queues, the decoder's unused
adapter list, tied word heads.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.recorded import Recorded
from tests.parity.sets import ATOL, RTOL, Case, meaning, read_set


@dataclass(frozen=True)
class Sizes:
    """Of one set."""

    width: int
    heads: int
    layers: int
    rank: int
    memory_rank: int
    vocabulary: int
    patch: int
    image: int
    embed: int
    positions: int
    text_length: int
    max_length: int
    special: dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """One case: how many clips, frames (None: pictures) and texts, which options, and what to record, by name."""

    task: str
    num_clips: int
    frames: int | None
    num_texts: int
    config: dict[str, Any] = field(default_factory=dict)
    names: str = ""
    momentum: bool = True


SETS: dict[str, tuple[Sizes, dict[str, Recipe]]] = {
    "narrow": (
        Sizes(24, 3, 2, 5, 3, 90, 4, 12, 20, 30, 12, 8, {"pad": 3, "cls": 80, "sep": 81, "bos": 4, "enc": 5}),
        {
            "clips": Recipe(
                "retrieval",
                2,
                3,
                5,
                {"video_key_adapter": True, "frame_aware_attention": True},
                (
                    "frame_hidden video_feat frame_feat text_feat similarity_t2v sim_t2f itm_logits multimodal_hidden_text4 "
                    "itm_logits_no_frame_weight itm_logits_no_kv_adapter itm_logits_no_kv_adapter_no_frame_weight "
                    "frozen_frame_hidden frozen_itm_logits_no_frame_weight frozen_itm_logits frozen_text_feat visual_block1_out "
                    "score_t2v_k2_beta0.125 score_v2t_k1_beta2 unit_small_video_value_adapter"
                ),
            ),
            "pictures_with_key_adapter": Recipe(
                "retrieval",
                5,
                None,
                3,
                {"video_key_adapter": True, "frame_aware_attention": True},
                (
                    "image_hidden image_embeds text_embeds similarity_i2t similarity_t2i itm_logits itm_logits_no_kv_adapter "
                    "text_hidden0 text_hidden2 multimodal_hidden_image3 multimodal_hidden_image3_no_kv_adapter frozen_itm_logits "
                    "score_i2t_k2_beta0.25 score_t2i_k2_beta0.25 score_i2t_k3_beta1 frozen_score_i2t_k2_beta0 "
                    "unit_video_key_adapter unit_video_value_adapter"
                ),
            ),
            "pictures_without_visual": Recipe(
                "retrieval",
                3,
                None,
                3,
                {"adapter_visual": False, "adapter_multimodal": "after_cross"},
                "image_hidden image_embeds text_embeds itm_logits frozen_image_hidden frozen_image_embeds visual_block0_out",
                momentum=False,
            ),
            "asked_about_pictures": Recipe(
                "vqa",
                4,
                None,
                4,
                {"video_key_adapter": True},
                (
                    "question_hidden question_hidden_no_kv_adapter first_token_logits first_token_logits_no_kv_adapter "
                    "generate_greedy_alone generate_beam3_alone generate_beam3_alone_scores generate_beam2_alone "
                    "frozen_generate_beam3_alone generate_beam3_alone_no_kv_adapter rank_first_token_probs rank_topk_ids "
                    "rank_log_probs_sum rank_max_ids teacher_forced_logits teacher_forced_loss train_loss frozen_train_loss "
                    "frozen_question_hidden unit_decoder_video_key_adapter generate_greedy generate_beam3"
                ),
            ),
        },
    ),
    "deep": (
        Sizes(32, 2, 5, 9, 20, 130, 8, 16, 7, 64, 35, 10, {"pad": 0, "cls": 127, "sep": 126, "bos": 129, "enc": 128}),
        {
            "asked_about_clips": Recipe(
                "vqa",
                3,
                5,
                3,
                {"video_key_adapter": True},
                (
                    "frame_hidden visual_block4_out question_hidden question_hidden_no_kv_adapter first_token_logits "
                    "generate_greedy_alone generate_beam4_alone generate_beam4_alone_scores rank_first_token_probs rank_topk_ids "
                    "rank_log_probs_sum rank_max_ids teacher_forced_logits teacher_forced_loss train_loss unit_video_key_adapter"
                ),
            ),
            "asked_without_key_adapter": Recipe(
                "vqa",
                2,
                2,
                2,
                {"adapter_textual": False},
                (
                    "frame_hidden question_hidden first_token_logits generate_beam3_alone generate_beam3_alone_scores "
                    "rank_topk_ids rank_log_probs_sum rank_max_ids train_loss frozen_first_token_logits"
                ),
            ),
            "clips_unweighed": Recipe(
                "retrieval",
                4,
                1,
                2,
                {"video_key_adapter": True, "frame_aware_attention": False},
                (
                    "frame_hidden video_feat text_feat itm_logits itm_logits_no_kv_adapter text_hidden5 score_t2v_k3_beta0.5"
                ),
            ),
            "pictures_frozen_but_for_text": Recipe(
                "retrieval",
                2,
                None,
                4,
                {"adapter_visual": False, "adapter_multimodal": True, "adapter_textual": True},
                "image_hidden image_embeds text_embeds itm_logits multimodal_hidden_image1 score_i2t_k2_beta0",
            ),
        },
    ),
}


class Maker:
    """Draws one case's weights and inputs."""

    def __init__(self, sizes: Sizes, recipe: Recipe, seed: int) -> None:
        self.sizes = sizes
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> dict[str, Tensor]:
        return {
            f"{name}.weight": gain * self.normal(rows, columns) / columns**0.5,
            f"{name}.bias": 0.1 * self.normal(rows),
        }

    def norm(self, name: str) -> dict[str, Tensor]:
        width = self.sizes.width
        return {f"{name}.weight": 1 + 0.2 * self.normal(width), f"{name}.bias": 0.1 * self.normal(width)}

    def state(self) -> dict[str, Tensor]:
        """The complete state dict."""
        state = self.visual("visual_encoder") | self.bert("text_encoder")
        if self.recipe.task == "vqa":
            state |= self.bert("text_decoder.bert")
            state |= self.word_head(state["text_decoder.bert.embeddings.word_embeddings.weight"])
            state |= self.adapters("adapters_dec")
        else:
            state |= self.heads("") | {"temp": torch.tensor(0.07)}
        adapters = self.adapters("adapters")
        state |= adapters | self.aliases(adapters, "")
        if self.recipe.task == "retrieval" and self.recipe.momentum:
            state |= self.momentum()
        return state

    def visual(self, name: str) -> dict[str, Tensor]:
        s = self.sizes
        tokens = (s.image // s.patch) ** 2 + 1
        state = {
            f"{name}.cls_token": self.normal(1, 1, s.width),
            f"{name}.pos_embed": 0.5 * self.normal(1, tokens, s.width),
        }
        state |= {
            f"{name}.patch_embed.proj.weight": self.normal(s.width, 3, s.patch, s.patch) / (3 * s.patch**2) ** 0.5
        }
        state |= {f"{name}.patch_embed.proj.bias": 0.1 * self.normal(s.width)} | self.norm(f"{name}.norm")
        for i in range(s.layers):
            block = f"{name}.blocks.{i}"
            state |= self.norm(f"{block}.norm1") | self.norm(f"{block}.norm2")
            state |= self.linear(f"{block}.attn.qkv", 3 * s.width, s.width, 1.5)
            state |= self.linear(f"{block}.attn.proj", s.width, s.width)
            state |= self.linear(f"{block}.mlp.fc1", 4 * s.width, s.width)
            state |= self.linear(f"{block}.mlp.fc2", s.width, 4 * s.width)
        return state

    def bert(self, name: str) -> dict[str, Tensor]:
        s = self.sizes
        state = {
            f"{name}.embeddings.position_ids": torch.arange(s.positions)[None],
            f"{name}.embeddings.word_embeddings.weight": 0.6 * self.normal(s.vocabulary, s.width),
            f"{name}.embeddings.position_embeddings.weight": 0.3 * self.normal(s.positions, s.width),
        } | self.norm(f"{name}.embeddings.LayerNorm")
        for i in range(s.layers):
            layer = f"{name}.encoder.layer.{i}"
            for attention in ("attention", "crossattention"):
                for which in ("query", "key", "value"):
                    state |= self.linear(f"{layer}.{attention}.self.{which}", s.width, s.width, 1.5)
                state |= self.linear(f"{layer}.{attention}.output.dense", s.width, s.width)
                state |= self.norm(f"{layer}.{attention}.output.LayerNorm")
            state |= self.linear(f"{layer}.intermediate.dense", 4 * s.width, s.width)
            state |= self.linear(f"{layer}.output.dense", s.width, 4 * s.width) | self.norm(f"{layer}.output.LayerNorm")
        if self.recipe.config.get("video_key_adapter"):
            for which in ("key", "value"):
                adapter = f"{name}.encoder.video_{which}_adapter"
                state |= self.linear(f"{adapter}.down_proj", s.memory_rank, s.width)
                state |= self.linear(f"{adapter}.up_proj", s.width, s.memory_rank)
                state |= {f"{adapter}.scale": 1 + 0.5 * self.normal(1)}
        return state

    def word_head(self, words: Tensor) -> dict[str, Tensor]:
        name, s = "text_decoder.cls.predictions", self.sizes
        bias = 0.3 * self.normal(s.vocabulary)
        bias[s.special["sep"]] += 2.0  # so that sequences end now and then
        head = {f"{name}.bias": bias, f"{name}.decoder.bias": bias, f"{name}.decoder.weight": words}
        return (
            head | self.linear(f"{name}.transform.dense", s.width, s.width) | self.norm(f"{name}.transform.LayerNorm")
        )

    def heads(self, suffix: str) -> dict[str, Tensor]:
        s = self.sizes
        heads = self.linear(f"vision_proj{suffix}", s.embed, s.width) | self.linear(
            f"text_proj{suffix}", s.embed, s.width
        )
        return heads if suffix else heads | self.linear("itm_head", 2, s.width)

    def adapters(self, name: str) -> dict[str, Tensor]:
        s = self.sizes
        state: dict[str, Tensor] = {}
        for i in range(s.layers):
            prefix = f"{name}.{i}"
            state |= self.norm(f"{prefix}.adapter_layer_norm_before")
            state |= self.norm(f"{prefix}.adapter_layer_norm_cross_modal")
            state |= self.linear(f"{prefix}.down_proj", s.rank, s.width)
            for up in ("up_proj", "multi_up_proj", "visual_up_proj"):
                state |= self.linear(f"{prefix}.{up}", s.width, s.rank, 2.0)
        return state

    def aliases(self, adapters: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
        """The other names of the same tensors."""
        prefixes = [f"visual_encoder{suffix}.adapters.{{i}}", f"text_encoder{suffix}.encoder.layer.{{i}}.adapter"]
        if self.recipe.config.get("adapter_visual", True):
            prefixes.append(f"visual_encoder{suffix}.blocks.{{i}}.adapter")
        if self.recipe.task == "vqa":
            prefixes.append("text_decoder.bert.encoder.layer.{i}.adapter")
        named: dict[str, Tensor] = {}
        for name, tensor in adapters.items():
            _, i, rest = name.split(".", 2)
            named |= {f"{prefix.format(i=i)}.{rest}": tensor for prefix in prefixes}
        return named

    def momentum(self) -> dict[str, Tensor]:
        """Copies with other values, and the queues."""
        adapters = self.adapters("adapters_m")
        state = self.visual("visual_encoder_m") | self.bert("text_encoder_m") | self.heads("_m")
        state |= adapters | self.aliases(adapters, "_m")
        return state | {
            "image_queue": self.normal(self.sizes.embed, 6),
            "text_queue": self.normal(self.sizes.embed, 6),
            "idx_queue": torch.full((1, 6), -100),
            "ptr_queue": torch.zeros(1, dtype=torch.long),
        }

    def inputs(self) -> dict[str, Tensor]:
        """Everything under `input.`."""
        s, r = self.sizes, self.recipe
        pixels = self.normal(r.num_clips, r.frames or 1, 3, s.image, s.image)
        inputs = {"video": pixels} if r.frames is not None else {"image": pixels[:, 0]}
        inputs |= {"unit_x": 1.5 * self.normal(2, 3, s.width)}
        inputs["unit_x_small"] = 0.01 * inputs["unit_x"]
        if r.task == "retrieval":
            inputs |= self.sentences("text", "cls", [3 + 2 * i for i in range(r.num_texts)], s.text_length)
        else:
            inputs |= self.sentences("question", "cls", [4 + 3 * i for i in range(r.num_texts)])
            inputs |= self.answers()
            inputs |= self.sentences("given_answer", "bos", [3 + i for i in range(r.num_texts)])
            counts = [1 + i % 2 for i in range(r.num_texts)]
            inputs |= self.sentences("train_answer", "bos", [3 + i for i in range(sum(counts))])
            inputs |= {
                "train_answer_counts": torch.tensor(counts),
                "train_weights": 0.2 + self.normal(sum(counts)).abs(),
            }
        return {f"input.{name}": tensor.contiguous() for name, tensor in inputs.items()}

    def answers(self) -> dict[str, Tensor]:
        """Candidates whose first words differ, so that the order of no shortlist is open."""
        answers = self.sentences("answer", "bos", [3 + i % 4 for i in range(11)])
        answers["answer_ids"][:, 1] = self.words(len(answers["answer_ids"]))
        return answers

    def words(self, count: int) -> Tensor:
        """Different words, none special."""
        allowed = torch.tensor([w for w in range(self.sizes.vocabulary) if w not in self.sizes.special.values()])
        return allowed[torch.randperm(len(allowed), generator=self.generator)[:count]]

    def sentences(self, kind: str, first: str, lengths: list[int], padded: int | None = None) -> dict[str, Tensor]:
        special, length = self.sizes.special, padded or max(lengths)
        ids = torch.full((len(lengths), length), special["pad"])
        mask = torch.zeros_like(ids)
        for row, count in enumerate(lengths):
            ids[row, :count] = torch.tensor([special[first], *self.words(count - 2).tolist(), special["sep"]])
            mask[row, :count] = 1
        return {f"{kind}_ids": ids, f"{kind}_mask": mask}

    def config(self) -> dict[str, Any]:
        """As a trainer's yaml, keys that mean nothing here included."""
        s = self.sizes
        config: dict[str, Any] = {
            "adapter": True,
            "adapter_textual": True,
            "adapter_visual": True,
            "adapter_multimodal": True,
        }
        config |= {
            "temporal_embed": False,
            "video_key_adapter": False,
            "image_size": s.image,
            "k_test": 4,
            "vit": "base",
        }
        return (
            config | {"adapter_dim": s.rank, "adapter_visual_dim": s.rank, "batch_size_train": 8} | self.recipe.config
        )


def write_sets(root: Path) -> list[Path]:
    """Write all sets below `root/uniadapter`; returns their folders."""
    return [_write_set(root / "uniadapter" / name, sizes, recipes) for name, (sizes, recipes) in SETS.items()]


def _write_set(folder: Path, sizes: Sizes, recipes: Mapping[str, Recipe]) -> Path:
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"set": folder.name, "special_token_ids": sizes.special, "cases": {}}
    facts["generate"] = {"max_length": sizes.max_length}
    for seed, (name, recipe) in enumerate(recipes.items()):
        maker = Maker(sizes, recipe, 100 + seed)
        torch.save({"model": maker.state(), "config": maker.config(), "epoch": 3}, folder / f"{name}.pth")
        inputs = maker.inputs()
        save_file(inputs, folder / f"{name}.safetensors")
        described = {key: {"shape": list(tensor.shape)} for key, tensor in inputs.items()}
        facts["cases"][name] = {
            "checkpoint": f"{name}.pth",
            "tensors_file": f"{name}.safetensors",
            "num_heads": sizes.heads,
            "tensors": described,
        }
    (folder / "cases.json").write_text(json.dumps(facts))
    for case in read_set(folder):
        expected = _expected(case, [*recipes[case.name].names.split(), *_unit_names(sizes)], sizes)
        save_file({**case.tensors, **expected}, folder / case.facts["tensors_file"])
        entries = facts["cases"][case.name]["tensors"]
        entries |= {name: _entry(name, tensor) for name, tensor in expected.items()}
    (folder / "cases.json").write_text(json.dumps(facts, indent=1))
    return folder


def _unit_names(sizes: Sizes) -> list[str]:
    last = sizes.layers - 1
    names = [f"unit_adapter{last}_{mode}" for mode in ("text", "visual", "multimodal", "visual_residual")]
    return [*names, "unit_small_adapter0_multimodal", "unit_small_vit_final_norm", "unit_small_text_embedding_norm"]


def _entry(name: str, tensor: Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if name.endswith("small_text_embedding_norm"):
        entry["meaning"] = "text_encoder.embeddings.LayerNorm(0.01*unit_x_small)"
    if tensor.is_floating_point():
        entry |= {"atol": 1e-6 if ".unit_" in name else ATOL, "rtol": RTOL}
    return entry


def _expected(case: Case, names: list[str], sizes: Sizes) -> dict[str, Tensor]:
    recorded = Recorded(case, torch.float64)
    expected = {}
    for name in names:
        if name in ("generate_greedy", "generate_beam3"):  # with padding seen; nobody compares these
            tensor = recorded.sequences(1 if name.endswith("greedy") else 3, sizes.max_length)[0]
        else:
            case.facts["tensors"][f"expected.{name}"] = _entry(f"expected.{name}", torch.zeros(0))
            tensor = recorded.get(name, meaning(name))
            del case.facts["tensors"][f"expected.{name}"]
        expected[f"expected.{name}"] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()
    return expected


if __name__ == "__main__":
    for written in write_sets(Path(sys.argv[1])):
        print(written)
