"""Train one method over several sets of encoders: accuracy and cost against the encoders' size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ViewConfig
from ..encoders import count_parameters
from ..errors import InputError
from .cells import LONGEST_WAIT, Cell, encoding_seconds, run_sweep
from .drawing import two_panels
from .harness import Setup
from .methods import baseline_rows, seeds_row
from .sweep_settings import EncodersSettings
from .tables import NOT_MEASURED

LABEL_POINTS = 8  # the size of a name in the drawing


def compare_encoders(setup: Setup, settings: EncodersSettings) -> dict[str, Any]:
    """Train one method over every set of encoders, as far as that is not done yet in the setup's folder.

    Returns a row for each set, the smallest encoders first. Raises InputError for more than one method, and as
    `run_sweep` does.
    """
    if len(settings.methods) != 1:
        raise InputError(f"methods: expected one, found {', '.join(settings.methods)}")
    folder = run_sweep(setup, settings.sweep)

    def row(name: str) -> dict[str, Any]:
        return {
            **encoders_row(name, folder, settings),
            "baselines": baseline_rows(name, folder, settings, setup.device),
        }

    rows = setup.ranks.apart(LONGEST_WAIT).first_does(lambda: [row(name) for name in settings.encoders])
    return {"rows": sorted(rows, key=lambda row: row["encoder_parameters"])}


def encoders_row(name: str, folder: Path, settings: EncodersSettings) -> dict[str, Any]:
    """Return the figures of one set of encoders."""
    (method,) = settings.methods
    figures = [Cell(name, method, seed).figures(folder) for seed in settings.seeds]
    return {
        "encoders": name,
        "encoder_parameters": encoder_parameters(settings.encoders[name]),
        "encoding_s": encoding_seconds(name, folder),
        **seeds_row(figures),
    }


def encoder_parameters(views: Sequence[ViewConfig]) -> int:
    """Return the number of parameters of all encoders; an encoder of several views counts once."""
    encoders = {(view.encoder, "image" if view.source == "image" else "text") for view in views}
    return sum(count_parameters(encoder, kind) for encoder, kind in encoders)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of two panels against the encoders' parameters: HR@10 and NDCG@10; seconds of epochs and encoding."""
    rows, settings = result["rows"], result["settings"]
    sizes = [row["encoder_parameters"] / 1e6 for row in rows]
    seeds = len(settings["seeds"])
    title = f"{settings['methods'][0]} on {result['dataset']}, {seeds} seed{'s' * (seeds > 1)}"
    with two_panels(path, title) as (accuracy, cost):
        for name, label in (("hr", "HR@10"), ("ndcg", "NDCG@10")):
            deviations = [100 * (row[f"{name}_sd"] or 0) for row in rows]
            accuracy.errorbar(sizes, [100 * row[name] for row in rows], deviations, fmt="o-", capsize=3, label=label)
        cost.plot(sizes, [row["epoch_s"] for row in rows], "o-", label="an epoch of training")
        encoded = [(size, row["encoding_s"]) for size, row in zip(sizes, rows) if row["encoding_s"] != NOT_MEASURED]
        if encoded:
            cost.plot(*zip(*encoded), "s--", color="black", label="encoding the catalogue, once")
        for row, height in zip(rows, _label_heights(rows)):
            point = row["encoder_parameters"] / 1e6, 100 * row["hr"]
            place = {"xytext": (-8, height), "textcoords": "offset points", "ha": "right", "fontsize": LABEL_POINTS}
            accuracy.annotate(row["encoders"], point, **place)
        accuracy.set(ylabel="percent", title="Accuracy")
        accuracy.set_ylim(bottom=0)
        cost.set(ylabel="seconds", title="Cost", yscale="log")
        for axes in (accuracy, cost):
            axes.set(xlabel="millions of parameters of the encoders", xscale="log")
            axes.margins(x=0.25)
            axes.set_xticks(sorted(set(sizes)), [f"{size:.3g}" for size in sorted(set(sizes))])
            axes.set_xticks([], minor=True)


def _label_heights(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the height of each row's name above its HR, in points.

    Names of encoders of one size are set apart, since their HR may be nearly equal.
    """
    heights = []
    for row in rows:
        same_size = [other for other in rows if other["encoder_parameters"] == row["encoder_parameters"]]
        place = sorted(same_size, key=lambda other: other["hr"]).index(row)
        heights.append(2 + 1.2 * LABEL_POINTS * (place - (len(same_size) - 1) / 2))
    return heights
