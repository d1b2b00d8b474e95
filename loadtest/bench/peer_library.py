"""The library's BLIP beside ours on the same weights: `BlipForQuestionAnswering.generate` of transformers.

Weights are random and made by the library; ours are converted as an import converts them. Their scale keeps the decoder from
saying one word for ever: hidden states of unit size give logits of unit size, and the end of a text has a bias that lets it
compete with the likeliest word, so that some answers are short and some are cut. Of several questions about a picture, the stages
below run the vision tower once, as `POST /vqa` does through its feature cache.

Both sides must answer the same. They end a search by different rules, ours being those of transformers 4.15 (see
`service.backbone.decoding`), the library's those of 5.23:

    stop rule    a search is done when its worst kept text is at least the best sum / length. Ours: the best of all candidates of the
                 step; the library's: the best of those that go on, without the texts that ended just now
    cut texts    those that became as long as they may be and have no end. Ours: the beams that would have gone on are kept, their
                 sums divided by the whole length; the library's: those among the first `num_beams` candidates, divided by one less

A search that takes either rule as an argument is written here anew. A difference is explained when by our rules it gives our answer
and by the library's the library's, over the words of our model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product, starmap
from math import log, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loadtest.bench.harness import Bench, Spread, Table, take_turns
from service.backbone.blip import Blip, Memory
from service.backbone.blip_answers import BlipSteps, beam_search
from service.backbone.config import BlipConfig, SpecialIds
from service.backbone.convert import BERT_SPECIAL_IDS, BERT_VOCAB_SIZE, SourceWeights, assemble, canonical
from service.backbone.decoding import UNSTARTED

NUM_BEAMS, MAX_LENGTH = 3, 10
QUESTION_WORDS = 7  # between [ENC] and [SEP]
FIRST_BERT_WORD = 1996  # "the"; below are special tokens, characters and marks
TIE = 1e-4  # a choice by less may go either way: the sides round differently
KINDS = ("equal", "by the stop rule", "by cut texts", "by both rules", "a tie", "unexplained")
DISTINCT = "distinct answers"


def special_ids(config: BlipConfig) -> SpecialIds:
    """Those of BERT with the authors' two tokens; in a small vocabulary these two are the last as well."""
    assert config.decoder is not None
    vocab_size = config.decoder.vocab_size
    return BERT_SPECIAL_IDS.model_copy(update={"bos": vocab_size - 2, "enc": vocab_size - 1})


def make_library_model(config: BlipConfig, ids: SpecialIds) -> Any:
    """A random `BlipForQuestionAnswering` of these sizes, with the authors' eps in the vision tower."""
    import transformers  # slow to import

    vision, text = config.vision, config.decoder
    assert text is not None
    sizes = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "encoder_hidden_size": text.memory_width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.max_positions,
        "layer_norm_eps": text.norm_eps,
        "pad_token_id": ids.pad,
        "bos_token_id": ids.bos,
        "sep_token_id": ids.sep,
        "eos_token_id": ids.sep,
    }
    tower = {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.grid * vision.patch,
        "patch_size": vision.patch,
        "layer_norm_eps": vision.norm_eps,
    }
    model = transformers.BlipForQuestionAnswering(transformers.BlipConfig(text_config=sizes, vision_config=tower))
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    model.tie_weights()
    model.text_decoder.cls.predictions.bias[ids.sep] = sqrt(2 * log(text.vocab_size))  # as high as the best of so many
    return model


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Gains of 1, small biases, and maps and embeddings that neither grow nor shrink what they are given."""
    if "norm" in name.lower() and name.endswith("weight"):
        parameter.fill_(1.0)
    elif parameter.ndim < 2:
        parameter.normal_(0.0, 0.02, generator=generator)
    else:
        fan_in = parameter.shape[-1] if "embeddings" in name else parameter[0].numel()
        parameter.normal_(0.0, fan_in**-0.5, generator=generator)


def convert(model: Any, config: BlipConfig, ids: SpecialIds) -> Blip:
    """The same weights as one of our models."""
    heads = config.vision.heads
    tensors = canonical(dict(model.state_dict()))
    return assemble(SourceWeights("the library's model", tensors, heads, heads, ids))[0]


@dataclass(frozen=True)
class Questions:
    """A batch: ids [Q, L] of equal length, [ENC] first, and pixels [P, 3, R, R] of P pictures, each with Q/P questions in a row."""

    ids: Tensor
    pixels: Tensor

    @property
    def picture_of_question(self) -> Tensor:
        """[Q] int64."""
        rows = torch.arange(len(self.pixels), device=self.ids.device)
        return rows.repeat_interleave(len(self.ids) // len(self.pixels))

    def to(self, dtype: torch.dtype) -> "Questions":
        """With pixels of that type."""
        return Questions(self.ids, self.pixels.to(dtype))


def make_questions(
    config: BlipConfig, ids: SpecialIds, count: int, pictures: int, device: torch.device, seed: int
) -> Questions:
    """Random words about random pictures at the native resolution."""
    assert config.decoder is not None
    generator = torch.Generator().manual_seed(seed)
    first = FIRST_BERT_WORD if config.decoder.vocab_size >= BERT_VOCAB_SIZE else ids.sep + 1
    words = torch.randint(first, ids.bos, (count, QUESTION_WORDS), generator=generator)
    edge = torch.ones(count, 1, dtype=torch.long)
    side = config.vision.grid * config.vision.patch
    pixels = torch.randn(pictures, 3, side, side, generator=generator)
    return Questions(torch.cat([edge * ids.enc, words, edge * ids.sep], dim=1).to(device), pixels.to(device))


def library_answers(model: Any, questions: Questions) -> Tensor:
    """Ids [Q, at most MAX_LENGTH] by the library, which looks at a picture anew for each question."""
    pixels = questions.pixels[questions.picture_of_question]
    mask = torch.ones_like(questions.ids)
    out = model.generate(questions.ids, pixels, attention_mask=mask, num_beams=NUM_BEAMS, max_length=MAX_LENGTH)
    assert isinstance(out, Tensor)
    return out


def read_questions(model: Blip, questions: Questions) -> Memory:
    """What our decoder reads of the questions. A picture's states and their keys are made once for all questions about it."""
    states = model.encode_vision(questions.pixels, None)  # [pictures, P, D]
    mask = torch.ones_like(questions.ids, dtype=torch.bool)
    seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    hidden = model.encode_multimodal(questions.ids, mask, states, seen, None)
    assert model.decoder is not None
    return model.decoder.body.remember(hidden, mask, None)


