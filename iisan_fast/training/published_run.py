"""Write the part of a run that ranks, without histories and local paths, into a folder that may be published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import NEIGHBOURS, RunConfig
from ..files import absolute_path
from ..setting_fields import from_dict, to_dict
from .checkpoints import read_checkpoint, save_checkpoint
from .run_files import HISTORIES_FILE, ITEMS_FILE, json_file, settings_file
from .run_folder import RunFolder
from .run_record import RunRecord
from .run_terms import how_to_make_again


def write_published(run: Path, folder: Path, include_titles: bool, include_histories: bool) -> None:
    """Write a run's settings, items, best checkpoint, neighbour terms and test figures into an empty folder.

    The folder is a run that ranks as the first one does, bit for bit. Names stand in place of the paths of the dataset,
    the cache and the encoders. include_titles: write the items' titles too. include_histories: write the users' ids and
    histories too. Raises InputError if the run is damaged or not tested yet, or has no histories that could be written.
    """
    source = RunFolder.open(run)
    config = neutral_config(source.config)
    views = {name: _neutral_view(view) for name, view in source.views.items()}
    items = source.items if include_titles else source.items._replace(titles=None)
    items.save(folder / ITEMS_FILE)
    if include_histories:
        source.sequences.save(folder / HISTORIES_FILE)
    contents = {
        "views.json": json_file(views),
        source.test.name: json_file(source.figures),
        source.neighbours.name: source.check_neighbours(how_to_make_again(source)).read_bytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    record = RunRecord(published=True).with_settings(config)
    for name in (ITEMS_FILE, *([HISTORIES_FILE] if include_histories else ()), *contents):
        record = record.with_file(name, (folder / name).read_bytes())
    record.write(folder)
    if config.model.method != NEIGHBOURS:
        checkpoint = read_checkpoint(source.best)
        save_checkpoint(folder / source.best.name, checkpoint.tensors, checkpoint.state)
    (folder / "config.json").write_bytes(settings_file(config))


def neutral_config(config: RunConfig) -> RunConfig:
    """Return a run's configuration with names in place of the paths of its dataset, cache and encoders."""
    values = _without_paths(to_dict(config))
    values["dataset"] = _last_name(config.dataset)
    values["cache"] = None if config.cache is None else "states"
    values["init"] = None if config.init is None else _last_name(config.init)
    for view, neutral in zip(config.features, values["features"]):
        neutral |= {
            part: _last_name(path) for part, path in (("path", view.path), ("ids", view.ids)) if path is not None
        }
    if config.uncached is not None:
        for view, neutral in zip(config.uncached.views, values["uncached"]["views"]):
            neutral["encoder"] = neutral_name(view.encoder)
    return from_dict(RunConfig, values)


def neutral_name(encoder: str) -> str:
    """Return ./NAME for an encoder's folder, which no hub name looks like, or a hub name as it is."""
    is_folder = Path(encoder).is_absolute() or encoder.startswith((".", "~")) or Path(encoder).is_dir()
    return f"./{_last_name(encoder)}" if is_folder else encoder


def _neutral_view(view: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a view with names in place of paths."""
    encoder = {"encoder": neutral_name(view["encoder"])} if "encoder" in view else {}
    file = {"path": _last_name(view["path"])} if "path" in view else {}
    return {**_without_paths(view), **encoder, **file}


def _last_name(path: str) -> str:
    """Return the name of a folder without the folders that it lies in."""
    return absolute_path(Path(path)).name or "root"


def _without_paths(value: Any) -> Any:
    """Return JSON values with the last name in place of each absolute path."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(inner) for inner in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return _last_name(value) if is_path else value
