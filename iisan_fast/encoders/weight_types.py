"""Check the types of a checkpoint's weights: transformers casts numbers of any type to the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..errors import InputError
from .own_code import read_json

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_cast_weights(name: str, folder: Path, model: PreTrainedModel, variant: str | None = None) -> None:
    """Raise InputError if a weight is stored in a type whose numbers mean something else than the model's weights.

    Integers and 8-bit floats need the scales of a quantization, which the configuration has to describe. name: of the
    model, for the message; folder: of its files; variant: as in `from_pretrained`.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return  # transformers reads the scales
    floating = {weight: values.dtype for weight, values in model.state_dict().items() if values.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    floating |= {weight.removeprefix(prefix): dtype for weight, dtype in floating.items()}
    for file in _loaded_files(folder, variant):
        for stored, found in _other_types(file):
            parts = stored.split(".")
            weight = next(
                (end for end in (".".join(parts[cut:]) for cut in range(len(parts))) if end in floating), None
            )
            if weight is not None:
                raise InputError(
                    f"{name}: {file.name}: weights {stored}: expected floating-point numbers of 16 bits or more, as "
                    f"the model computes in {_short(floating[weight])}, found {found} and no quantization_config in "
                    "config.json; restore the checkpoint"
                )


def _loaded_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of weights that transformers loads; none if it finds them in another way."""
    dot = f".{variant}" if variant else ""
    for kind, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole = folder / f"{kind}{dot}.{suffix}"
        if whole.is_file():
            return [whole]
        index = folder / f"{kind}.{suffix}.index{dot}.json"
        if index.is_file():
            return [folder / file for file in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _other_types(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the type of each tensor of a file that is none of FLOATS. No number is read."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            types = {name: tensors.get_slice(name).get_dtype() for name in names}
        yield from ((name, found) for name, found in types.items() if found not in FLOATS)
    else:
        stored = torch.load(file, map_location="meta", weights_only=True)
        for name, values in stored.items():
            if isinstance(values, torch.Tensor) and values.dtype not in FLOAT_TYPES:
                yield name, _short(values.dtype)


def _short(dtype: torch.dtype) -> str:
    """Return a type's name without its module."""
    return str(dtype).removeprefix("torch.")
