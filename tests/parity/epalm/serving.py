"""Cases served together: converted, imported, folded, and run in batches that mix every adapter there is.

Cases that share their frozen models are one `World`. Each of its batches holds the rows of all its cases, for each case
a row without a medium, rows of `__base__` with and without one, and rows of an adapter made up for the purpose.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.config import BASE_ADAPTER
from adapters.families.base import Adaptation, EncoderDims, OptDims, SlotView
from adapters.importers.epalm import import_epalm
from adapters.package import Package
from adapters.training.data import TextBatch
from adapters.training.objectives import text_losses
from service.backbone import opt_answers
from service.backbone.convert_opt import OptPart, assemble_opt, read_part
from service.backbone.decoding import Start, pad_ids, write_all
from service.backbone.opt import Opt
from service.backbone.opt_fixed import OptFixedSteps
from service.bank import AdapterBank
from service.metrics import Metrics
from service.recordings import Recordings
from service.types import GenerateOutput, RankOutput
from tests.devices import DEVICE
from tests.kernels import SERVED, SETTINGS, Setting
from tests.parity.epalm.cases import Case, Row, Text
from tests.parity.epalm.reference import Reference
from tests.tape import Counted, make_recordings

PARTS = dict.fromkeys(("language_model", "vit", "timesformer", "ast", "tokenizer"), "sha256:" + "0" * 64)
MADE_UP = "made-up"
IMAGE_SIDE = 224

part_of = cache(read_part)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trainer's checkpoint, the case whose samples it looks at, and its slot."""

    name: str
    case: Case
    state: Mapping[str, Tensor] | None
    settings: Mapping[str, Any] | None
    slot: SlotView

    def reference(self, *, leaks_padding: bool = False) -> Reference:
        """The plain reference of it."""
        return Reference(
            self.case.language_model,
            self.state,
            self.settings,
            pad=self.case.special_ids["pad"],
            eos=self.case.special_ids["eos"],
            leaks_padding=leaks_padding,
        )

    def values(self, reference: Reference, tokens: Tensor | None) -> Tensor | None:
        """What is injected, [n, 1, D], by the reference, of first tokens [blocks, d]."""
        if tokens is None or self.settings is None:
            return None
        return reference.connected(reference.perceived(tokens[:, None]))


@dataclass(frozen=True, eq=False)
class Asked:
    """One row of a batch: a text, its adapter, and whether it comes with its sample. `group`: where it was recorded."""

    adapter: Adapter
    group: str
    text: Text
    has_medium: bool = True

    @property
    def features_key(self) -> tuple[Path, int]:
        """Which encoder, of which case, and which of its samples."""
        return self.adapter.case.folder / self.adapter.case.name, self.text.sample


@dataclass(frozen=True)
class Scored:
    """What a row's whole forward gave: what entered each layer and all logits, without padding, the prompt between. On the CPU."""

    inputs: list[Tensor]
    logits: Tensor
    text_logits: Tensor
    values: Tensor | None