def our_answers(model: Blip, questions: Questions) -> list[tuple[int, ...]]:
    """Ids of the best hypotheses, by the stages that serve."""
    memory = read_questions(model, questions)
    found = beam_search(model, memory, len(questions.ids), None, num_beams=NUM_BEAMS, max_length=MAX_LENGTH)
    return [output.hypotheses[0].ids for output in found]


class Rules(NamedTuple):
    """How a search ends, see above: whether by the library's stop rule, and whether with its cut texts."""

    library_stop: bool
    library_cut: bool


OUR_RULES, LIBRARY_RULES = Rules(False, False), Rules(True, True)


@dataclass
class Search:
    """One search. `gap` is the least difference that decided anything."""

    rules: Rules
    start: int
    texts: list[tuple[int, ...]] = field(init=False)
    totals: list[float] = field(init=False)
    parents: list[int] = field(init=False)
    kept: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    is_done: bool = False
    gap: float = float("inf")

    def __post_init__(self) -> None:
        self.texts = [(self.start,)] * NUM_BEAMS
        self.totals = [0.0, *[UNSTARTED] * (NUM_BEAMS - 1)]
        self.parents = list(range(NUM_BEAMS))

    def advance(self, best: Sequence[float], flat: Sequence[int], vocabulary: int, end: int) -> None:
        """One step: of the candidates `flat` with sums `best`, descending, the last is the first one passed over."""
        if self.is_done:
            return
        length = len(self.texts[0])  # the start counts, this step's token does not
        is_last = length + 1 == MAX_LENGTH
        going: list[tuple[float, int, tuple[int, ...]]] = []
        for rank in range(2 * NUM_BEAMS):
            self._decided_by(best[rank] - best[rank + 1])
            beam, token = divmod(flat[rank], vocabulary)
            text = (*self.texts[beam], token)
            if token != end and not (is_last and self.rules.library_cut):
                going.append((best[rank], beam, text))
            elif rank < NUM_BEAMS:
                self._keep(best[rank] / length, text)
        del going[NUM_BEAMS:]
        if going:
            self._check_done((going[0][0] if self.rules.library_stop else best[0]) / length)
        if is_last and not self.is_done:
            for total, _, text in going:
                self._keep(total / (length + 1), text)
        if not is_last:
            self.totals = [total for total, _, _ in going]
            self.parents = [beam for _, beam, _ in going]
            self.texts = [text for _, _, text in going]

    def _keep(self, score: float, text: tuple[int, ...]) -> None:
        self.kept = sorted([*self.kept, (score, text)], key=lambda scored: -scored[0])[:NUM_BEAMS]

    def _check_done(self, score: float) -> None:
        if len(self.kept) == NUM_BEAMS:
            self._decided_by(abs(self.kept[-1][0] - score))
            self.is_done = self.kept[-1][0] >= score

    def _decided_by(self, difference: float) -> None:
        self.gap = min(self.gap, difference)

    def finish(self) -> tuple[int, ...]:
        """The best text."""
        if len(self.kept) > 1:
            self._decided_by(self.kept[0][0] - self.kept[1][0])
        return self.kept[0][1]


