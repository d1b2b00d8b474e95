"""What a run asks of a family of adapters: `uniadapter` and `epalm` answer, and the run itself knows neither."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import JsonValue

from adapters.config import AdapterConfig
from adapters.training.adapter import TrainableAdapter
from adapters.training.loop import Objective
from service.media import AnyMediaKind, MediaWorkers
from service.train.batches import Plan
from service.train.examples import Example, Examples, Texts
from service.train.media import MediaStore

S = TypeVar("S", bound=MediaStore[Any])


class FamilyTraining(Protocol[S]):
    """Adapters of one family for one backbone, as a run's options want them; making one checks those options."""

    @property
    def texts(self) -> Texts:
        """How the texts of a manifest are read."""

    @property
    def kinds(self) -> tuple[AnyMediaKind, ...]:
        """The kinds of media that it may be trained on."""

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule."""

    @property
    def weight_decay(self) -> float:
        """Of matrices."""

    def config(self, examples: Examples, kind: AnyMediaKind) -> AdapterConfig:
        """The config of the package to be, provenance aside. Raises: InvalidSettings; MissingPart."""

    def store(self, config: AdapterConfig, files: Sequence[Path], kind: AnyMediaKind, workers: MediaWorkers) -> S:
        """Where what is made of the media is kept."""

    def batches(self, examples: Sequence[Example], store: S, plan: Plan) -> Callable[[int], Any]:
        """What makes the batch of a step, on the host; the same for the same step. Called from one thread."""

    def objective(self, adapter: TrainableAdapter, batches: Callable[[int], Any], plan: Plan) -> Objective:
        """What is minimised; `batches` gives those made above, on the device."""

    def rate_of(self, name: str) -> float:
        """What the learning rate of a tensor is multiplied by."""

    def numeric(self) -> dict[str, JsonValue]:
        """Options of its own that decide the numbers and are not in the config."""

    def card_rows(self, config: AdapterConfig) -> dict[str, str]:
        """What a model card says of this family only; "input" among it."""
