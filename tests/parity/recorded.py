"""Every quantity of a set by the plain reference: what `synthetic` writes, and a check of the reference itself."""

from functools import cached_property

import torch
from torch import Tensor

from tests.parity.reference import Ids, Looks, Reference, Switches
from tests.parity.sets import UNLISTED, Case, Quantity, Variant


class Recorded:
    """The recorded outputs of one case, by the reference in a chosen precision."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.dtype = dtype
        self._variants: dict[Variant, VariantOutputs] = {}

    def get(self, name: str, quantity: Quantity) -> Tensor:
        """One output."""
        variant = quantity.variant
        if variant not in self._variants:
            self._variants[variant] = VariantOutputs(self.case, variant, self.dtype)
        return getattr(self._variants[variant], quantity.kind)(name, quantity)  # type: ignore[no-any-return]

    def sequences(self, num_beams: int, max_length: int) -> tuple[Tensor, Tensor]:
        """Sequences and scores of the padded batch, every question position seen, as the authors generate."""
        outputs = self._variants.setdefault(Variant(), VariantOutputs(self.case, Variant(), self.dtype))
        return outputs.sequences(
            outputs.questions, torch.ones_like(self.case.input("question_mask")), num_beams, max_length
        )


class VariantOutputs:
    """The outputs under one variant. A method per kind of quantity."""

    def __init__(self, case: Case, variant: Variant, dtype: torch.dtype) -> None:
        self.case = case
        self.ref = Reference(
            case.document["model"],
            num_heads=case.num_heads,
            ids=Ids(**case.special_ids),
            switches=Switches.of(case.settings(variant)),
            dtype=dtype,
        )

    @cached_property
    def looks(self) -> Looks:
        return self.ref.look(self.case.pixels.flatten(0, 1))

    @cached_property
    def states(self) -> Tensor:
        """[B, T, P, D]."""
        return self.looks.hidden.unflatten(0, self.case.pixels.shape[:2])

    @cached_property
    def memory(self) -> Tensor:
        """[B, T*P, D]."""
        return self.states.flatten(1, 2)

    def visual_block(self, name: str, quantity: Quantity) -> Tensor:
        return self._as_pictures(self.looks.blocks[quantity.number("layer")].unflatten(0, self.case.pixels.shape[:2]))

    def vision_hidden(self, name: str, quantity: Quantity) -> Tensor:
        return self._as_pictures(self.states)

    def _as_pictures(self, x: Tensor) -> Tensor:
        return x if self.case.is_video else x[:, 0]

    @cached_property
    def clips(self) -> Tensor:
        return torch.stack([self.ref.clip_feature(clip[:, 0]) for clip in self.states])

    @cached_property
    def frames(self) -> Tensor:
        return torch.stack([self.ref.frame_features(clip[:, 0]) for clip in self.states])

    def clip_feature(self, name: str, quantity: Quantity) -> Tensor:
        return self.clips

    def frame_feature(self, name: str, quantity: Quantity) -> Tensor:
        return self.frames

    @cached_property
    def text_layers(self) -> list[Tensor]:
        return self.ref.bert("text_encoder", self.case.input("text_ids"), self.case.input("text_mask"))

    @cached_property
    def texts(self) -> Tensor:
        return self.ref.text_feature(self.text_layers[-1])

    def text_hidden(self, name: str, quantity: Quantity) -> Tensor:
        return self.text_layers[quantity.number("layer")]

    def text_feature(self, name: str, quantity: Quantity) -> Tensor:
        return self.texts

    def similarity(self, name: str, quantity: Quantity) -> Tensor:
        table = self.texts @ self.clips.t()
        return table if quantity.parameters["table"].startswith("t") else table.t()

    @cached_property
    def text_frames(self) -> Tensor:
        """[texts, clips, T]."""
        return torch.stack([torch.stack([frames @ text for frames in self.frames]) for text in self.texts])

    def frame_similarity(self, name: str, quantity: Quantity) -> Tensor:
        return self.text_frames

    @cached_property
    def matches(self) -> tuple[Tensor, Tensor]:
        """Hidden states [texts, clips, L, D] and logits [texts, clips, 2]."""
        ids, mask = self.case.input("text_ids"), self.case.input("text_mask")
        hidden, logits = [], []
        for text in range(len(ids)):
            rows = len(self.memory)
            similarity = self.text_frames[text] if self.ref.on.frames else None
            found = self.ref.match(
                ids[text : text + 1].expand(rows, -1), mask[text : text + 1].expand(rows, -1), self.memory, similarity
            )
            hidden.append(found[0])
            logits.append(found[1])
        return torch.stack(hidden), torch.stack(logits)

    def match_logits(self, name: str, quantity: Quantity) -> Tensor:
        return self.matches[1] if self.case.is_video else self.matches[1].transpose(0, 1)

    def match_hidden(self, name: str, quantity: Quantity) -> Tensor:
        index = quantity.number("index")
        return self.matches[0][index] if quantity.parameters["side"] == "text" else self.matches[0][:, index]

    def scores(self, name: str, quantity: Quantity) -> Tensor:
        similarity, logits = self.texts @ self.clips.t(), self.matches[1]
        if not quantity.parameters["table"].startswith("t"):
            similarity, logits = similarity.t(), logits.transpose(0, 1)
        table = torch.full_like(similarity, UNLISTED)
        for row in range(len(table)):
            for column in similarity[row].sort(descending=True, stable=True).indices[: quantity.number("k")]:
                beta = float(quantity.parameters["beta"])
                table[row, column] = logits[row, column, 1] + beta * similarity[row, column]
        return table

    @cached_property
    def questions(self) -> Tensor:
        return self.ref.question(self.case.input("question_ids"), self.case.input("question_mask"), self.memory)

    def question_hidden(self, name: str, quantity: Quantity) -> Tensor:
        return self.questions

    @cached_property
    def first(self) -> Tensor:
        masks = self.case.input("question_mask")
        return torch.stack([self.ref.first_words(q, m) for q, m in zip(self.questions, masks, strict=True)])

    def first_logits(self, name: str, quantity: Quantity) -> Tensor:
        return self.first

    def rank_probs(self, name: str, quantity: Quantity) -> Tensor:
        return torch.softmax(self.first, -1)[:, self.case.input("answer_ids")[:, 1]]

    def _rankings(self) -> list[tuple[list[int], Tensor, int]]:
        ids, answer_mask = self.case.input("answer_ids"), self.case.input("answer_mask")
        k = int(self.case.config.get("k_test", 128))
        found = []
        for states, mask in zip(self.questions, self.case.input("question_mask"), strict=True):
            ranking = self.ref.rank(states, mask, ids, answer_mask, k)
            found.append((ranking.topk, ranking.scores, ranking.topk[ranking.best]))
        return found

    def rank_topk(self, name: str, quantity: Quantity) -> Tensor:
        return torch.tensor([topk for topk, _, _ in self._rankings()])

    def rank_scores(self, name: str, quantity: Quantity) -> Tensor:
        return torch.stack([scores for _, scores, _ in self._rankings()])

    def rank_best(self, name: str, quantity: Quantity) -> Tensor:
        return torch.tensor([best for _, _, best in self._rankings()])

    def answer_ids(self, name: str, quantity: Quantity) -> Tensor:
        return self._alone(quantity)[0]

    def answer_scores(self, name: str, quantity: Quantity) -> Tensor:
        return self._alone(quantity)[1]

    def _alone(self, quantity: Quantity) -> tuple[Tensor, Tensor]:
        """With the true mask a question in a padded batch gives what it gives alone."""
        num_beams = int(quantity.parameters.get("beams", 1))
        return self.sequences(self.questions, self.case.input("question_mask"), num_beams, self.case.max_length)

    def sequences(self, states: Tensor, masks: Tensor, num_beams: int, max_length: int) -> tuple[Tensor, Tensor]:
        """Sequences [B, max_length], padded, and scores [B]."""
        answers = []
        for state, mask in zip(states, masks, strict=True):
            if num_beams == 1:
                answers.append(self.ref.greedy(state, mask, max_length))
            else:
                answers.append(self.ref.beams(state, mask, num_beams, max_length))
        ids = [[*answer.ids, *[self.ref.ids.pad] * (max_length - len(answer.ids))] for answer in answers]
        return torch.tensor(ids), torch.tensor([answer.score for answer in answers], dtype=self.ref.dtype)

    @cached_property
    def _forced(self) -> tuple[Tensor, Tensor]:
        ids, mask = self.case.input("given_answer_ids"), self.case.input("given_answer_mask")
        found = [
            self.ref.answer_losses(states, seen, ids[i : i + 1], mask[i : i + 1])
            for i, (states, seen) in enumerate(zip(self.questions, self.case.input("question_mask"), strict=True))
        ]
        return torch.cat([logits for logits, _ in found]), torch.cat([losses for _, losses in found])

    def forced_logits(self, name: str, quantity: Quantity) -> Tensor:
        return self._forced[0]

    def forced_loss(self, name: str, quantity: Quantity) -> Tensor:
        return self._forced[1]

    def train_loss(self, name: str, quantity: Quantity) -> Tensor:
        case = self.case
        counts = case.input("train_answer_counts").tolist()
        ids, mask = case.input("train_answer_ids").split(counts), case.input("train_answer_mask").split(counts)
        losses = [
            self.ref.answer_losses(self.questions[i], case.input("question_mask")[i], ids[i], mask[i])[1]
            for i in range(len(counts))
        ]
        pictures = case.pixels.shape[0] * case.pixels.shape[1]
        return (case.input("train_weights") * torch.cat(losses)).sum() / pictures

    def unit_adapter(self, name: str, quantity: Quantity) -> Tensor:
        x = self.case.unit_input(name, quantity).to(self.ref.dtype)
        out = self.ref.adapter(quantity.number("layer"), x, quantity.parameters["mode"])
        return out + x if "residual" in quantity.parameters else out

    def unit_memory(self, name: str, quantity: Quantity) -> Tensor:
        encoder = "text_decoder.bert" if quantity.parameters.get("stack") == "decoder_" else "text_encoder"
        x = self.case.unit_input(name, quantity).to(self.ref.dtype)
        return self.ref.memory_adapter(encoder, quantity.parameters["which"], x)

    def unit_vision_norm(self, name: str, quantity: Quantity) -> Tensor:
        return self.ref.norm(self.case.unit_input(name, quantity).to(self.ref.dtype), "visual_encoder.norm", 1e-6)

    def unit_text_norm(self, name: str, quantity: Quantity) -> Tensor:
        x = self.case.unit_input(name, quantity).to(self.ref.dtype)
        return self.ref.norm(x, "text_encoder.embeddings.LayerNorm", 1e-12)
