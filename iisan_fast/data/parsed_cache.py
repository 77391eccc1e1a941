"""Keep large datasets, parsed under the protocol, as mapped arrays in the user's cache folder, by their files' digests.

A dataset is then parsed once, and its interactions are read from the files where they are used. A cache that is damaged
is made again; without room for one the dataset is parsed in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..config import ProtocolConfig
from ..errors import InputError
from ..files import cache_folder, expanded_path, refuse_irregular, remove_leftovers, whole_folder
from .array_files import pack_texts, unpack_texts
from .array_folder import INDEX, DamagedArrays, read_arrays_of, write_index
from .growing_arrays import IN_MEMORY, GrowingArrays, ends_name
from .parsed_dataset import ParsedDataset, parse_dataset
from .split import LEAVE_ONE_OUT
from .text_array import TextArray

LOGGER = logging.getLogger(__name__)
CACHE_VARIABLE = "IISAN_FAST_PARSED"
FORMAT = 1  # of the arrays, and of what the protocol makes of the files
LEAST_BYTES = 16 << 20  # of users.tsv; a smaller one is parsed in less than a second
ITEM_DTYPE = np.int32  # of large datasets, cached or not: the ranks of a job compare their arrays
MOST_DATASETS = 8  # that are kept, those that were used last
LONGEST_WAIT = 600  # seconds, for another process that parses the same dataset
FILES_OF_SPLITS = {"temporal": ("times.tsv",), "given": ("splits.tsv",)}
OPTIONAL_FILE = "captions.tsv"
FILES = ("items.tsv", OPTIONAL_FILE, "users.tsv")
BYTES_AT_ONCE = 1 << 20
ENTRY = re.compile("[0-9a-f]{64}")
LEFT_OVER = re.compile(r"\.([0-9a-f]{64})\.")  # the beginning of a temporary folder's name


def parsed_dataset(root: Path, protocol: ProtocolConfig) -> ParsedDataset:
    """Return a dataset folder under the protocol; a large one from the cache, or through it.

    Raises InputError for a missing or malformed file, naming file and line.
    """
    users = root / "users.tsv"
    if not users.is_file() or users.stat().st_size < LEAST_BYTES:
        return parse_dataset(root, protocol, IN_MEMORY, IN_MEMORY)
    try:
        return _cached(root, protocol)
    except (OSError, RuntimeError, DamagedArrays) as error:
        LOGGER.info("%s: parsed in memory; its arrays cannot be cached (%s)", root, error)
        arrays = GrowingArrays(item_dtype=ITEM_DTYPE)
        return parse_dataset(root, protocol, arrays, arrays)


def cached_datasets() -> Path:
    """Return the folder of the parsed datasets, which may not exist yet. Raises RuntimeError without a home folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return expanded_path(named) if named else cache_folder() / "parsed"


def _cached(root: Path, protocol: ProtocolConfig) -> ParsedDataset:
    """Return a dataset from the cache, or parse it into the cache. Raises InputError, and OSError without room."""
    folder = cached_datasets()
    folder.mkdir(parents=True, exist_ok=True)
    before = _states_of_files(root, protocol)
    entry = folder / _digest(root, protocol)
    with suppress(FileNotFoundError):
        return _read(entry, root)
    with _one_at_a_time(entry):
        with suppress(FileNotFoundError):  # another process has parsed it meanwhile
            return _read(entry, root)
        return _parsed_into(entry, root, protocol, before)


def _parsed_into(entry: Path, root: Path, protocol: ProtocolConfig, before: dict[str, Any]) -> ParsedDataset:
    """Parse a dataset into its folder of the cache, and return it. before: of its files, when they were digested.

    Raises InputError, and OSError if there is no room.
    """
    if os.path.lexists(entry) and not (entry / INDEX).exists():  # a damaged one that could not be removed, or a file
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(entry))
    LOGGER.info("%s: parsing; its arrays are written into %s", root, entry)
    try:
        with whole_folder(entry) as temporary:
            scratch = temporary.parent / "scratch"
            scratch.mkdir()
            arrays = (GrowingArrays(folder, ITEM_DTYPE) for folder in (scratch, temporary))
            parsed = parse_dataset(root, protocol, *arrays)
            if _states_of_files(root, protocol) != before:
                raise OSError("a file changed while it was read")
            write_index(
                temporary, _arrays_of(parsed), {"digest": entry.name, "without_history": parsed.without_history}
            )
    except (InputError, OSError):
        if not (entry / INDEX).exists():  # else another process was faster
            raise
    _remove_old_ones(entry.parent)
    return _stored(entry)


