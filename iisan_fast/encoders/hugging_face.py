"""Load Hugging Face models: from the local cache first, without progress bars, and with errors in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import InputError, is_out_of_memory
from ..files import refuse_irregular
from .hub_files import cached_or_fetched, fetched_folder, model_folder
from .own_code import accepted_own_code, mention_unknown_architecture
from .running_code import own_model_class
from .weight_types import refuse_cast_weights

KINDS_BY_INPUT = {"input_ids": "text", "pixel_values": "image"}  # what an encoder reads, by the name of its main input
TOWER_ATTRIBUTES = {"text": ("text_model", "language_model"), "image": ("vision_model",)}  # of text-image models
UNUSED_WEIGHTS = {"pooler", "head"}  # hidden states do not depend on them, so a checkpoint may lack them
# A checkpoint may ask for outputs that keep all layers in memory and that nothing reads; these settings turn them off.
OUTPUTS = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}


class Architecture(NamedTuple):
    """A checkpoint's configuration and the class of its headless model."""

    config: PretrainedConfig
    model_class: type[PreTrainedModel]


def load_architecture(encoder: str, kind: str, trusted: bool = False, revision: str | None = None) -> Architecture:
    """Return the configuration and the model's class of an encoder that reads `kind`, "text" or "image".

    Of a text encoder-decoder the encoder alone is read. trusted: whether code of the checkpoint's own may run.
    revision: of a hub name. Raises InputError if the encoder reads something else, or brings code of its own that may
    not run.
    """
    named = accepted_own_code(encoder, fetched_folder(encoder, revision), kind, trusted)
    config = cached_or_fetched(AutoConfig.from_pretrained, encoder, revision, trust_remote_code=trusted)
    if config.is_encoder_decoder and kind != "text":
        raise InputError(f"{encoder}: an encoder-decoder; expected an encoder that reads images alone")
    chosen = own_model_class(encoder, named, kind, revision) or model_class(config)
    reads = kind if _has_towers(config) else KINDS_BY_INPUT.get(chosen.main_input_name, "neither text nor images")
    if reads != kind:
        raise InputError(f"{encoder}: reads {reads}, expected an encoder that reads {kind}")
    return Architecture(config, chosen)


