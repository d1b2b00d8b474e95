"""The stages of a language model with perceptual encoders, as coroutines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from adapters.config import BASE_ADAPTER, AudioPreprocessing, Preprocessing
from adapters.families.epalm import EncoderName, options_of
from service.backbone.cost import encoder_cost, language_cost
from service.backbone.opt_backbone import OptBackbone
from service.errors import BadQuery
from service.loader import Pin
from service.media import SpectrogramPreprocessing
from service.pipelines.stages import Medium, StageRunner
from service.types import (
    BASE_INFO,
    ChooseInput,
    ContinueInput,
    GenerateOutput,
    MediaKind,
    PerceiveInput,
    PerceiveOutput,
    RankOutput,
    RequestContext,
)

UNADAPTED = Pin(BASE_INFO, BASE_ADAPTER, None)
ENCODER_OF: Mapping[MediaKind, EncoderName] = {"image": "vit", "video": "timesformer", "audio": "ast"}


@dataclass(frozen=True)
class Perceived:
    """What an encoder made of a medium: its first token after each block, [blocks, d], on the device."""

    states: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the states."""
        return self.states.nbytes


class OptStages(StageRunner[Perceived]):
    """Runs the stages of one language model for requests."""

    backbone: OptBackbone

    def check_medium(self, kind: MediaKind, pin: Pin) -> None:
        """Raises: BadQuery for a medium that the adapter's encoder does not perceive."""
        if pin.config is None:
            return
        wanted = options_of(pin.config).encoder
        if ENCODER_OF[kind] != wanted:
            takes = next(medium for medium, encoder in ENCODER_OF.items() if encoder == wanted)
            raise BadQuery(f"{pin.info.name} takes `{takes}`, not `{kind}`", param=kind)

    async def perceive(self, medium: Medium, pin: Pin, context: RequestContext) -> Tensor | None:
        """What the adapter's encoder makes of a medium, [blocks, d]; None for `__base__`, which perceives nothing.

        No adapter has a part in it, so it is made once for all adapters that perceive alike.
        """
        if pin.config is None:
            return None
        self.check_medium(medium.kind, pin)
        encoder, preprocessing = options_of(pin.config).encoder, pin.config.preprocessing

        async def look(context: RequestContext) -> Perceived:
            values = await self._decode(medium, preprocessing, context)
            return Perceived(await self.encode(encoder, values, context))

        return (await self._states(medium, pin, look, context)).states

    def made_by(self, pin: Pin) -> tuple[str, ...] | None:
        """See StageRunner."""
        if pin.config is None:
            return None
        return options_of(pin.config).encoder, pin.config.preprocessing.model_dump_json()

    async def _decode(
        self, medium: Medium, preprocessing: Preprocessing | AudioPreprocessing, context: RequestContext
    ) -> Tensor:
        if isinstance(preprocessing, AudioPreprocessing):
            prep = SpectrogramPreprocessing(
                preprocessing.num_mel_bins, preprocessing.max_steps, preprocessing.mean, preprocessing.std
            )
            async with self.decoder.turn(context) as media:
                return torch.from_numpy((await media.sound(medium.source, prep)).banks)
        pixels, _, _ = await self.decoder.pixels(medium, preprocessing, context)
        return pixels[0] if medium.kind == "image" else pixels

    async def encode(self, encoder: EncoderName, values: Tensor, context: RequestContext) -> Tensor:
        """What an encoder makes of pixels or a spectrogram, [blocks, d].

        The job is nobody's adapter's: it takes no slot, and needs no pin to last.
        """
        config = self.backbone.config.encoders[encoder]
        cost, tokens = encoder_cost(config, tuple(values.shape))
        shape = (*(ord(letter) for letter in encoder), *values.shape)
        inputs = PerceiveInput(encoder, values)
        output = await self.run("perceive", inputs, shape, 1, tokens, cost, UNADAPTED, context)
        return cast(PerceiveOutput, output).states

    async def generate(self, text: ContinueInput, pin: Pin, context: RequestContext) -> GenerateOutput:
        """What the language model goes on with."""
        cost, tokens = self.text_cost(text.num_beams, max(text.max_length, len(text.start_ids) + 1), pin)
        shape = (text.num_beams, self._tail(pin))
        output = await self.run("generate", text, shape, text.num_beams, tokens, cost, pin, context)
        return cast(GenerateOutput, output)

    async def rank(self, text: ChooseInput, pin: Pin, context: RequestContext) -> RankOutput:
        """The best of what may follow."""
        rows = min(text.k, len(text.candidates))
        cost, tokens = self.text_cost(rows, len(text.start_ids) + max(map(len, text.candidates)), pin)
        return cast(RankOutput, await self.run("rank", text, (), rows, tokens, cost, pin, context))

    def text_cost(self, rows: int, length: int, pin: Pin) -> tuple[float, int]:
        """Rows of so many text tokens, with the extra token and the prompt before each: estimated operations, and tokens."""
        columns = 1 + (0 if pin.config is None else options_of(pin.config).prompt_len) + length
        return language_cost(self.backbone.config.language_model, rows, columns), rows * columns

    def _tail(self, pin: Pin) -> int:
        """From which layer on the extra token goes on by itself: those that do so from different ones are kept apart."""
        layers = self.backbone.config.language_model.layers
        if pin.config is None:
            return layers
        schedule = self.bank.adapter(pin.digest).schedule
        return layers if schedule is None else schedule.tail
