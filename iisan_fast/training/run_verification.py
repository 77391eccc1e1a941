"""Check all files of a run, and give checksums to those that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ..config import NEIGHBOURS
from ..errors import InputError
from ..files import refuse_irregular
from ..states import open_states
from ..verified import Damage, Verified
from .checkpoints import RESTORE, damaged_parts, load_checkpoint, save_checkpoint
from .run_files import CATALOGUE_FILE, CHECKPOINTS, HISTORIES_FILE, ITEMS_FILE
from .run_folder import RunFolder
from .run_record import RECORD_FILE, RunRecord
from .run_terms import how_to_make_again, read_terms

NEIGHBOURS_FILE = "neighbours.safetensors"
RECORDED = (
    "sequences.npz",
    ITEMS_FILE,
    "views.json",
    "environment.json",
    NEIGHBOURS_FILE,
    "test.json",
)  # beside config.json
MAY_BE_MISSING = ("environment.json", "test.json")
OF_EARLIER_VERSIONS = (ITEMS_FILE, NEIGHBOURS_FILE)  # whose runs lack these


def verify_run(path: Path, add: bool = True) -> Verified:
    """Check every file of a run, and return what was checked and the damage.

    add: give checksums to the files that have none, as those of older versions, unless they are damaged. Raises
    InputError if the folder holds no run, or if checksums are to be added to a folder that cannot be written or in
    which another process trains.
    """
    if not (path / "config.json").exists():
        raise InputError(f"{path}: not a run folder (no config.json)")
    if not any((path / name).exists() for name in RECORDED):  # a folder of an encoder has a config.json too
        raise InputError(f"{path}: not a run folder (no sequences.npz)")
    folder = RunFolder(path)
    if add:
        folder.remove_leftovers()
    verified = Verified(path, "run")
    record = _record(folder, verified)
    _check_small_files(folder, record, verified)
    names = (*CHECKPOINTS, CATALOGUE_FILE)
    checkpoints = {name: tensors for name in names if (tensors := _tensors_to_add(path / name, verified))}
    if record.published:
        _check_published(folder, record, verified)
    elif _trains_nothing(folder, record):
        _check_untrained(folder, verified)
    else:
        _check_progress(folder, verified)
    damaged = {damage.where.partition(":")[0] for damage in verified.damage}
    _check_features(folder, damaged, verified)
    if RECORD_FILE not in damaged:
        _add(folder, record, checkpoints, damaged, verified, add)
    return verified


def _record(folder: RunFolder, verified: Verified) -> RunRecord:
    """Return the record of a run, which is empty if it has none or a damaged one."""
    try:
        return folder.read_record() or RunRecord()
    except InputError as error:
        remedy = f"remove it, and `iisan-fast verify {folder.path}` makes it again"
        verified.damage.append(Damage(RECORD_FILE, _problem(error, folder.path / RECORD_FILE), remedy))
        return RunRecord()


def _check_small_files(folder: RunFolder, record: RunRecord, verified: Verified) -> None:
    """Read the files that are no checkpoints, and compare them with their checksums."""
    readers: dict[str, tuple[Callable[[], Any], str]] = {
        "config.json": (lambda: folder.config, RESTORE),
        "sequences.npz": (lambda: folder.sequences, RESTORE),
        ITEMS_FILE: (lambda: folder.items, RESTORE),
        "views.json": (lambda: folder.views, RESTORE),
        "environment.json": (lambda: folder.environment, f"{RESTORE}, or remove it to go on without it"),
        NEIGHBOURS_FILE: (lambda: read_terms(folder), how_to_make_again(folder)),
        "test.json": (lambda: folder.figures, f"{_resume(folder)} tests the best checkpoint again"),
    }
    for name, (read, remedy) in readers.items():
        path = folder.path / name
        left_out = (*OF_EARLIER_VERSIONS, *((HISTORIES_FILE,) if record.published else ()))
        may_be_missing = name in MAY_BE_MISSING or (name in left_out and not folder.is_recorded(name))
        if may_be_missing and not path.exists():
            continue
        verified.checked += 1
        try:
            read()
        except InputError as error:
            verified.damage.append(Damage(name, _problem(error, path), remedy))


def _tensors_to_add(path: Path, verified: Verified) -> int:
    """Check a checkpoint, if it is there, and return the number of its tensors if it is whole without checksums."""
    if not path.exists():
        return 0
    try:
        tensors, has_checksums, parts = damaged_parts(path)
    except InputError as error:
        verified.damage.append(Damage(path.name, _problem(error, path), _remedy(path)))
        return 0
    verified.checked += tensors if has_checksums else 0
    verified.damage += [Damage(f"{path.name}: {part}", problem, _remedy(path)) for part, problem in parts]
    return 0 if has_checksums or parts else tensors


def _remedy(path: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    if path.name == "last.safetensors" and path.with_name("previous.safetensors").exists():
        return f"`iisan-fast train --resume {path.parent}` goes on from previous.safetensors"
    if path.name == "previous.safetensors":
        return "remove it; the next checkpoint takes its place"
    if path.name == CATALOGUE_FILE:
        return f"{RESTORE}, or remove it and change the catalogue again"
    return RESTORE


def _check_progress(folder: RunFolder, verified: Verified) -> None:
    """Check that the files that a run writes as it goes on are there and agree with its last checkpoint."""
    if not folder.last.exists():
        if folder.previous.exists() or folder.test.exists():
            verified.damage.append(Damage(folder.last.name, "it is missing", _remedy(folder.last)))
        return
    metrics = _metrics(folder.metrics)  # before the checkpoint, in which a training process may store one more line
    try:
        _, state = load_checkpoint(folder.last)
    except InputError:  # which is among the damage already
        return
    if state.get("best_epoch") and not folder.best.exists():
        verified.damage.append(Damage(folder.best.name, "it is missing", RESTORE))
    verified.checked += 1
    lines = state.get("lines")
    # A run that was killed between the two files, or is training now, has one line less.
    if isinstance(lines, list) and metrics not in (lines, lines[:-1]):
        first = "remove test.json, and " if folder.test.exists() else ""
        remedy = f"{first}{_resume(folder)} writes it again"
        verified.damage.append(Damage(folder.metrics.name, "expected the figures in last.safetensors", remedy))


def _check_features(folder: RunFolder, damaged: set[str], verified: Verified) -> None:
    """Compare the run's files of ready-made features with what was read of them. Files that are gone are passed over.

    damaged: the names of the run's damaged files.
    """
    if folder.is_published or damaged & {"config.json", "views.json", ITEMS_FILE, HISTORIES_FILE}:
        return
    recorded = folder.views
    for config in folder.config.features:
        if not Path(config.path).exists() or config.name not in recorded:
            continue
        verified.checked += 1
        remedy = "restore the file, or train a new run"
        try:
            with closing(open_states(None, [config], folder.items.item_ids)) as states:
                contents = states.contents(config.name, folder.items.item_ids)
        except InputError as error:
            verified.damage.append(Damage(config.path, _problem(error, Path(config.path)), remedy))
            continue
        if contents != recorded[config.name].get("contents"):
            problem = f"the features of view {config.name!r} have changed since the run began"
            verified.damage.append(Damage(config.path, problem, remedy))


def _check_published(folder: RunFolder, record: RunRecord, verified: Verified) -> None:
    """Check that the best checkpoint of a published run is there, if its method has one."""
    if not folder.best.exists() and not _trains_nothing(folder, record):
        verified.damage.append(Damage(folder.best.name, "it is missing", RESTORE))


def _trains_nothing(folder: RunFolder, record: RunRecord) -> bool:
    """Return True for a run of the method that trains nothing, by its settings or by the recorded copy of them."""
    try:
        return folder.config.model.method == NEIGHBOURS
    except InputError:  # which is among the damage already
        return (record.settings or {}).get("model", {}).get("method") == NEIGHBOURS


def _check_untrained(folder: RunFolder, verified: Verified) -> None:
    """Check that the validation figures in metrics.jsonl of a run without training are those in test.json."""
    try:
        figures = folder.figures
    except InputError:  # missing, or among the damage already
        return
    verified.checked += 1
    metrics = _metrics(folder.metrics)
    first = metrics[0] if metrics else None
    if not isinstance(first, dict) or first.get("validation") != figures.get("validation"):
        remedy = f"remove test.json, and {_resume(folder)} writes it again"
        verified.damage.append(Damage(folder.metrics.name, "expected the validation figures in test.json", remedy))


def _metrics(path: Path) -> list[Any] | None:
    """Return the lines of metrics.jsonl; None if they are no JSON, or it is no file."""
    if not path.exists():
        return []
    try:
        refuse_irregular(path)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (InputError, ValueError, RecursionError):
        return None


def _add(
    folder: RunFolder,
    record: RunRecord,
    checkpoints: dict[str, int],
    damaged: set[str],
    verified: Verified,
    write: bool,
) -> None:
    """Give checksums to these checkpoints, and to the other files that have none and are whole.

    checkpoints: the number of tensors by the file's name. write: False only counts what has no checksums.
    """
    files = [
        name for name in RECORDED if name not in record.files and name not in damaged and (folder.path / name).exists()
    ]
    lacks_settings = record.settings is None and "config.json" not in damaged
    count = sum(checkpoints.values()) + len(files) + lacks_settings
    if count == 0 or not write:
        verified.unchecked = count
        return
    with folder.hold():
        record = folder.read_record() or RunRecord()  # a training may have ended meanwhile, and written it
        for name in checkpoints:
            tensors, state = load_checkpoint(folder.path / name)
            save_checkpoint(folder.path / name, tensors, state)
        if record.settings is None and lacks_settings:
            record = record.with_settings(folder.config)
        for name in (name for name in files if name not in record.files):
            record = record.with_file(name, (folder.path / name).read_bytes())
        record.write(folder.path)
    verified.added = count


def _resume(folder: RunFolder) -> str:
    """Return the command that goes on with a run."""
    return f"`iisan-fast train --resume {folder.path}`"


def _problem(error: InputError, path: Path) -> str:
    """Return an error's problem, without the file before it and the remedy behind it."""
    text = str(error).removeprefix(f"{path}: ")
    return text.rpartition("; ")[0] or text
