"""Write one HTML page about a run: figures, curves, gates, accuracy by group, settings, and users with their top ten.

The page holds all that it shows. It has no script and no font, and its policy forbids a browser to load anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...config import RunConfig
from ...data import RunItems, load_dataset
from ...devices import torch_device
from ...errors import InputError
from ...evaluation import target_ranks, user_gains
from ...files import refuse_irregular, write_atomically
from ...printable import printable
from ...setting_fields import to_dict
from ...training import BestRun, RunFolder, load, load_ranking
from ..growing.catalogue_file import read_changes
from ..trained_model import TrainedModel
from .accuracy_groups import AccuracyGroup, accuracy_groups
from .page_charts import curves, group_chart, read_metrics, tower_gates
from .page_figures import (
    changed_settings,
    described_views,
    headline,
    shown_k,
    tested_figures,
    validation_figures,
)
from .page_users import ShownUser, drawn_rows, plain, shown_users
from .thumbnails import Thumbnails, thumbnails

PAGE_NAME = "report.html"  # in the run's folder
MOST_USERS = 100
CATALOGUE_NOTE = "The catalogue has changed since the training; this page ranks the items of the training."
HTML_SUFFIXES = (".html", ".htm")


class WrittenPage(NamedTuple):
    """A page that was written."""

    path: Path
    size: int  # in bytes
    users: int  # that it shows
    pictures: int  # of items
    split: str  # whose targets it shows: "test", or "validation" for a run that is not tested yet


class GroupTable(NamedTuple):
    """The accuracy of users by group."""

    title: str
    label: str  # what the groups differ in
    counted: str  # "users", or "targets" where each target of a user counts
    groups: list[AccuracyGroup]
    chart: Markup


class Shown(NamedTuple):
    """Users with what the page shows of their items."""

    users: list[ShownUser]
    pictures: Thumbnails
    notes: list[str]  # sentences about what is missing


class Targets(NamedTuple):
    """The targets of a split, ranked anew by the best checkpoint."""

    accuracy: float  # HR@K of all users
    tables: list[GroupTable]
    masked_ranks: np.ndarray  # float64 [targets]


def show(
    run: Path,
    out: Path | None = None,
    dataset: Path | None = None,
    users: int = 20,
    seed: int = 0,
    pictures: bool = True,
    device: str | torch.device = "auto",
) -> WrittenPage:
    """Write a self-contained HTML page about a run, and return where it is.

    out: the file; by default report.html in the run's folder. dataset: the folder with the pictures, and with the
    titles of a run that has none; by default the one that the run names. users: how many to draw, at random by `seed`.
    A run that is not tested yet is shown by its validation targets. Raises InputError if the folder holds no run, or
    one without a best checkpoint, or a damaged file, and for arguments that cannot be used.
    """
    folder = RunFolder.open(run)
    out = run / PAGE_NAME if out is None else out
    _refuse_arguments(out, dataset, users, seed)
    values = _values(folder, dataset, users, seed, pictures, torch_device(device))
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "plain": plain}
    content = environment.get_template("page.html").render(values).encode("utf-8", "replace")
    write_atomically(out, content)
    return WrittenPage(out, len(content), len(values["users"]), len(values["pictures"].uris), values["split"])


def _refuse_arguments(out: Path, dataset: Path | None, users: int, seed: int) -> None:
    """Raise InputError for arguments that cannot be used, before any work is done."""
    if out.suffix.lower() not in HTML_SUFFIXES:
        raise InputError(f"out: expected a file that ends in {' or '.join(HTML_SUFFIXES)}, found {out}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"out: expected a file in a folder that exists, found {out}")
    refuse_irregular(out)
    if dataset is not None and not dataset.is_dir():
        raise InputError(f"dataset: expected a folder, found {dataset}")
    if type(users) is not int or not 0 <= users <= MOST_USERS:
        raise InputError(f"users: expected a number from 0 to {MOST_USERS}, found {users!r}")
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed: expected a whole number from 0, found {seed!r}")


def _values(
    folder: RunFolder, dataset: Path | None, users: int, seed: int, pictures: bool, device: torch.device
) -> dict[str, Any]:
    """Return what the template reads. Raises InputError as `show` does."""
    config = folder.config
    best = load(folder.path, device) if folder.has_histories else None
    epoch = load_ranking(folder.path, device).epoch if best is None else best.epoch
    figures = tested_figures(folder, epoch)
    split = "validation" if best is not None and figures is None else "test"
    if best is not None and figures is None:
        figures = validation_figures(best)
    targets = None if best is None else _targets(best, split)
    shown = Shown([], Thumbnails(), [])
    if best is not None and targets is not None and users:
        first_rows = best.sequences.split(split).first_rows
        rows = first_rows[drawn_rows(len(first_rows), users, seed)]
        shown = _shown(folder, best, split, rows, targets.masked_ranks, dataset or Path(config.dataset), pictures)
    items = len(folder.items.item_ids)
    return {
        "name": printable(Path(config.dataset).name),
        "config": config,
        "epoch": epoch,
        "items": items,
        "split": split,
        "headline": None if figures is None else headline(figures, split, items, config.evaluation),
        "curves": curves(read_metrics(folder.metrics), epoch),
        "gates": tower_gates(folder, config),
        "targets": targets,
        "has_histories": best is not None,
        "changed": changed_settings(config),
        "settings": printable(json.dumps(to_dict(config), indent=2, ensure_ascii=False)),
        "views": described_views(folder),
        "environment": {name: plain(str(value)) for name, value in folder.environment.items()},
        "users": shown.users,
        "seed": seed,
        "pictures": shown.pictures,
        "classes": {item_id: f"p{number}" for number, item_id in enumerate(shown.pictures.uris)},
        "notes": shown.notes,
    }


def _shown(
    folder: RunFolder,
    best: BestRun,
    split_name: str,
    rows: np.ndarray,
    ranks: np.ndarray,
    dataset: Path,
    pictures: bool,
) -> Shown:
    """Return the users in some rows of a split, each user's first one. Raises InputError if a score is not finite."""
    titles, titles_note = _titles(folder.items, best.config, dataset)
    model = TrainedModel.load(folder.path, best.item_vectors.device, changed=False)
    users = shown_users(best, model, titles, best.sequences.split(split_name), rows, ranks)
    images = _pictures(users, dataset) if pictures else Thumbnails()
    notes = (CATALOGUE_NOTE if read_changes(folder) else "", titles_note, images.note)
    return Shown(users, images, [note for note in notes if note])


