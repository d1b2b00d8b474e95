"""What was served beside what was recorded: a method per kind of quantity, and the companions beside the reference."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import Adaptation, Site, Stack
from adapters.training.adapter import TrainableAdapter
from adapters.training.data import AnswerBatch, RetrievalBatch
from adapters.training.losses import answer_loss, shifted_nll
from adapters.training.objectives import EncodedPairs, encode_pairs, match_logits, question_states, vqa_loss
from service.backbone.blip import Blip
from service.gallery.frames import pool
from service.pipelines.retrieve import match_scores
from service.types import MatchInput, MatchOutput, TextOutput, VisionOutput
from tests.devices import DEVICE
from tests.parity.companions import Companion
from tests.parity.serving import Rows, Served
from tests.parity.sets import ATOL, OWN, RTOL, Case, Comparison, Quantity, compare

UNIT_ATOL = 1e-6
NEAR_TIE = 1e-4  # below this gap a choice may fall either way
Got = list[tuple[str, Tensor]]


class Claims:
    """The comparisons of one served case."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.case: Case = served.case

    @torch.no_grad()
    def of(self, name: str) -> list[Comparison]:
        """Every comparison with one recorded output; more than one where several of our paths give it."""
        quantity = self.case.claimed[name]
        expected, (atol, rtol) = self.case.ordered(name, quantity), self.case.tolerance(name)
        got: Got = getattr(self, quantity.kind)(name, quantity)
        assert got, f"nothing was compared with expected.{name}"
        return [compare(f"{name} ({label})" if label else name, tensor, expected, atol, rtol) for label, tensor in got]

    def all(self) -> list[Comparison]:
        """Every comparison of the case, its companions' included."""
        return [c for name in self.case.claimed for c in self.of(name)] + self.companions()

    def rows(self, quantity: Quantity) -> Rows:
        """The rows served under the quantity's variant."""
        return self.served.rows[quantity.variant]

    # --- vision ------------------------------------------------------------------------------------------

    def _as_pictures(self, clips: list[Tensor]) -> Tensor:
        """[B, T, ...] of clips; [B, ...] of pictures."""
        stacked = torch.stack(clips)
        return stacked if self.case.is_video else stacked[:, 0]

    def visual_block(self, name: str, quantity: Quantity) -> Got:
        place = f"vision.{quantity.number('layer')}"
        return [("", self._as_pictures([ran.rows(place) for ran in self.rows(quantity).vision]))]

    def vision_hidden(self, name: str, quantity: Quantity) -> Got:
        return [("", self._as_pictures(self.rows(quantity).states))]

    def clip_feature(self, name: str, quantity: Quantity) -> Got:
        got = [("", self._clips(self.rows(quantity)))]
        return [*got, ("training", self.trained_pairs.clips)] if quantity.variant == OWN else got

    def _clips(self, rows: Rows) -> Tensor:
        """As a gallery pools them."""
        return torch.stack([torch.from_numpy(pool(frames.numpy())) for frames in rows.frames])

    def frame_feature(self, name: str, quantity: Quantity) -> Got:
        got = [("", functional.normalize(torch.stack(self.rows(quantity).frames), dim=-1))]
        return [*got, ("training", self.trained_pairs.frames)] if quantity.variant == OWN else got

    # --- texts and pairs ---------------------------------------------------------------------------------

    @property
    def text_length(self) -> int:
        return self.case.input("text_ids").shape[1]

    def text_hidden(self, name: str, quantity: Quantity) -> Got:
        place = f"text.{quantity.number('layer')}"
        rows = torch.cat([ran.rows(place) for ran in self.rows(quantity).text])
        return [("", rows[:, : self.text_length])]

    def text_feature(self, name: str, quantity: Quantity) -> Got:
        got = [("", self.rows(quantity).texts)]
        return [*got, ("training", self.trained_pairs.texts)] if quantity.variant == OWN else got

    def similarity(self, name: str, quantity: Quantity) -> Got:
        return [("", self._table(self._similarity(self.rows(quantity)), quantity))]

    def _similarity(self, rows: Rows) -> Tensor:
        return rows.texts @ self._clips(rows).t()

    def _table(self, by_text: Tensor, quantity: Quantity) -> Tensor:
        """[texts, clips, ...] as the table's name orders it."""
        return by_text if quantity.parameters["table"].startswith("t") else by_text.transpose(0, 1)

    def frame_similarity(self, name: str, quantity: Quantity) -> Got:
        inputs = [ran.job.inputs for ran in self.rows(quantity).match]
        given = [i.similarities for i in inputs if isinstance(i, MatchInput)]
        return [("", torch.stack([torch.stack([s for s in row if s is not None]) for row in given]))]

    def match_logits(self, name: str, quantity: Quantity) -> Got:
        got = [("", self.rows(quantity).logits())]
        if quantity.variant == OWN:
            got.append(("training", self._trained_logits()))
        return [(label, logits if self.case.is_video else logits.transpose(0, 1)) for label, logits in got]

    def match_hidden(self, name: str, quantity: Quantity) -> Got:
        index, length = quantity.number("index"), self.text_length
        matched = self.rows(quantity).match
        if quantity.parameters["side"] == "text":
            return [("", matched[index].rows("text")[:, :length])]
        return [("", torch.stack([ran.rows("text")[index, :length] for ran in matched]))]

    def scores(self, name: str, quantity: Quantity) -> Got:
        """By the function behind the rerank mode `match`, with logits that were served."""
        rows = self.rows(quantity)
        similarity = self._table(self._similarity(rows), quantity).numpy()
        logits = self._table(rows.logits(), quantity).numpy()
        k, beta = quantity.number("k"), float(quantity.parameters["beta"])
        table = [
            match_scores(similarity[row], k, lambda chosen, row=row: logits[row, chosen], beta=beta)
            for row in range(len(similarity))
        ]
        return [("", torch.from_numpy(np.stack(table)))]

    # --- questions ---------------------------------------------------------------------------------------

    def question_hidden(self, name: str, quantity: Quantity) -> Got:
        got = self._question_states(quantity)
        return [*got, ("training", self._trained_states())] if quantity.variant == OWN else got

    def _question_states(self, quantity: Quantity) -> Got:
        """By the stage that asked."""
        length = self.case.input("question_ids").shape[1]
        rows = self.rows(quantity)
        return [
            (stage, torch.cat([ran.rows("text")[:, :length] for ran in ran_rows]))
            for stage, ran_rows in (
                ("rank", rows.rank),
                ("generate", next(iter(rows.generate.values()), [])),
                ("forced", rows.forced),
            )
            if ran_rows
        ]

    def first_logits(self, name: str, quantity: Quantity) -> Got:
        return [("", torch.cat([ran.rows("words") for ran in self.rows(quantity).rank]))]

    def rank_probs(self, name: str, quantity: Quantity) -> Got:
        rows = self.rows(quantity)
        probs = torch.zeros(len(rows.rank_all), len(self.case.rows("answer")))
        for question, ranking in enumerate(rows.ranked(rows.rank_all)):
            probs[question, list(ranking.indices)] = torch.tensor(ranking.first_token_probs)
        return [("", probs)]

    def rank_topk(self, name: str, quantity: Quantity) -> Got:
        rows = self.rows(quantity)
        topk = torch.tensor([r.indices for r in rows.ranked(rows.rank)])
        return [("", topk.gather(1, self.case.order_of_ties(topk)))]

    def rank_scores(self, name: str, quantity: Quantity) -> Got:
        rows = self.rows(quantity)
        rankings = rows.ranked(rows.rank)
        order = self.case.order_of_ties(torch.tensor([r.indices for r in rankings]))
        return [("", torch.tensor([r.scores for r in rankings]).gather(1, order))]

    def rank_best(self, name: str, quantity: Quantity) -> Got:
        rows = self.rows(quantity)
        return [("", torch.tensor([r.indices[r.best] for r in rows.ranked(rows.rank)]))]

    def answer_ids(self, name: str, quantity: Quantity) -> Got:
        answers = self.rows(quantity).generated(int(quantity.parameters.get("beams", 1)))
        length, pad = self.case.expected(name).shape[1], self.case.special_ids["pad"]
        ids = [a.hypotheses[0].ids for a in answers]
        return [("", torch.tensor([[*row, *[pad] * (length - len(row))] for row in ids]))]

    def answer_scores(self, name: str, quantity: Quantity) -> Got:
        answers = self.rows(quantity).generated(int(quantity.parameters.get("beams", 1)))
        return [("", torch.tensor([a.hypotheses[0].score for a in answers]))]

    def forced_logits(self, name: str, quantity: Quantity) -> Got:
        """Ranking computes no logits of a last token and of padding: there, the whole forward's stand in."""
        whole = self._whole_forced(quantity)
        served = whole.clone()
        for row, ran in zip(served, self.rows(quantity).forced, strict=True):
            (logits,) = ran.scored_rows()
            row[: len(logits)] = logits
        got = [("", served), ("whole", whole)]
        return [*got, ("training", self._trained_forced())] if quantity.variant == OWN else got

    def _whole_forced(self, quantity: Quantity) -> Tensor:
        """By one forward of all tokens, about the question states that were served."""
        ids, mask = self.case.input("given_answer_ids"), self.case.input("given_answer_mask").bool()
        ((_, states),) = [got for got in self._question_states(quantity) if got[0] == "forced"]
        y_mask = self.case.input("question_mask").bool()
        with self.served.mixed(quantity.variant, states) as (adaptation, y, rows_of):
            many = len(rows_of)
            decoder = self.served.backbone.model.decoder
            assert decoder is not None
            ids, mask, y_mask = (t.to(y.device).repeat_interleave(many, 0) for t in (ids, mask, y_mask))
            memory = decoder.body.remember(y, y_mask, adaptation)
            return decoder.score(ids, mask, memory, adaptation)[rows_of["case"]]

    def forced_loss(self, name: str, quantity: Quantity) -> Got:
        rows = self.rows(quantity)
        got = [("", -torch.tensor([r.scores[0] for r in rows.ranked(rows.forced)]))]
        if quantity.variant == OWN:
            ids, mask = self._given("given_answer_ids"), self._given("given_answer_mask").bool()
            got.append(("training", shifted_nll(self._trained_forced(), ids, mask)))
        return got

    def train_loss(self, name: str, quantity: Quantity) -> Got:
        case, rows = self.case, self.rows(quantity)
        losses = []
        for ranking in rows.ranked(rows.train):
            by_index = dict(zip(ranking.indices, ranking.scores, strict=True))
            losses += [-by_index[index] for index in range(len(by_index))]
        pictures = case.pixels.shape[0] * case.pixels.shape[1]
        got = [("", answer_loss(torch.tensor(losses), case.input("train_weights"), pictures))]
        if quantity.variant == OWN:
            counts = self._given("train_answer_counts")
            batch = AnswerBatch(
                case.pixels.to(DEVICE),
                self._given("question_ids"),
                self._given("question_mask").bool(),
                torch.arange(len(case.pixels), device=DEVICE),
                self._given("train_answer_ids"),
                self._given("train_answer_mask").bool(),
                torch.arange(len(counts), device=DEVICE).repeat_interleave(counts),
                self._given("train_weights"),
            )
            got.append(("training", vqa_loss(self.training_backbone, batch, self.trainable.adaptation())))
        return got

    # --- modules -----------------------------------------------------------------------------------------

    def unit_adapter(self, name: str, quantity: Quantity) -> Got:
        x = self.case.unit_input(name, quantity)
        got = []
        for label, site in _sites(quantity.parameters["mode"], quantity.number("layer")):
            with self.served.mixed(quantity.variant, x) as (adaptation, many, rows_of):
                own = _term(adaptation, label, site, many)[rows_of["case"]]
            got.append((label, own.cpu() + x if "residual" in quantity.parameters else own))
        return got

    def unit_memory(self, name: str, quantity: Quantity) -> Got:
        stack: Stack = "decoder" if quantity.parameters.get("stack") == "decoder_" else "text"
        x = self.case.unit_input(name, quantity)
        with self.served.mixed(quantity.variant, x) as (adaptation, many, rows_of):
            terms = adaptation.memory(stack, many)
        if terms is None:
            return [("", torch.zeros_like(x))]
        return [("", terms[0 if quantity.parameters["which"] == "key" else 1][rows_of["case"]])]

    def unit_vision_norm(self, name: str, quantity: Quantity) -> Got:
        return [("", self.served.backbone.model.vision.norm(self.case.unit_input(name, quantity).to(DEVICE)))]

    def unit_text_norm(self, name: str, quantity: Quantity) -> Got:
        encoder = self.served.backbone.model.text_encoder
        assert encoder is not None
        return [("", encoder.embeddings.norm(self.case.unit_input(name, quantity).to(DEVICE)))]

    # --- the way through training ------------------------------------------------------------------------

    def _given(self, name: str) -> Tensor:
        """An input, where the model is."""
        return self.case.input(name).to(DEVICE)

    @cached_property
    def trainable(self) -> TrainableAdapter:
        """The case's adapter with its parameters as a fine-tuning run holds them."""
        package, backbone = self.served.packages[OWN.name], self.served.backbone
        adapter = TrainableAdapter(package.config, backbone.dims(), backbone.head_tensors(), seed=0, device=DEVICE)
        assert adapter.tensors.keys() == package.tensors.keys()
        for name, tensor in package.tensors.items():
            adapter.tensors[name].data.copy_(tensor)
        return adapter

    @property
    def training_backbone(self) -> Blip:
        return self.served.backbone.model

    @cached_property
    def trained_pairs(self) -> EncodedPairs:
        ids, mask = self._given("text_ids"), self._given("text_mask").bool()
        batch = RetrievalBatch(
            self.case.pixels.to(DEVICE), ids, mask, torch.arange(len(self.case.pixels), device=DEVICE)
        )
        return encode_pairs(self.training_backbone, batch, self.trainable.adaptation())

    def _trained_logits(self) -> Tensor:
        """[texts, clips, 2]."""
        ids, mask = self._given("text_ids"), self._given("text_mask").bool()
        num_texts, num_clips = len(ids), len(self.case.pixels)
        logits = match_logits(
            self.training_backbone,
            ids,
            mask,
            self.trained_pairs,
            torch.arange(num_texts, device=DEVICE).repeat_interleave(num_clips),
            torch.arange(num_clips, device=DEVICE).repeat(num_texts),
            self.trainable.adaptation(),
            self.served.rows[OWN].weighs_frames,
        )
        return logits.unflatten(0, (num_texts, num_clips))

    def _trained_states(self) -> Tensor:
        case = self.case
        nothing = torch.zeros(0, device=DEVICE)
        batch = AnswerBatch(
            case.pixels.to(DEVICE),
            self._given("question_ids"),
            self._given("question_mask").bool(),
            torch.arange(len(case.pixels), device=DEVICE),
            nothing,
            nothing,
            nothing,
            nothing,
        )
        return question_states(self.training_backbone, batch, self.trainable.adaptation())

    def _trained_forced(self) -> Tensor:
        case = self.case
        return self.training_backbone.score_answers(
            self._trained_states(),
            self._given("question_mask").bool(),
            self._given("given_answer_ids"),
            self._given("given_answer_mask").bool(),
            torch.arange(len(case.pixels), device=DEVICE),
            self.trainable.adaptation(),
        )

    # --- the rows beside the case's ----------------------------------------------------------------------

    @torch.no_grad()
    def companions(self) -> list[Comparison]:
        """What shared the case's batches, beside the reference."""
        return [replace(comparison, is_recorded=False) for comparison in self._companions()]

    def _companions(self) -> Iterator[Comparison]:
        for companion in self.served.companions:
            rows = self.served.beside[companion.name]
            yield from _compare_vision(companion, rows)
            if rows.match:
                yield from _compare_retrieval(companion, rows)
            if rows.rank:
                yield from _compare_answers(companion, rows, self.case.max_length)
            if companion.document is not None:
                yield from self._compare_units(companion)

    def _compare_units(self, companion: Companion) -> Iterator[Comparison]:
        x = (
            self.case.input("unit_x")
            if self.case.has("unit_x")
            else torch.randn(2, 3, self.served.backbone.dims().width)
        )
        for layer in range(self.served.backbone.dims().layers):
            on = companion.reference.on
            for mode, is_on in (("visual", on.visual), ("text", on.textual), ("multimodal", on.multimodal)):
                for label, site in _sites(mode, layer):
                    with self.served.mixed(OWN, x) as (adaptation, many, rows_of):
                        own = _term(adaptation, label, site, many)[rows_of[companion.name]]
                    expected = companion.reference.adapter(layer, x, mode) if is_on else torch.zeros_like(x)
                    yield compare(f"{companion.name}: adapter {layer} {mode} ({label})", own, expected, UNIT_ATOL, RTOL)