def _read(entry: Path, root: Path) -> ParsedDataset:
    """Return a dataset from its folder of the cache. A damaged folder is removed, with a message.

    Raises FileNotFoundError if there is no folder that can be read.
    """
    if not entry.is_dir():
        raise FileNotFoundError(entry)
    try:
        parsed = _stored(entry)
    except DamagedArrays as error:
        LOGGER.warning("%s: the parsed dataset is damaged (%s); it is made again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        raise FileNotFoundError(entry) from None
    LOGGER.info("%s: read from its parsed arrays in %s", root, entry)
    with suppress(OSError):
        os.utime(entry / INDEX)  # the order in which datasets were used
    return parsed


def _stored(entry: Path) -> ParsedDataset:
    """Return a dataset from its folder of the cache. Raises DamagedArrays."""
    arrays, values = read_arrays_of(entry)
    if values["digest"] != entry.name:
        raise DamagedArrays(f"{INDEX} is of another dataset")
    return _of_arrays(arrays, values)


@contextmanager
def _one_at_a_time(entry: Path) -> Iterator[None]:
    """Wait until no other process parses the same dataset, but not for ever, and keep others waiting.

    Without locks on the file system several parse at the same time, and the first one's result is kept.
    """
    path = entry.with_suffix(".lock")
    lock = FileLock(path, timeout=LONGEST_WAIT)
    with suppress(Timeout, OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()
            path.unlink(missing_ok=True)


def _files(root: Path, protocol: ProtocolConfig) -> list[Path]:
    """Return the files that are read under a protocol; captions.tsv only if it is there."""
    names = [*FILES, *FILES_OF_SPLITS.get(protocol.split, ())]
    return [root / name for name in names if name != OPTIONAL_FILE or os.path.lexists(root / name)]


def _states_of_files(root: Path, protocol: ProtocolConfig) -> dict[str, list[int]]:
    """Return size, time and number of each file that is read. Raises OSError if one is missing."""
    stats = {path.name: path.stat() for path in _files(root, protocol)}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}


def _digest(root: Path, protocol: ProtocolConfig) -> str:
    """Return the name of a dataset in the cache: SHA-256 (hex) of its files, the protocol and the format.

    Raises OSError if a file cannot be read, InputError if it is no regular file.
    """
    digests = {path.name: _file_digest(path) for path in _files(root, protocol)}
    described = json.dumps([FORMAT, vars(protocol), digests], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file. Raises OSError if it cannot be read, InputError if it is not regular."""
    refuse_irregular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(BYTES_AT_ONCE):
            digest.update(content)
    return digest.hexdigest()


def _remove_old_ones(folder: Path) -> None:
    """Remove the datasets that were not among the last ones used, and what killed processes have left."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if left := LEFT_OVER.match(name):
                remove_leftovers(folder / left[1])
        entries = [path for path in folder.iterdir() if ENTRY.fullmatch(path.name) and (path / INDEX).exists()]
        entries.sort(key=lambda path: (path / INDEX).stat().st_mtime_ns, reverse=True)
        for path in entries[MOST_DATASETS:]:
            shutil.rmtree(path, ignore_errors=True)  # a process that has mapped its files keeps them


def _arrays_of(parsed: ParsedDataset) -> dict[str, np.ndarray]:
    """Return the arrays of a parsed dataset by their names in the cache."""
    texts: dict[str, Sequence[str]] = {
        "user_ids": parsed.user_ids,
        "item_ids": parsed.item_ids,
        "titles": parsed.titles,
        "captions": [caption or "" for caption in parsed.captions],
    }
    arrays = {}
    for name, values in texts.items():
        arrays[name], arrays[ends_name(name)] = pack_texts(values)
    arrays["has_caption"] = np.array([caption is not None for caption in parsed.captions], dtype=np.uint8)
    arrays |= {"offsets": parsed.offsets, "items": parsed.items}
    if parsed.training_ends is not parsed.targets["validation"]:
        arrays["training_ends"] = parsed.training_ends
    for kind, by_split in (("targets", parsed.targets), ("target_counts", parsed.target_counts or {})):
        arrays |= {f"{name}_{kind}": array for name, array in by_split.items()}
    return arrays


def _of_arrays(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> ParsedDataset:
    """Return the parsed dataset of arrays in the cache. The catalogue's texts come into memory."""
    item_ids, titles, captions = (
        unpack_texts(arrays[name], arrays[ends_name(name)]) for name in ("item_ids", "titles", "captions")
    )
    targets, target_counts = (
        {name: arrays[f"{name}_{kind}"] for name in LEAVE_ONE_OUT if f"{name}_{kind}" in arrays}
        for kind in ("targets", "target_counts")
    )
    has_caption = arrays["has_caption"].tolist()
    return ParsedDataset(
        user_ids=TextArray(arrays["user_ids"], arrays[ends_name("user_ids")]),
        item_ids=item_ids,
        titles=titles,
        captions=[caption if has else None for caption, has in zip(captions, has_caption)],
        offsets=arrays["offsets"],
        items=arrays["items"],
        training_ends=arrays.get("training_ends", targets["validation"]),
        targets=targets,
        target_counts=target_counts or None,
        without_history=values["without_history"],
    )
