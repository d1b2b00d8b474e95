"""A checkpoint of the eP-ALM trainers -> an adapter package.

Such a file holds the connectors and the soft prompt, and the run's YAML settings; not the frozen models. Read with
`weights_only=True`. Source: the authors' training scripts (`accelerate_training`, `float32`).
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import JsonValue, ValidationError
from torch import Tensor

from adapters.config import (
    AdapterConfig,
    AnswerDecoding,
    AudioPreprocessing,
    Preprocessing,
    Task,
    describe,
)
from adapters.errors import BackboneMismatch, ConversionError, TensorMismatch
from adapters.families.base import OptDims, backbone_ref
from adapters.families.epalm import EncoderName, EPalm, EPalmOptions
from adapters.importers.checkpoint import ImportedAdapter, as_json
from adapters.package import check_tensors

ENCODERS: Mapping[str, EncoderName] = {"image": "vit", "video": "timesformer", "audio": "ast"}
RESOLUTION = 224  # the trainers never pass another one to their vision models
MAX_LENGTH = 30  # of the whole text
NUM_BEAMS = 3
MAX_TEXT_TOKENS = 128
FROZEN = ("model_text", "transformer", "model_vision")


def import_epalm(
    document: Mapping[str, Any],
    *,
    dims: OptDims,
    parts: Mapping[str, str],
    resolution: int = RESOLUTION,
    encoder: EncoderName | None = None,
    task: Task | None = None,
    answer_token_id: int | None = None,
    answers: tuple[str, ...] = (),
    provenance: Mapping[str, JsonValue] | None = None,
) -> ImportedAdapter:
    """Turn a trainer's checkpoint into a package's config and tensors.

    encoder, task     where the settings do not say: from their `modality`, and from whether captions get an end token
    resolution        of pictures and clips; the trainers' is 224 whatever their settings say
    answer_token_id   the id of the settings' `special_answer_token`
    Raises: ConversionError for options nobody can serve; BackboneMismatch; TensorMismatch; NonFiniteTensor.
    """
    state = {name: tensor for name, tensor in document["model"].items() if not _is_frozen(name)}
    settings: dict[str, Any] = dict(document["config"])
    _refuse_unsupported(settings, state)
    chosen = encoder or _encoder(settings)
    kind: Task = task or ("caption" if settings.get("append_eos_token") else "vqa")
    if kind not in ("vqa", "caption"):
        raise ConversionError(
            f"an eP-ALM adapter answers questions or writes captions; {kind} is neither", param="task"
        )
    has_answer_token = kind == "vqa" and settings.get("special_answer_token") is not None
    if has_answer_token and answer_token_id is None:
        raise ConversionError(
            f"the id of the answer token {settings['special_answer_token']!r} is not known: give --answer-token-id, or a "
            "backbone with a tokenizer",
            param="answer_token_id",
        )
    try:
        options = EPalmOptions(
            encoder=chosen,
            start_layer_idx=settings["start_layer_idx"],
            end_layer_idx=settings["end_layer_idx"],
            injected_hidden_states=settings.get("injected_hidden_states", 1),
            shared_connector=bool(settings.get("shared_connector", False)),
            text_step=settings.get("text_step", 1),
            select_higher_step=bool(settings.get("select_higher_step", False)),
            prompt_len=settings["prompt_len"] if settings.get("prompt_tuning") else 0,
            prompt_mlp=bool(settings.get("mlp", True)),
            answer_token_id=answer_token_id if has_answer_token else None,
        )
        config = AdapterConfig(
            family="epalm",
            task=kind,
            rank=options.num_connectors,
            options=options.model_dump(mode="json"),
            backbone=backbone_ref(dims, parts, ("language_model", chosen, "tokenizer")),
            preprocessing=_preprocessing(settings, chosen, resolution),
            max_text_tokens=MAX_TEXT_TOKENS,
            decoding=AnswerDecoding(num_beams=NUM_BEAMS, max_length=MAX_LENGTH, answers=answers),
            provenance={"source": "eP-ALM checkpoint", "settings": as_json(settings), **(provenance or {})},
        )
    except KeyError as error:
        raise ConversionError(f"the checkpoint's config lacks {error.args[0]}", param="checkpoint") from error
    except ValidationError as error:
        raise ConversionError(
            f"the checkpoint's config cannot be served: {describe(error)}", param="checkpoint"
        ) from error
    if chosen not in dims.encoders:
        raise BackboneMismatch(f"the checkpoint needs {chosen}, which the backbone does not have", param="backbone")
    return ImportedAdapter(config, _tensors(state, config, dims))


def _is_frozen(name: str) -> bool:
    """Whether a tensor belongs to the frozen models, which the trainers leave out; adapters inside them they keep."""
    return any(part in name for part in FROZEN) and "adapter" not in name


def _encoder(settings: Mapping[str, Any]) -> EncoderName:
    modality = settings.get("modality", "image")
    if modality not in ENCODERS:
        raise ConversionError(
            f"modality {modality!r} is not known: give --encoder, one of {', '.join(get_args(EncoderName))}",
            param="encoder",
        )
    return ENCODERS[modality]


def _preprocessing(
    settings: Mapping[str, Any], encoder: EncoderName, resolution: int
) -> Preprocessing | AudioPreprocessing:
    """The trainers' evaluation transforms; frames are sampled uniformly, where they draw them at random."""
    if encoder == "ast":
        skips = bool(settings.get("skip_norm"))  # (x - 0) / (2 * 0.5) is x
        return AudioPreprocessing(
            num_mel_bins=settings.get("melbins", 128),
            max_steps=settings.get("target_length", 1024),
            mean=0.0 if skips else settings.get("norm_mean", AudioPreprocessing().mean),
            std=0.5 if skips else settings.get("norm_std", AudioPreprocessing().std),
        )
    return Preprocessing(resolution=resolution, num_frames=settings.get("num_frames", 8))


def _refuse_unsupported(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    if "connector.0.weight" not in state:
        raise ConversionError("the checkpoint holds no eP-ALM adapter (no connector.0.weight)", param="checkpoint")
    unfrozen = [name for name in ("unfreeze_text_layer_norm", "unfreeze_vision_layer_norm") if settings.get(name)]
    if unfrozen:
        raise ConversionError(
            f"trained with `{unfrozen[0]}`: the trainers do not save what that trains", param="checkpoint"
        )
    if settings.get("use_adapters") or any("adapter" in name for name in state):
        raise ConversionError(
            "adapters inside the language model are not supported: no released configuration has them"
        )
    if settings.get("deep"):
        raise ConversionError("`deep` prompts are not supported: the authors' own model cannot use them")
    if not settings.get("use_vis_prefix", True):
        raise ConversionError("trained without `use_vis_prefix`: nothing is injected")
    if settings.get("shared_connector") is False and settings.get("injected_hidden_states", 1) > 1:
        raise ConversionError(
            "`shared_connector: false` builds one connector and looks for several in the authors' code: leave it out"
        )


def _tensors(state: Mapping[str, Tensor], config: AdapterConfig, dims: OptDims) -> dict[str, Tensor]:
    """Every tensor the family wants.

    Raises: TensorMismatch for one that is missing, of the wrong shape, or that nobody would read; NonFiniteTensor.
    """
    wanted = EPalm().tensor_shapes(config, dims)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise TensorMismatch(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    unread = [name for name in state if name not in wanted]
    if unread:
        raise TensorMismatch(f"the checkpoint holds {unread[0]}, which its config has no use for")
    tensors = {name: state[name].detach().clone().contiguous() for name in wanted}
    check_tensors(config, tensors, dims)
    return tensors
