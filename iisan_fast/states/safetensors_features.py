"""Read features from a safetensors file: one tensor with ids beside it or in the metadata, or a tensor for each item.

The tensors are memory-mapped: nothing is copied when the file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch

from ..config import FeaturesConfig
from ..errors import InputError, first_few
from .feature_content import FeatureContent, shaped

KINDS = {  # of tensors of features: the dtype in which numpy maps them, and that in which they are read
    "F16": ("<f2", torch.float16),
    "F32": ("<f4", torch.float32),
    "F64": ("<f8", torch.float32),
    "BF16": ("<i2", torch.bfloat16),
}
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
NAMES_OF_IDS = ("ids", "item_ids", "item_id", "items", "id")  # of a metadata entry, and of a tensor among several


class _Tensor(NamedTuple):
    """One tensor in the file."""

    kind: str  # F16, BF16, I64, …
    shape: tuple[int, ...]
    start: int  # the first byte, counted from the beginning of the file
    end: int


def open_safetensors(config: FeaturesConfig, path: Path, item_ids: Collection[str]) -> FeatureContent:
    """Open the features of a safetensors file. item_ids: of the run's items.

    Raises InputError if the file is damaged, or if its tensors do not say which of them holds features.
    """
    tensors, metadata = _read_header(path)
    if config.tensor is None and (names := _tensors_of_items(tensors, item_ids)):
        return _open_items(path, tensors, names)
    features = {name: tensor for name, tensor in tensors.items() if tensor.kind in KINDS}
    if config.tensor is not None:
        if config.tensor not in tensors:
            raise InputError(f"{path}: has no tensor {config.tensor!r}, but {first_few(tensors, len(tensors), 10)}")
        features = {config.tensor: tensors[config.tensor]}
    if len(features) != 1:
        if not features:
            kinds = [f"{name} of {tensor.kind}" for name, tensor in tensors.items()]
            listed = first_few(kinds, len(kinds), 10) or "none"
            raise InputError(f"{path}: expected a tensor of features of {', '.join(KINDS)}, found {listed}; convert it")
        names_text = first_few(features, len(features), 10)
        raise InputError(f"{path}: expected one tensor of features, found {names_text}; name it by tensor=NAME")
    ((name, tensor),) = features.items()
    if tensor.kind not in KINDS:
        raise InputError(f"{path}: tensor {name!r}: expected {', '.join(KINDS)}, found {tensor.kind}")
    mapped, dtype = KINDS[tensor.kind]
    where = f"{path}: tensor {name!r}"
    array = shaped(_mapped(path, tensor, mapped, where), where)
    return FeatureContent(array, dtype, _ids(path, tensors, metadata, len(array)))


def _read_header(path: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata. Raises InputError if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="np"):  # checks that the tensors fill the file without gaps
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file ({error}); save it again") from None
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = _Tensor(entry["dtype"], tuple(entry["shape"]), start + first, start + last)
    return tensors, metadata


def _tensors_of_items(tensors: dict[str, _Tensor], item_ids: Collection[str]) -> list[str]:
    """Return the names of the tensors of features if they are item ids, in the order of the file; else none."""
    names = [name for name, tensor in tensors.items() if tensor.kind in KINDS]
    if not any(item_id in tensors for item_id in item_ids):
        return []
    return sorted(names, key=lambda name: tensors[name].start)


def _open_items(path: Path, tensors: dict[str, _Tensor], names: list[str]) -> FeatureContent:
    """Open a file with a tensor for each item: [D], or [K, D]. Raises InputError if they differ in shape or dtype."""
    first = tensors[names[0]]
    for name in names:
        tensor = tensors[name]
        if (tensor.kind, tensor.shape) != (first.kind, first.shape):
            raise InputError(
                f"{path}: expected the features of all items alike, found {first.kind} {list(first.shape)} of item "
                f"{names[0]!r} and {tensor.kind} {list(tensor.shape)} of item {name!r}"
            )
    size = first.end - first.start
    mapped, dtype = KINDS[first.kind]
    if len(first.shape) not in (1, 2) or not size:
        raise InputError(f"{path}: item {names[0]!r}: expected [width] or [layers, width], found {list(first.shape)}")
    joined = _Tensor(first.kind, (len(names), *first.shape), first.start, tensors[names[-1]].end)
    if joined.end - joined.start != size * len(names):
        raise InputError(f"{path}: other tensors lie between those of the items; save those of the items alone")
    return FeatureContent(shaped(_mapped(path, joined, mapped, str(path)), str(path)), dtype, names)


def _ids(path: Path, tensors: dict[str, _Tensor], metadata: dict[str, str], rows: int) -> list[str] | None:
    """Return the ids of the rows: a tensor of whole numbers, or a list in the metadata; None if there are none.

    Raises InputError if they do not fit the rows.
    """
    for name in NAMES_OF_IDS:
        if name in metadata:
            return _checked(_ids_of_text(metadata[name], f"{path}: metadata {name!r}"), rows, f"{path}: {name!r}")
    integers = [name for name, tensor in tensors.items() if tensor.kind in INTEGERS and len(tensor.shape) == 1]
    named = [name for name in NAMES_OF_IDS if name in integers] or integers
    if not named:
        return None
    if len(named) > 1:
        raise InputError(f"{path}: expected one tensor of item ids, found {', '.join(named)}; keep one of them")
    tensor = tensors[named[0]]
    where = f"{path}: tensor {named[0]!r}"
    ids = [str(number) for number in _mapped(path, tensor, INTEGERS[tensor.kind], where).tolist()]
    return _checked(ids, rows, where)


def _ids_of_text(text: str, where: str) -> list[str]:
    """Return the ids in a metadata entry, a list as JSON. Raises InputError for another entry."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    kinds = {type(value) for value in values} if isinstance(values, list) else {None}
    if not kinds <= {str, int}:
        raise InputError(f"{where}: expected item ids as a list in JSON, found {text[:60]!r}")
    return [str(value) for value in values]


def _checked(ids: list[str], rows: int, where: str) -> list[str]:
    """Return the ids. Raises InputError unless there is one for each row."""
    if len(ids) != rows:
        raise InputError(f"{where}: expected an id for each of {rows} rows of features, found {len(ids)}")
    return ids


def _mapped(path: Path, tensor: _Tensor, dtype: str, where: str) -> np.ndarray:
    """Return a tensor memory-mapped. Raises InputError for an empty one."""
    if tensor.end == tensor.start:
        raise InputError(f"{where}: expected numbers, found none")
    return np.memmap(path, np.dtype(dtype), "r", tensor.start, tensor.shape)