def search(model: Blip, memory: Memory, num_questions: int, rules: Rules) -> list[Search]:
    """Searches over our model's words. Source: transformers 4.15 `BeamSearchScorer`, 5.23 `GenerationMixin._beam_search`."""
    ids, device = model.config.special_ids, model.device
    steps = BlipSteps(model, memory, num_questions, None, max_length=MAX_LENGTH)
    searches = [Search(rules, ids.bos) for _ in range(num_questions)]
    log_probs = steps.logits().float().log_softmax(-1).cpu().repeat_interleave(NUM_BEAMS, dim=0)
    steps.select([number for number in range(num_questions) for _ in range(NUM_BEAMS)], NUM_BEAMS)
    for length in range(1, MAX_LENGTH):
        totals = torch.tensor([one.totals for one in searches])
        scores = log_probs.unflatten(0, (num_questions, NUM_BEAMS)) + totals.unsqueeze(-1)  # [Q, beams, V]
        best, flat = scores.flatten(1).topk(2 * NUM_BEAMS + 1)
        for one, own, places in zip(searches, best.tolist(), flat.tolist(), strict=True):
            one.advance(own, places, log_probs.shape[-1], ids.sep)
        if length + 1 == MAX_LENGTH or all(one.is_done for one in searches):
            break
        parents = [number * NUM_BEAMS + beam for number, one in enumerate(searches) for beam in one.parents]
        steps.select(parents, NUM_BEAMS)
        last = torch.tensor([text[-1] for one in searches for text in one.texts], device=device)
        log_probs = steps.step(last).float().log_softmax(-1).cpu()
    return searches


def words_of(text: Sequence[int], end: int) -> tuple[int, ...]:
    """What a text says between its start and its end, or all after its start."""
    words = tuple(text[1:])
    return words[: words.index(end)] if end in words else words


Words = tuple[int, ...]


def compare_answers(library: Any, ours: Blip, questions: Questions) -> tuple[Counter[str], set[Words]]:
    """How many answers are equal, or differ for which reason (KINDS); and how many of the library's are distinct."""
    end = ours.config.special_ids.sep
    theirs = [words_of(row, end) for row in library_answers(library, questions).tolist()]
    own = [words_of(text, end) for text in our_answers(ours, questions)]
    memory = read_questions(ours, questions)
    counts: Counter[str] = Counter()
    by_rules = {
        rules: search(ours, memory, len(own), rules) for rules in starmap(Rules, product((False, True), repeat=2))
    }
    for number, (their, our) in enumerate(zip(theirs, own, strict=True)):
        ruled = {rules: words_of(searches[number].finish(), end) for rules, searches in by_rules.items()}
        gap = min(searches[number].gap for searches in by_rules.values())
        counts[explain(their, our, ruled, gap)] += 1
    return counts, set(theirs)


def explain(theirs: Words, ours: Words, by_rules: Mapping[Rules, Words], gap: float) -> str:
    """Which of KINDS the two answers to a question are."""
    if theirs == ours:
        return "equal"
    if (by_rules[LIBRARY_RULES], by_rules[OUR_RULES]) != (theirs, ours):
        return "a tie" if gap < TIE else "unexplained"
    if by_rules[Rules(library_stop=True, library_cut=False)] == theirs:
        return "by the stop rule"
    return "by cut texts" if by_rules[Rules(library_stop=False, library_cut=True)] == theirs else "by both rules"


def compare(bench: Bench, config: BlipConfig) -> tuple[list[Table], dict[str, Any]]:
    """Answers in float32, seconds in the precision asked for; with one question a picture, and with several."""
    arguments, ids = bench.arguments, special_ids(config)
    library = make_library_model(config, ids).to(bench.device)
    ours = convert(library, config, ids)
    shapes = {"one question a picture": arguments.batch, f"{arguments.batch} questions a picture": 1}
    answers = Table(f"answers of {arguments.checked} batches of {arguments.batch}, float32", ("", *shapes))
    values: dict[str, Any] = {"answers": {}, "seconds": {}}
    with torch.inference_mode():
        for name, pictures in shapes.items():
            counts: Counter[str] = Counter()
            different: set[tuple[int, ...]] = set()
            for seed in range(arguments.checked):
                batch = make_questions(config, ids, arguments.batch, pictures, bench.device, seed)
                found, seen = compare_answers(library, ours, batch)
                counts += found
                different |= seen
            values["answers"][name] = {**{kind: counts[kind] for kind in KINDS}, DISTINCT: len(different)}
    answers.rows = [(kind, *(values["answers"][name][kind] for name in shapes)) for kind in (*KINDS, DISTINCT)]
    library.to(bench.dtype)
    ours.to(bench.dtype)
    ours.pack()
    tables = [answers]
    for name, pictures in shapes.items():
        batch = make_questions(config, ids, arguments.batch, pictures, bench.device, 0).to(bench.dtype)
        ways: dict[str, Callable[[], object]] = {
            "transformers": partial(library_answers, library, batch),
            "ours": partial(our_answers, ours, batch),
        }
        seconds = take_turns(ways, arguments.repeats, bench.device)
        tables.append(
            tabulate(f"{name}, batch {arguments.batch}, {NUM_BEAMS} beams, {arguments.dtype}", seconds, arguments.batch)
        )
        values["seconds"][name] = seconds
    return tables, values


def tabulate(title: str, seconds: dict[str, Spread], batch: int) -> Table:
    """Milliseconds and questions a second."""
    table = Table(title, ("", "ms", "lowest", "highest", "questions/s", "of transformers"))
    for name, spread in seconds.items():
        share = seconds["transformers"].median / spread.median
        table.rows.append((name, *(1000 * value for value in spread), batch / spread.median, share))
    return table