def _sites(mode: str, layer: int) -> list[tuple[str, Site]]:
    """Every use of a mode of the adapter: what it is called, and its site."""
    if mode == "visual":
        return [("vision mlp", Site("vision", layer, "mlp"))]
    if mode == "text":
        queries = [(f"{stack} query", Site(stack, layer, "cross")) for stack in ("text", "decoder")]
        return [("text text", Site("text", layer, "text")), *queries]
    return [(f"{stack} cross", Site(stack, layer, "cross")) for stack in ("text", "decoder")]


def _term(adaptation: Adaptation, label: str, site: Site, x: Tensor) -> Tensor:
    """What an adaptation adds for x; of a query what a cross site adds for what entered the attention, whatever left it."""
    alone = adaptation.add(site, x, torch.zeros_like(x))
    if not label.endswith("query"):
        return alone
    return adaptation.add(site, x, torch.zeros_like(x), before=x) - alone


def _near(name: str, got: Tensor, expected: Tensor) -> Comparison:
    return compare(name, got, expected, ATOL, RTOL)


def _compare_vision(companion: Companion, rows: Rows) -> Iterator[Comparison]:
    for place, ran in enumerate(rows.vision):
        output = ran.output
        assert isinstance(output, VisionOutput)
        yield _near(f"{companion.name}: vision", output.states, companion.hidden[place])
        if output.frames is not None:
            yield _near(f"{companion.name}: frames", output.frames, companion.frames[place])


