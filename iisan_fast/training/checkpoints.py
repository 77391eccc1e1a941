"""Write and read checkpoints: weights, optimizer state and a little JSON in one safetensors file.

A file is written as a whole or not at all. It holds a checksum of each tensor and of the JSON, which is compared when
it is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..checksums import checksum, tensor_checksums
from ..errors import InputError
from ..files import refuse_irregular, whole_file
from ..models import ITEM_PARAMETERS
from ..recorded_json import parse_json_object
from ..states import ItemSource

AVERAGE = "average."  # the start of the names of averaged weights in the last checkpoint
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
ITEM_VECTORS = "item_vectors"  # the name of the catalogue's vectors in the best checkpoint
CHECKSUMS = "checksums"  # their name in a checkpoint's JSON
DOES_NOT_FIT = "its checksum does not fit"
RESTORE = "restore the file from a copy"


class Checkpoint(NamedTuple):
    """The content of a checkpoint's file."""

    tensors: dict[str, Tensor]  # on the CPU
    state: dict[str, Any]
    checked: bool  # False for a file without checksums, of an older version


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors, and `state` as JSON into the file's metadata, with their checksums.

    A stopped write leaves the old file unchanged. Raises OSError if the file cannot be written.
    """
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, state, path)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint into `file`. path: the checkpoint's name for messages.

    Raises OSError if the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry of metadata, because safetensors writes several in random order.
    metadata = {"state": json.dumps({**state, CHECKSUMS: _checksums(contiguous, state)})}
    try:
        safetensors.torch.save_file(contiguous, file, metadata=metadata)  # `save` would hold it in memory, twice
    except safetensors.SafetensorError as error:
        raise _as_os_error(error, path) from None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors, on the CPU, and its state. Raises InputError as `read_checkpoint` does."""
    checkpoint = read_checkpoint(path)
    return checkpoint.tensors, checkpoint.state


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the content of a checkpoint's file.

    Raises InputError, naming the file and the tensor, if the file is missing or damaged.
    """
    checkpoint, checksums = _read(path)
    for part, problem in _damaged_parts(checkpoint, checksums):
        raise InputError(f"{path}: damaged: {part}: {problem}; {RESTORE}")
    return checkpoint


def damaged_parts(path: Path) -> tuple[int, bool, list[tuple[str, str]]]:
    """Return the number of tensors in a checkpoint's file, whether it has checksums, and its damaged parts.

    Each damaged part has a name, such as "tensor 'model.gate'", and a problem. Raises InputError if the file is missing
    or cannot be read.
    """
    checkpoint, checksums = _read(path)
    return len(checkpoint.tensors), checkpoint.checked, list(_damaged_parts(checkpoint, checksums))


def _read(path: Path) -> tuple[Checkpoint, Any]:
    """Return the content of a checkpoint's file and the checksums in it, which are not compared.

    A file that a training process replaces meanwhile is read again: safetensors opens it by its name more than once.
    Raises InputError if the file is missing or cannot be read.
    """
    while True:
        before = _identity(path)
        content = _read_once(path)
        if _identity(path) == before:
            return content


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of the same name; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_once(path: Path) -> tuple[Checkpoint, Any]:
    """Return what `_read` returns, or a mixture if the file is replaced meanwhile.

    Raises InputError if the file is missing or cannot be read.
    """
    refuse_irregular(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = parse_json_object((file.metadata() or {}).get("state", "null"), "state")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (safetensors.SafetensorError, ValueError, RuntimeError, InputError) as error:
        raise InputError(f"{path}: not a checkpoint of this program, or damaged ({error}); {RESTORE}") from None
    checksums = state.pop(CHECKSUMS, None)
    return Checkpoint(tensors, state, checked=checksums is not None), checksums


def _damaged_parts(checkpoint: Checkpoint, checksums: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each part of a checkpoint that does not fit its checksum.

    Without checksums, numbers that are not finite and a state without epoch are damage.
    """
    if checkpoint.checked:
        yield from _unlike(checkpoint, checksums)
    else:
        for name, tensor in checkpoint.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield f"tensor {name!r}", "expected finite numbers"
    epoch = checkpoint.state.get("epoch")
    if type(epoch) is not int or epoch < 0:
        yield "state", f"expected the state of a checkpoint with its epoch, found {json.dumps(checkpoint.state)[:60]}"


