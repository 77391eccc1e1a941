"""Draw the charts of a run's page: curves by epoch, gates by layer, accuracy by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from ...config import SIDE_METHODS, RunConfig
from ...errors import InputError
from ...evaluation import headline_metrics
from ...files import refuse_irregular
from ...recorded_json import is_finite_number, parse_json_object
from ...states import group_positions
from ...training import RunFolder
from .accuracy_groups import AccuracyGroup
from .charts import Bar, Series, bar_chart, line_chart

CURVE_K = 10  # of the validation figures, by which the best epoch is chosen
GATE_TEMPERATURE = 0.1
GATE_NAME = "model.item_encoder.side_network.{}.gate"


class Curves(NamedTuple):
    """The course of a training."""

    epochs: int
    seconds: float  # of training and validation
    charts: list[tuple[str, Markup]]  # captions and drawings


class TowerGates(NamedTuple):
    """The gates of a tower of the side network."""

    tower: str
    reads: str  # the views that it reads
    values: list[tuple[str, float]]  # the layer, and its gate from 0 to 1
    chart: Markup


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, one for each epoch; none if there is no such file.

    Raises InputError, naming the file and the line, for a line without an epoch, a loss and validation figures.
    """
    if not path.exists():
        return []
    refuse_irregular(path)
    return [_epoch_line(text, f"{path} line {line}") for line, text in enumerate(path.read_bytes().splitlines(), 1)]


def curves(lines: Sequence[Mapping[str, Any]], best_epoch: int) -> Curves | None:
    """Return the curves of the loss and of the validation figures; None for a run that trained nothing."""
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return None
    epochs = [line["epoch"] for line in trained]
    validation = [headline_metrics(line["validation"]) for line in trained]
    accuracy = [
        Series(name, [values[name.lower()] for values in validation]) for name in (f"HR@{CURVE_K}", f"NDCG@{CURVE_K}")
    ]
    loss = Series("loss", [line["loss"] for line in trained])
    charts = [
        ("Training loss", line_chart("Training loss by epoch", epochs, [loss], ("epoch", "loss"), _plain, best_epoch)),
        (
            "Accuracy on the validation targets",
            line_chart(
                "HR and NDCG on validation by epoch", epochs, accuracy, ("epoch", "percent"), percent, best_epoch
            ),
        ),
    ]
    times = [line.get(name) for line in trained for name in ("train_seconds", "validation_seconds")]
    return Curves(len(trained), sum(time for time in times if is_finite_number(time)), charts)


def tower_gates(folder: RunFolder, config: RunConfig) -> list[TowerGates]:
    """Return the gates of each tower in a run's best checkpoint; none for a model without gates.

    Raises InputError if the checkpoint is damaged.
    """
    if config.model.method not in SIDE_METHODS or not config.model.gates:
        return []
    tensors, _ = folder.load_best()
    towers = []
    for tower in config.model.towers(len(config.views)):
        gate = tensors.get(GATE_NAME.format(tower))
        if gate is None:
            raise InputError(f"{folder.best}: expected the gates of the tower {tower}, found none; restore the file")
        values = torch.sigmoid(gate.double() / GATE_TEMPERATURE).tolist()
        towers.append(_tower_gates(tower, config.views, _layers(folder, config, tower, len(values)), values))
    return towers


def group_chart(
    title: str, groups: Sequence[AccuracyGroup], k: int, label: str, overall: float, counted: str = "users"
) -> Markup:
    """Return the bars of HR@K by group with their intervals. overall: HR@K of all, a broken line.

    counted: "users" or "targets".
    """
    bars = [
        Bar(group.label, *group.hr, f"{group.label}: HR@{k} {percent(group.hr.value)} %, {group.users:,} {counted}")
        for group in groups
    ]
    return bar_chart(title, bars, (label, f"HR@{k}, percent"), percent, level=(overall, f"all {counted}"))


def percent(fraction: float) -> str:
    """Return a fraction in percent with as many decimals as an axis needs."""
    return f"{100 * fraction:.4g}"


def _plain(value: float) -> str:
    """Return a number of an axis."""
    return f"{value:.4g}"


def _epoch_line(text: bytes, where: str) -> dict[str, Any]:
    """Return the figures of an epoch. Raises InputError, naming the line, if they are not whole."""
    values = parse_json_object(text, where)
    if "loss" not in values:
        return values
    names = [f"{name}@{CURVE_K}" for name in ("hr", "ndcg")]
    try:
        validation = headline_metrics(values["validation"])
        numbers = [values["epoch"], values["loss"], *(validation[name] for name in names)]
    except (KeyError, TypeError):
        numbers = [None]
    if not all(map(is_finite_number, numbers)):
        raise InputError(f"{where}: expected an epoch, its loss and validation figures, found something else")
    return values


def _tower_gates(tower: str, views: Sequence[str], layers: Sequence[str], values: Sequence[float]) -> TowerGates:
    """Return the gates of one tower, with their chart."""
    reads = {"first": views[:1], "second": views[1:2]}.get(tower, views)
    name = f"Tower {tower} over {' and '.join(reads)}"
    pairs = list(zip(layers, values))
    bars = [Bar(layer, value, note=f"layer {layer}: gate {value:.3f}") for layer, value in pairs]
    chart = bar_chart(f"Gates of the {name.lower()}", bars, ("layer", "gate"), _plain, 1.0, (0.5, "at the start"))
    return TowerGates(tower, " and ".join(reads), pairs, chart)


def _layers(folder: RunFolder, config: RunConfig, tower: str, count: int) -> list[str]:
    """Return the name of each layer that a tower reads: the encoder's layer, of both views if they differ."""
    descriptions = folder.views if (folder.path / "views.json").exists() else {}
    numbers = [_read_layers(config, view, descriptions.get(view, {})) for view in config.views]
    chosen = {"first": numbers[:1], "second": numbers[1:2]}.get(tower, numbers)
    if min(map(len, chosen)) != count:
        return [str(place) for place in range(1, count + 1)]
    rows = zip(*(layers[-count:] for layers in chosen))  # the inter tower pairs the last layers of both views
    return ["/".join(dict.fromkeys(map(str, row))) for row in rows]


def _read_layers(config: RunConfig, name: str, view: dict[str, Any]) -> list[int]:
    """Return the layers of a view that the model reads, of those that its description names; none without one."""
    layers = view.get("layers", [])
    positions = group_positions(name, view, config.model.layer_groups) if layers else None
    return layers if positions is None else [layers[position] for position in positions]