def load_model(
    encoder: str, architecture: Architecture, kind: str, options: Mapping[str, Any], revision: str | None = None
) -> PreTrainedModel:
    """Return the headless encoder, or the tower that reads `kind` ("text" or "image") of a text-image model.

    architecture: from `load_architecture`. options: of `from_pretrained`. revision: of a hub name. Raises
    InputError if the checkpoint lacks weights that hidden states depend on, if weights have other shapes or types or
    are not finite, or if the model has no such tower.
    """
    config, chosen = architecture
    if chosen is model_class(config):
        mention_unknown_architecture(encoder, model_folder(encoder, revision), chosen)
    load, options = chosen.from_pretrained, _with_numbered_devices(options)
    try:
        model, info = cached_or_fetched(load, encoder, revision, config=config, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError(
            f"{encoder}: its weights have other shapes than its config.json says; restore the two"
        ) from None
    refuse_cast_weights(encoder, model_folder(encoder, revision), model, options.get("variant"))
    drawn = [key for key in info["missing_keys"] if not _is_computed(model, key)]
    model, prefix = _reader(model, encoder, config, kind)
    used = (key for key in drawn if key.startswith(prefix) and not UNUSED_WEIGHTS & {*key.split(".")})
    refuse_missing_weights(encoder, used)
    _refuse_damaged_weights(encoder, model)
    for name, value in OUTPUTS.items():
        setattr(model.config, name, value)
    return model


def count_parameters(encoder: str, kind: str) -> int:
    """Return the number of parameters of `load_model`'s result, from the configuration alone, without reading weights.

    Raises InputError as `load_architecture` does.
    """
    with quiet_hugging_face(), clear_errors(encoder, "an encoder"):
        config, chosen = load_architecture(encoder, kind)
        with torch.device("meta"):
            model = chosen(config)
        model, _ = _reader(model, encoder, config, kind)
    return sum(parameter.numel() for parameter in model.parameters())


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the headless model; of an encoder-decoder, that of the encoder alone if there is one.

    transformers' automatic mapping lacks some towers (SigLIP's for text); their class is named in the configuration.
    """
    if type(config) not in transformers.MODEL_MAPPING:
        return getattr(transformers, config.architectures[0])
    mapped = transformers.MODEL_MAPPING[type(config)]
    chosen = mapped[0] if isinstance(mapped, tuple) else mapped
    # T5Model, for example, has T5EncoderModel beside it; BartModel has no such class.
    return getattr(transformers, f"{chosen.__name__.removesuffix('Model')}EncoderModel", chosen)


def model_classes(architecture: Architecture) -> list[type[PreTrainedModel]]:
    """Return the class of the headless model, and of each of its towers that the automatic mapping knows."""
    config, chosen = architecture
    towers = [config.text_config, config.vision_config] if _has_towers(config) else []
    return [chosen, *(model_class(tower) for tower in towers if type(tower) in transformers.MODEL_MAPPING)]


def refuse_missing_weights(name: str, missing: Iterable[str]) -> None:
    """Raise InputError if any weights are missing, because transformers would draw them at random.

    missing: the names of weights that the checkpoint of the model `name` lacks.
    """
    if lacking := sorted(missing):
        raise InputError(f"{name}: its checkpoint lacks {len(lacking)} weights, {lacking[0]} first")


def _is_computed(model: PreTrainedModel, weight: str) -> bool:
    """Return True for the weight of sinusoidal positions, which a checkpoint may lack: transformers computes it."""
    return "Sinusoidal" in type(model.get_submodule(weight.rpartition(".")[0])).__name__


def _refuse_damaged_weights(name: str, model: PreTrainedModel) -> None:
    """Raise InputError if a weight is not finite: some kernels of attention would turn it into plausible states."""
    for weights, values in model.named_parameters():
        if values.is_meta or not values.is_floating_point():
            continue
        # The sum is finite unless a value is not, or it is too large; it takes less time than looking at each value.
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
            raise InputError(f"{name}: its weights {weights} are not finite numbers; restore the checkpoint")


def model_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for one of config.ENCODER_DTYPES. "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


@contextlib.contextmanager
def quiet_hugging_face() -> Iterator[None]:
    """Silence Hugging Face's progress bars and messages inside the context.

    TOKENIZERS_PARALLELISM stays off afterwards.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.setLevel("CRITICAL")  # it logs every try to reach the hub; the last error is enough
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def clear_errors(name: str, kind: str) -> Iterator[None]:
    """Turn every error inside the context into an InputError of one line, which names the model.

    kind: the expected kind of model, for the message, such as "an encoder". Raises InputError at once if `name` is a
    path to no folder, and if a FIFO, a device or a link to itself lies in the folder. An error that says that memory
    was refused stays as it is.
    """
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise InputError(f"{name}: no such folder; expected {kind} as transformers saves it, or a hub name")
    if path.is_dir():
        for file in path.iterdir():
            if not file.is_dir():
                refuse_irregular(file)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the errors of damaged weights and wrong settings have no common type
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: cannot be used as {kind} ({type(error).__name__}: {reason})") from error


def _has_towers(config: PretrainedConfig) -> bool:
    """Return True for a model with a text tower and a vision tower."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def _reader(model: PreTrainedModel, encoder: str, config: PretrainedConfig, kind: str) -> tuple[PreTrainedModel, str]:
    """Return the part of a model that reads `kind`, and the prefix of its weights' names.

    This is a tower, the encoder of an encoder-decoder, or the model itself. Raises InputError if no part reads it
    alone.
    """
    if config.is_encoder_decoder and not type(model).__name__.endswith("EncoderModel"):
        if not isinstance(getattr(model, "encoder", None), PreTrainedModel):
            raise InputError(
                f"{encoder}: {type(model).__name__} is an encoder-decoder, and has no encoder to read alone"
            )
        return model.encoder, "encoder."
    if not _has_towers(config):
        return model, ""
    name = next((name for name in TOWER_ATTRIBUTES[kind] if hasattr(model, name)), None)
    if name is None:
        raise InputError(f"{encoder}: {type(model).__name__} has no tower that reads {kind} alone")
    return getattr(model, name), f"{name}."


def _with_numbered_devices(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with GPU numbers as keys of `max_memory`: in JSON, keys are text."""
    limits = options.get("max_memory")
    if not isinstance(limits, Mapping):
        return dict(options)
    numbered = {int(name) if str(name).isdecimal() else name: limit for name, limit in limits.items()}
    return {**options, "max_memory": numbered}