@dataclass(eq=False)
class World:
    """Cases that share their frozen models, and what serving them gave. Everything is made when first asked for."""

    cases: list[Case]
    parts: tuple[OptPart, ...]
    setting: Setting = SETTINGS[SERVED]
    dtype: torch.dtype = torch.float32
    _losses: dict[str, dict[Asked, Tensor]] = field(default_factory=dict)
    _generated: dict[tuple[int, str], dict[Asked, GenerateOutput]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Opt:
        """Converted from the library's folders, and laid out as a server does."""
        model = assemble_opt(self.parts)[0].to(device=DEVICE, dtype=self.dtype)
        if self.setting.packs:
            model.pack()
        return model

    @cached_property
    def recording(self) -> tuple[Recordings, Counted] | None:
        """Where words are recorded, if they are, and who counts them."""
        return make_recordings(DEVICE) if self.setting.records else None

    @cached_property
    def bank(self) -> AdapterBank:
        """Slots for all adapters: those of one connector alone, and those that hold any."""
        most = max(encoder.layers for encoder in self.dims.encoders.values())
        return AdapterBank(
            self.dims,
            {},
            device=self.model.device,
            dtype=self.dtype,
            buckets=((1, len(self.cases) + 1), (most, len(self.cases) + 1)),
            host_bytes=1 << 30,
            metrics=Metrics(),
            kernels=self.setting.kernels,
        )

    @cached_property
    def dims(self) -> OptDims:
        """The sizes an adapter must fit."""
        config = self.model.config
        encoders = {name: EncoderDims(encoder.width, encoder.layers) for name, encoder in config.encoders.items()}
        own = config.language_model
        return OptDims(own.width, own.layers, own.word_width, encoders)

    def encoder(self, case: Case) -> str:
        """The name of a case's encoder."""
        return part_of(str(case.encoder)).name

    # --- adapters ----------------------------------------------------------------------------------------

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The cases' own by case, one made up, and `__base__`."""
        found = {case.name: self._imported(case.name, case, case.document) for case in self.cases}
        first = self.cases[0]
        found[MADE_UP] = self._imported(MADE_UP, first, self._made_up(first))
        found[BASE_ADAPTER] = Adapter(BASE_ADAPTER, first, None, None, self.bank.lease(BASE_ADAPTER).view)
        return found

    def _imported(self, name: str, case: Case, document: Mapping[str, Any]) -> Adapter:
        has_token = document["config"].get("special_answer_token") is not None
        imported = import_epalm(
            document,
            dims=self.dims,
            parts=PARTS,
            resolution=IMAGE_SIDE,
            encoder=self.encoder(case),  # type: ignore[arg-type]  # a literal, which the config checks
            answer_token_id=case.special_ids["answer_token"] if has_token else None,
        )
        package = Package(None, imported.config, imported.tensors, f"{case.label} {name}", "")
        self.bank.put(self.bank.fold(package), hold=True)
        return Adapter(name, case, document["model"], document["config"], self.bank.lease(package.weights_digest).view)

    def _made_up(self, case: Case) -> dict[str, Any]:
        """A window in the middle, two features, a short prompt."""
        dims, words = self.dims, self.dims.word_width
        generator = torch.Generator().manual_seed(7)
        sizes = [(dims.width, dims.encoders[self.encoder(case)].width), (dims.width,)] * 2
        names = [f"connector.{k}.{kind}" for k in (0, 1) for kind in ("weight", "bias")]
        state = {name: 0.3 * torch.randn(size, generator=generator) for name, size in zip(names, sizes, strict=True)}
        state["prompt_module.prefix_embedding.0.weight"] = torch.randn(3, words, generator=generator)
        settings = {"start_layer_idx": dims.layers // 2, "end_layer_idx": dims.layers // 2 + 1, "prompt_len": 3}
        settings |= {"injected_hidden_states": 2, "prompt_tuning": True, "mlp": False}
        return {"model": state, "config": settings}

    # --- rows --------------------------------------------------------------------------------------------

    def rows(self, *, is_training: bool) -> list[Asked]:
        """All rows of a batch, those of different adapters next to each other."""
        return self._training_rows if is_training else self._question_rows

    @cached_property
    def _question_rows(self) -> list[Asked]:
        return self._make_rows(is_training=False)

    @cached_property
    def _training_rows(self) -> list[Asked]:
        return self._make_rows(is_training=True)

    def _make_rows(self, *, is_training: bool) -> list[Asked]:
        by_adapter: list[list[Asked]] = []
        for case in self.cases:
            own = self.adapters[case.name]
            texts = [(group, text) for group in case.groups for text in case.texts(group, is_training=is_training)]
            rows = [Asked(own, group, text) for group, text in texts]
            by_adapter.append([*rows, *(Asked(own, "", text, has_medium=False) for _, text in texts[-1:])])
        texts_beside = [row.text for row in by_adapter[0]][:1] + [row.text.longer() for row in by_adapter[0]][:1]
        for name in (MADE_UP, BASE_ADAPTER):
            own = self.adapters[name]
            by_adapter.append([Asked(own, "", text, seen) for text in texts_beside for seen in (True, False)])
        longest = max(map(len, by_adapter))
        return [rows[place] for place in range(longest) for rows in by_adapter if place < len(rows)]

    @cached_property
    def features(self) -> dict[tuple[Path, int], Tensor]:
        """First tokens [blocks, d] of every sample; the cases of one encoder are looked at together where they can be."""
        found: dict[tuple[Path, int], Tensor] = {}
        together: dict[tuple[str, torch.Size], list[Case]] = {}
        for case in self.cases:
            together.setdefault((self.encoder(case), case.samples.shape[1:]), []).append(case)
        with torch.inference_mode():
            for (encoder, _), cases in together.items():
                keys = [(case.folder / case.name, sample) for case in cases for sample in range(len(case.samples))]
                tokens = self.model.perceive(encoder, torch.cat([case.samples for case in cases]).to(DEVICE))
                found |= dict(zip(keys, tokens, strict=True))
        return found

    def given(self, rows: Sequence[Asked]) -> list[Tensor | None]:
        """Encoder states of the rows that have a medium."""
        return [self.features[row.features_key] if row.has_medium else None for row in rows]

    def adaptation(self, rows: Sequence[Asked]) -> Adaptation:
        """Of a batch of these rows."""
        names = list(self.adapters)
        slots = [adapter.slot for adapter in self.adapters.values()]
        return self.bank.adapt(slots, [names.index(row.adapter.name) for row in rows])

    # --- what comes of them ------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[Asked, Scored]:
        """Whole forwards of the questions, in one batch."""
        return self._score(self._question_rows)

    @cached_property
    def trained(self) -> dict[Asked, Scored]:
        """Whole forwards of the training texts, in one batch."""
        return self._score(self._training_rows)

    def _score(self, rows: list[Asked]) -> dict[Asked, Scored]:
        model, features, adaptation = self.model, self.given(rows), self.adaptation(rows)
        longest = max(len(row.text.ids) for row in rows)
        pad = model.config.special_ids.pad
        ids, mask = pad_ids([row.text.ids for row in rows], pad, model.device)
        with torch.inference_mode(), passing(model) as seen:
            text_logits = model.score(ids, mask, features, adaptation)
            logits = model.language_model.logits(seen.pop())
            injection = adaptation.inject(features)
        prompt = seen[0].shape[1] - longest - 1
        found = {}
        for number, row in enumerate(rows):
            own, schedule = row.adapter.slot.prompt(), row.adapter.slot.schedule
            columns = [*range(1, 1 + (0 if own is None else len(own)))]
            columns += range(1 + prompt, 1 + prompt + len(row.text.ids))
            first = model.config.language_model.layers
            if row.has_medium and schedule is not None:
                first = schedule.first
            layers = [x[number, [0, *columns] if layer >= first else columns] for layer, x in enumerate(seen)]
            everything = logits[number, [0, *columns] if first < len(layers) else columns]
            values = None
            if injection is not None and schedule is not None and row.has_medium:
                values = injection.values[number, : schedule.num_features]
            found[row] = Scored(
                [layer.cpu() for layer in layers],
                everything.cpu(),
                text_logits[number, : len(row.text.ids)].cpu(),
                None if values is None else values.cpu(),
            )
        return found

    def training_losses(self, case: Case) -> dict[Asked, Tensor]:
        """What training makes of a case's texts, in one batch of its own."""
        if case.name not in self._losses:
            rows = [row for row in self._training_rows if row.adapter.name == case.name and row.group]
            ids, mask = pad_ids([row.text.ids for row in rows], self.model.config.special_ids.pad, self.model.device)
            batch = TextBatch(torch.stack([self.features[row.features_key] for row in rows]), ids, mask)
            with torch.no_grad():
                losses = text_losses(self.model, batch, self.adaptation(rows))
            self._losses[case.name] = dict(zip(rows, losses, strict=True))
        return self._losses[case.name]

    def generated(self, num_beams: int, case: Case | None = None) -> dict[Asked, GenerateOutput]:
        """The questions' answers, in one batch; of one case's rows alone, where its own schedule decides what is kept."""
        key = num_beams, "" if case is None else case.name
        if key not in self._generated:
            rows = [row for row in self._question_rows if case is None or row.adapter.name == case.name]
            starts = [Start(row.text.ids, row.adapter.case.max_length) for row in rows]
            with torch.inference_mode():
                arguments = self.model, starts, self.given(rows), self.adaptation(rows)
                if self.recording is None:
                    outputs = opt_answers.generate_texts(*arguments, num_beams=num_beams)
                else:
                    writer = partial(OptFixedSteps, recordings=self.recording[0])
                    outputs = write_all(opt_answers.begin_texts(*arguments, num_beams=num_beams, writer=writer))
            self._generated[key] = dict(zip(rows, outputs, strict=True))
        return self._generated[key]

    @cached_property
    def rankable(self) -> dict[Asked, Case]:
        """The rows that are ranked, and whose candidates they are ranked among: the rows beside take the first ones."""
        ranking = {case.name: case for case in self.cases if "rank.answer_ids" in case.tensors}
        found: dict[Asked, Case] = {}
        for row in self._question_rows:
            if row.adapter.name in ranking and row.group != "batch":
                found[row] = ranking[row.adapter.name]
            elif ranking and row.adapter.name in (MADE_UP, BASE_ADAPTER):
                found[row] = next(iter(ranking.values()))
        return found

    @cached_property
    def ranked(self) -> dict[Asked, RankOutput]:
        """Their rankings, in one batch."""
        rows = list(self.rankable)
        with torch.inference_mode():
            outputs = opt_answers.rank_texts(
                self.model,
                [self.ranked_question(row) for row in rows],
                self.given(rows),
                self.adaptation(rows),
                [case.candidates for case in self.rankable.values()],
                [case.num_ranked for case in self.rankable.values()],
            )
        return dict(zip(rows, outputs, strict=True))

    def ranked_question(self, row: Asked) -> Row:
        """What a row's candidates are ranked about."""
        return self.rankable[row].question_of(row.text)


@contextmanager
def passing(model: Opt) -> Iterator[list[Tensor]]:
    """What enters each layer of the language model, and behind the last one what leaves it."""
    seen: list[Tensor] = []
    layers = list(model.language_model.layers)
    handles = [
        layer.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].clone()))
        for layer in layers
    ]
    handles.append(layers[-1].register_forward_hook(lambda _module, _arguments, output: seen.append(output.clone())))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def make_worlds(
    cases: Sequence[Case], setting: Setting = SETTINGS[SERVED], dtype: torch.dtype = torch.float32
) -> list[World]:
    """As few as there can be: a language model with at most one encoder of each kind."""
    found: list[tuple[Path, dict[str, Path], list[Case]]] = []
    for case in cases:
        kind = part_of(str(case.encoder)).name
        for language_model, encoders, own in found:
            if language_model == case.language_model and encoders.get(kind, case.encoder) == case.encoder:
                encoders[kind] = case.encoder
                own.append(case)
                break
        else:
            found.append((case.language_model, {kind: case.encoder}, [case]))
    return [
        World(own, tuple(part_of(str(path)) for path in (language_model, *encoders.values())), setting, dtype)
        for language_model, encoders, own in found
    ]