def _targets(best: BestRun, split_name: str) -> Targets | None:
    """Return the targets of a split with their accuracy by group; None without targets.

    Raises InputError if a score is not finite.
    """
    split = best.sequences.split(split_name)
    if not len(split.targets):
        return None
    scores = best.scores(split_name)
    evaluation = best.config.evaluation
    masked, unmasked = target_ranks(scores.queries, scores.vectors, split, evaluation, scores.added)
    k = shown_k(evaluation)
    ranks = masked if evaluation.mask_history else unmasked
    by_user = user_gains(ranks, k, split.repeated_users)
    by_target = user_gains(ranks, k)
    counted = "users" if split.repeated_users is None else "targets"
    lengths = accuracy_groups(split.lengths[split.first_rows], by_user, k)
    counts = accuracy_groups(best.sequences.training_counts[split.targets], by_target, k, zero_apart=True)
    all_users, all_targets = (float(gains[f"hr@{k}"].mean()) for gains in (by_user, by_target))
    tables = [
        _table("By length of the history", "items before the target", "users", lengths, k, all_users),
        _table("By popularity of the target", "times the target occurs in training", counted, counts, k, all_targets),
    ]
    return Targets(all_users, tables, masked)


def _table(title: str, label: str, counted: str, groups: list[AccuracyGroup], k: int, accuracy: float) -> GroupTable:
    """Return groups with their chart."""
    chart = group_chart(f"HR@{k} {title.lower()}", groups, k, label, accuracy, counted)
    return GroupTable(title, label, counted, groups, chart)


def _titles(items: RunItems, config: RunConfig, dataset: Path) -> tuple[list[str] | None, str]:
    """Return the titles of a run's items, or None, and a sentence if the run itself has none."""
    if items.titles is not None:
        return items.titles, ""
    try:
        table = load_dataset(dataset, config.protocol)
    except (InputError, OSError) as error:
        return None, f"Items are shown by their ids: this run has no titles, and its dataset cannot be read ({error})."
    by_id = dict(zip(table.sequences.item_ids, table.titles))
    return [by_id.get(item_id, "") for item_id in items.item_ids], "The titles are those of the dataset."


def _pictures(users: list[ShownUser], dataset: Path) -> Thumbnails:
    """Return the pictures of all items of users."""
    if not dataset.is_dir():
        return Thumbnails(note=f"No pictures: the dataset's folder {dataset} is not there; name it with --dataset.")
    items = [item for user in users for item in (*user.history, *user.recommended, *user.missed)]
    return thumbnails(dataset, list(dict.fromkeys(item.item_id for item in items)))


def _percent(fraction: float | None, decimals: int = 2) -> str:
    """Return a fraction in percent, or a dash if there is none."""
    return "–" if fraction is None else f"{100 * fraction:.{decimals}f}"