def _compare_retrieval(companion: Companion, rows: Rows) -> Iterator[Comparison]:
    for place, (text, matched) in enumerate(zip(rows.text, rows.match, strict=True)):
        assert isinstance(text.output, TextOutput) and isinstance(matched.output, MatchOutput)
        yield _near(f"{companion.name}: text", text.output.vector, companion.features[place])
        yield _near(f"{companion.name}: match", matched.output.logits, torch.stack(companion.matches[place]))


def _compare_answers(companion: Companion, rows: Rows, max_length: int) -> Iterator[Comparison]:
    for ranking, ranked in zip(companion.rankings, rows.ranked(rows.rank_all or rows.rank), strict=True):
        by_index = dict(zip(ranked.indices, ranked.scores, strict=True))
        yield _near(f"{companion.name}: rank", torch.tensor([by_index[i] for i in ranking.topk]), ranking.scores)
    for num_beams in rows.generate:
        expected = companion.generated(num_beams, max_length)
        for answer, found in zip(expected, rows.generated(num_beams), strict=True):
            if found.gap < NEAR_TIE:
                continue
            label = f"{companion.name}: {num_beams} beams"
            yield _near(label, torch.tensor(found.hypotheses[0].ids), torch.tensor(answer.ids))
            yield _near(f"{label}, score", torch.tensor(found.hypotheses[0].score), torch.tensor(answer.score))