def _unlike(checkpoint: Checkpoint, stored: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each part of a checkpoint that does not fit its stored checksum."""
    if not isinstance(stored, dict) or not isinstance(stored.get("tensors"), dict):
        yield CHECKSUMS, "expected the checksums of its tensors"
        return
    computed = _checksums(checkpoint.tensors, checkpoint.state)
    if stored.get("state") != computed["state"]:
        yield "state", DOES_NOT_FIT
    for name in sorted(stored["tensors"].keys() | computed["tensors"].keys()):
        if name not in computed["tensors"]:
            yield f"tensor {name!r}", "it is missing"
        elif stored["tensors"].get(name) != computed["tensors"][name]:
            yield f"tensor {name!r}", DOES_NOT_FIT


def _checksums(tensors: Mapping[str, Tensor], state: Any) -> dict[str, Any]:
    """Return the checksums of a checkpoint's state and of each tensor, as JSON values."""
    return {
        "state": checksum(json.dumps(state).encode(), b"state").hex(),
        "tensors": dict(sorted(tensor_checksums(tensors).items())),  # so that the same content is the same file
    }


def _as_os_error(error: safetensors.SafetensorError, path: Path) -> OSError:
    """Return the OSError that safetensors met while it wrote a file; it gives the number in its text alone."""
    code = re.search(r"code: (\d+)|os error (\d+)", str(error))
    number = int(code[1] or code[2]) if code else errno.EIO
    return OSError(number, os.strerror(number) if code else str(error), str(path))


class HasState(Protocol):
    """An optimizer, or another object that holds Adam's state of each parameter."""

    state: Mapping[nn.Parameter, dict[str, Tensor]]


def adam_tensors(model: nn.Module, optimizer: HasState) -> dict[str, Tensor]:
    """Return Adam's state of the trained parameters, as tensors named adam.<kind>.<parameter's name>."""
    tensors = {}
    for name, parameter in _trained(model).items():
        state = optimizer.state[parameter]
        # Parameters may share one tensor of steps, but a file may not hold a tensor twice.
        tensors |= {
            f"adam.{kind}.{name}": state[kind].clone() if kind == "step" else state[kind] for kind in ADAM_STATE
        }
    return tensors


def load_adam(model: nn.Module, optimizer: HasState, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the result of `adam_tensors` into an optimizer's state.

    Raises InputError, naming the file, if names, shapes or dtypes are those of another model, if the numbers of steps
    differ, or if a mean of squares is below 0. Nothing is copied then: with a wrong shape, an update would read and
    write outside of a tensor.
    """
    parameters = _trained(model)
    expected = {
        f"adam.{kind}.{name}": _Form((), torch.float32) if kind == "step" else _form(parameter)
        for name, parameter in parameters.items()
        for kind in ADAM_STATE
    }
    _refuse_other_tensors(expected, tensors, "adam.", path, "the optimizer's state")
    steps = {float(tensors[f"adam.step.{name}"]) for name in parameters}
    if not all(step >= 1 and step.is_integer() for step in steps):
        raise InputError(f"{path}: the optimizer's state: expected a number of steps, found {sorted(steps)}; {RESTORE}")
    if len(steps) > 1:
        raise InputError(f"{path}: the optimizer's state has parameters after {sorted(steps)} steps; restore the file")
    for name in parameters:
        if (tensors[f"adam.exp_avg_sq.{name}"] < 0).any():
            raise InputError(f"{path}: the optimizer's state: expected squares, found numbers below 0; {RESTORE}")
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for kind in ADAM_STATE:
            stored = tensors[f"adam.{kind}.{name}"]
            if kind in state:
                state[kind].copy_(stored)
            else:
                state[kind] = stored.to(parameter.device)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the result of `named_weights` into a model.

    Raises InputError, naming the file, if names, shapes or dtypes are those of another model.
    """
    weights = named_weights(model)
    expected = {name: _form(weight) for name, weight in weights.items()}
    _refuse_other_tensors(expected, tensors, "model.", path, "the weights")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def item_vectors(tensors: Mapping[str, Tensor], items: int, width: int, path: Path) -> Tensor:
    """Return the item vectors, float32 [items, width], of a best checkpoint.

    Raises InputError, naming the file, if it has none of this shape and dtype.
    """
    expected = {ITEM_VECTORS: _Form((items, width), torch.float32)}
    _refuse_other_tensors(expected, tensors, ITEM_VECTORS, path, "the item vectors")
    return tensors[ITEM_VECTORS]


def without_item_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without the weights that give item vectors."""
    starts = tuple(f"model.{start}" for start in ITEM_PARAMETERS)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by the names that checkpoints use, model.<parameter's name>.

    Frozen parameters are not stored: they come from the encoders' files.
    """
    return {f"model.{name}": parameter for name, parameter in _trained(model).items()}


def average_tensors(model: nn.Module, averages: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Return the averages of the trained parameters, as tensors named average.<parameter's name>."""
    return {f"{AVERAGE}{name}": averages[weight] for name, weight in _trained(model).items() if weight in averages}


def load_averages(
    model: nn.Module, averages: Mapping[nn.Parameter, Tensor], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Copy the result of `average_tensors` into a step's averages.

    Raises InputError, naming the file, if names, shapes or dtypes are others.
    """
    current = average_tensors(model, averages)
    expected = {name: _form(average) for name, average in current.items()}
    _refuse_other_tensors(expected, tensors, AVERAGE, path, "the averaged weights")
    for name, average in current.items():
        average.copy_(tensors[name])


def weights_to_keep(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a last checkpoint with averaged weights, if it has them, in place of the trained ones."""
    averages = {
        name.replace(AVERAGE, "model.", 1): tensor for name, tensor in tensors.items() if name.startswith(AVERAGE)
    }
    return {**tensors, **averages}


def best_tensors(model: nn.Module, vectors: Tensor, source: ItemSource) -> dict[str, Tensor]:
    """Return the tensors of a best checkpoint: trained weights, item vectors, statistics of standardised states.

    vectors: [items, d] of the catalogue. source: the items.
    """
    tensors = {**named_weights(model), ITEM_VECTORS: vectors}
    for view, statistics in source.statistics.items():
        tensors |= statistics.tensors(view)
    return tensors


class _Form(NamedTuple):
    """The shape and the dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        """Return the shape and dtype as text, such as "(3, 4) of float32"."""
        return f"{self.shape} of {str(self.dtype).removeprefix('torch.')}"


def _form(tensor: Tensor) -> _Form:
    """Return the shape and dtype of a tensor."""
    return _Form(tuple(tensor.shape), tensor.dtype)


def _refuse_other_tensors(
    expected: Mapping[str, _Form], tensors: Mapping[str, Tensor], prefix: str, path: Path, content: str
) -> None:
    """Raise InputError unless the tensors with this prefix have the expected names, shapes and dtypes."""
    stored = {name: _form(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
    for name in sorted(expected.keys() | stored):
        if expected.get(name) != stored.get(name):
            raise InputError(
                f"{path}: {content} of another model ({name}: expected {expected.get(name, 'nothing')}, "
                f"found {stored.get(name, 'nothing')}); restore the file"
            )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
