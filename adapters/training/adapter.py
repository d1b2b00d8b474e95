"""An adapter while it is being trained: raw parameters that fold anew each step, and its two objectives."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.families import family_of
from adapters.families.base import BackboneDims, BlipDims, SlotView, UniformAdaptation
from adapters.training.data import AnswerBatch, RetrievalBatch, TextBatch
from adapters.training.losses import ContrastiveFeatures
from adapters.training.objectives import RetrievalSettings, encode_pairs, retrieval_loss, text_loss, vqa_loss
from adapters.training.protocols import TrainingBackbone, TrainingLanguageModel


class TrainableAdapter:
    """Package tensors as float32 parameters on `device`.

    `heads` are the backbone's: those the config carries are copied and tuned, the others used as they are. What the
    released trainers leave frozen stays so. The same seed gives the same start on any device.
    """

    def __init__(
        self,
        config: AdapterConfig,
        dims: BackboneDims,
        heads: Mapping[str, Tensor],
        *,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.dims = dims
        family = family_of(config.family)
        tensors = family.init_tensors(config, dims, torch.Generator().manual_seed(seed))
        tensors |= {name: heads[name].detach().float().clone() for name in head_tensors(config)}
        frozen = family.frozen_names(tensors)
        self.tensors = {n: nn.Parameter(t.to(device), requires_grad=n not in frozen) for n, t in tensors.items()}
        self._heads = {name: tensor.detach() for name, tensor in heads.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that get gradients."""
        return {name: p for name, p in self.tensors.items() if p.requires_grad}

    @property
    def num_parameters(self) -> int:
        """How many numbers are tuned."""
        return sum(p.numel() for p in self.parameters.values())

    def adaptation(self) -> UniformAdaptation:
        """The current tensors folded as the bank folds them; gradients reach the parameters."""
        family = family_of(self.config.family)
        tensors = dict(self._heads)
        tensors |= {name: self.tensors[name] for name in head_tensors(self.config)}
        tensors |= family.fold(self.config, self.tensors, self.dims)
        return UniformAdaptation(SlotView(family, tensors, family.schedule(self.config, self.dims)))

    def frozen_copy(self) -> "TrainableAdapter":
        """An adapter of the same values that gets no gradients: what a momentum copy starts as."""
        other = copy.copy(self)
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        other.tensors = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        return other

    def package_tensors(self) -> dict[str, Tensor]:
        """What goes into `adapter_model.safetensors`."""
        return {name: p.detach().clone().contiguous() for name, p in self.tensors.items()}


def head_tensors(config: AdapterConfig) -> list[str]:
    """Names of the head tensors a package of this config carries."""
    return [f"{head}.{kind}" for head in config.heads for kind in ("weight", "bias")]


class AnswerTraining:
    """Fine-tune on questions and answers. `batches(step)` is the step's batch."""

    def __init__(
        self, backbone: TrainingBackbone, adapter: TrainableAdapter, batches: Callable[[int], AnswerBatch]
    ) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.batches = batches

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        return {"answer": vqa_loss(self.backbone, self.batches(step), self.adapter.adaptation())}

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


class TextTraining:
    """Fine-tune what a language model perceives on texts about it: questions with their answers, or captions."""

    def __init__(
        self, model: TrainingLanguageModel, adapter: TrainableAdapter, batches: Callable[[int], TextBatch]
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.batches = batches

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective."""
        return {"text": text_loss(self.model, self.batches(step), self.adapter.adaptation())}

    def after_step(self) -> None:
        """Nothing follows the parameters here."""

    def state(self) -> dict[str, Tensor]:
        """No state of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """No state of its own."""


class RetrievalTraining:
    """Fine-tune on pairs: contrastive with soft targets of a momentum adapter, and matching with hard negatives.

    Only the adapter and its heads have a momentum copy: the backbone is frozen, so its copy would equal it. After every
    step copy <- momentum * copy + (1 - momentum) * adapter, each tensor once (the released code averages the adapters
    twice, since it reaches them through two encoders). `alpha` ramps up linearly over `ramp_steps`. The queue holds the
    momentum features of the last `queue_size` pairs and starts empty; 0 means in-batch negatives only.
    """

    def __init__(
        self,
        backbone: TrainingBackbone,
        adapter: TrainableAdapter,
        batches: Callable[[int], RetrievalBatch],
        settings: RetrievalSettings,
        *,
        momentum: float = 0.995,
        ramp_steps: int = 0,
        queue_size: int = 0,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.batches = batches
        self.settings = settings
        self.momentum = momentum
        self.ramp_steps = ramp_steps
        self.seed = seed
        self.copy = adapter.frozen_copy()
        assert isinstance(adapter.dims, BlipDims), "retrieval is trained on a BLIP. This is a bug."
        width, device = adapter.dims.embed_dim, next(iter(adapter.tensors.values())).device
        self._queue = {
            "clips": torch.zeros(queue_size, width, device=device),
            "texts": torch.zeros(queue_size, width, device=device),
            "ids": torch.zeros(queue_size, dtype=torch.long, device=device),
            "filled": torch.zeros((), dtype=torch.long),  # pairs ever put in, on the host
        }

    def alpha(self, step: int) -> float:
        """The share of the momentum model's distribution in the targets of a step."""
        return self.settings.alpha * (min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0)

    def losses(self, step: int) -> dict[str, Tensor]:
        """See Objective. Negatives are drawn from a generator seeded by the step, so that a resumed run repeats them."""
        batch = self.batches(step)
        generator = torch.Generator(device=batch.ids.device).manual_seed(self.seed * 1_000_003 + step)
        with torch.no_grad():
            copy = encode_pairs(self.backbone, batch, self.copy.adaptation())
        filled = min(int(self._queue["filled"]), len(self._queue["ids"]))
        queue = ContrastiveFeatures(self._queue["clips"][:filled], self._queue["texts"][:filled]) if filled else None
        losses = retrieval_loss(
            self.backbone,
            batch,
            self.adapter.adaptation(),
            copy,
            self.settings,
            alpha=self.alpha(step),
            queue=queue,
            queue_ids=self._queue["ids"][:filled] if filled else None,
            generator=generator,
        )
        self._enqueue(copy.clips, copy.texts, batch.pair_ids)
        return losses

    def _enqueue(self, clips: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Write a ring; of a batch larger than the queue only the last `size` rows, so that no place is written twice."""
        size = len(self._queue["ids"])
        if not size:
            return
        kept = slice(max(0, len(ids) - size), None)
        at = (int(self._queue["filled"]) + torch.arange(len(ids), device=ids.device)[kept]) % size
        for name, values in (("clips", clips), ("texts", texts), ("ids", ids)):
            self._queue[name].index_copy_(0, at, values[kept].to(self._queue[name].dtype))
        self._queue["filled"] += len(ids)

    def after_step(self) -> None:
        """The momentum copy follows the adapter."""
        with torch.no_grad():
            for name, tensor in self.adapter.tensors.items():
                self.copy.tensors[name].lerp_(tensor, 1.0 - self.momentum)

    def state(self) -> dict[str, Tensor]:
        """The momentum copy and the queue."""
        copies = {f"copy.{name}": tensor.detach() for name, tensor in self.copy.tensors.items()}
        return copies | {f"queue.{name}": tensor for name, tensor in self._queue.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See Objective."""
        with torch.no_grad():
            for name, tensor in self.copy.tensors.items():
                tensor.copy_(state[f"copy.{name}"])
            for name in self._queue:
                self._queue[name].copy_(state[f"queue.{name}"])
