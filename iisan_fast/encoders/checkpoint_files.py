"""Check the files of a checkpoint before transformers reads them: what would wait for ever, or take all memory.

transformers reports most damage itself. It opens FIFOs, though, and builds a model of any size that a configuration
names before it looks at the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import refuse_irregular
from .own_code import read_json

SUFFIXES = {".json", ".safetensors", ".bin", ".txt", ".model", ".py", ".jinja"}  # of the files that are read
INDEX = "*.index.json"  # which of several files holds a weight
MOST_LAYERS = 10_000
MOST_POSITIONS = 100_000_000
MOST_EDGE = 8192  # pixels of a prepared image's height and width
LEAST_BYTES = 10_000_000  # stands for the size of weights that are not here yet, or are truncated
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
SIZES = ("size", "dim", "heads", "channels", "d_model", "d_ff", "n_embd", "n_head")  # ends of names


def refuse_damaged(folder: Path, complete: bool) -> None:
    """Raise InputError if a checkpoint's files cannot be read safely, or name sizes that its weights cannot have.

    folder: of the checkpoint's files. complete: whether all of them are here, as in a user's own folder. No weight is
    read.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            refuse_irregular(path)
    for index in sorted(folder.glob(INDEX)) if complete else []:
        _check_index(index, folder)
    weights = [path for suffix in ("safetensors", "bin") for path in folder.glob(f"*.{suffix}")]
    _check_sizes(folder / "config.json", max(LEAST_BYTES, sum(path.stat().st_size for path in weights)))
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            _check_edges(folder / name)


def _check_index(index: Path, folder: Path) -> None:
    """Raise InputError unless each file that an index names is a regular file in the folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{index}: weight_map: expected the file of each weight, found {repr(files)[:60]}")
    for file in sorted(set(files.values())):
        if Path(file).name != file or not (folder / file).exists():
            raise InputError(
                f"{index}: weight_map names {file[:100]!r}, which is not in the folder; copy it there again"
            )
        refuse_irregular(folder / file)


def _check_sizes(path: Path, weight_bytes: int) -> None:
    """Raise InputError for a size in a configuration that no model with weights of so many bytes can have."""
    for values in _objects(read_json(path)):
        for name, value in values.items():
            most = _most(name, weight_bytes)
            if most is not None and _is_number(value) and value > most:
                raise InputError(
                    f"{path}: {name}: expected at most {most} for the weights that there are, found {value}"
                )


def _most(name: str, weight_bytes: int) -> int | None:
    """Return the largest value that a setting may have; None if it is no size of the model.

    A dimension of a weight is at most the count of all numbers in the files, of 4 bits at least. Positions may have no
    weights.
    """
    if name in LAYERS:
        return MOST_LAYERS
    if "position" in name:
        return MOST_POSITIONS
    return 2 * weight_bytes if name.endswith(SIZES) else None


def _check_edges(path: Path) -> None:
    """Raise InputError if a processor's settings make images so large that they would take all memory."""
    for values in _objects(read_json(path)):
        edges = [values.get(name) for name in ("height", "width")]
        if "longest_edge" not in values:  # beside it, the shortest edge may be a count of pixels
            edges.append(values.get("shortest_edge"))
        for edge in edges:
            if _is_number(edge) and not 1 <= edge <= MOST_EDGE:
                raise InputError(f"{path}: expected images of 1 to {MOST_EDGE} pixels a side, found {edge}")


def _objects(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a JSON object and the objects inside it."""
    waiting = [values]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += [value for value in current.values() if isinstance(value, dict)]


def _is_number(value: Any) -> bool:
    """Return True for a number of JSON, which a truth value is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
