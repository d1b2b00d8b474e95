"""The stages of every backbone of a service, and which of them an adapter's requests go through."""

from adapters.errors import MissingPart
from service.backbone.blip_backbone import BlipBackbone
from service.backbones import Backbones, HostedBackbone
from service.engine import Engine
from service.loader import Pin
from service.media import MediaWorkers
from service.metrics import Metrics
from service.pipelines.blip import BlipStages
from service.pipelines.opt import OptStages
from service.pipelines.stages import Decoder

AnyStages = BlipStages | OptStages


class StageSet:
    """One for all pipelines of a service."""

    def __init__(
        self, engine: Engine, backbones: Backbones, media: MediaWorkers, metrics: Metrics, *, feature_cache_bytes: int
    ) -> None:
        """`feature_cache_bytes` is for each backbone."""
        self.engine = engine
        self.metrics = metrics
        self.media = media
        self._decoder = Decoder(media, metrics)
        self._backbones = backbones
        self._stages = {one.name: self._make(one, feature_cache_bytes) for one in backbones}

    def _make(self, hosted: HostedBackbone, feature_cache_bytes: int) -> AnyStages:
        kind = BlipStages if isinstance(hosted.backbone, BlipBackbone) else OptStages
        return kind(self.engine, hosted, self._decoder, self.metrics, feature_cache_bytes=feature_cache_bytes)

    def on(self, name: str) -> AnyStages:
        """The stages of a backbone by name. Raises: BackboneNotFound."""
        return self._stages[self._backbones.named(name).name]

    def of(self, pin: Pin) -> AnyStages:
        """The stages that an adapter's requests go through."""
        return self.on(pin.backbone)

    def blip(self, pin: Pin) -> BlipStages:
        """The same, where they must be those of a BLIP. Raises: MissingPart."""
        stages = self.of(pin)
        if not isinstance(stages, BlipStages):
            raise MissingPart(f"{pin.info.name} runs on a language model, which does not retrieve")
        return stages
