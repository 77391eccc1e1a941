"""iisan-fast bench growth: how the cost grows with batch and catalogue."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..devices import torch_device
from ..errors import InputError
from .options import FILE, device_option, json_option, out_option, writable_file
from .output import command_line, print_result

SIZE = click.IntRange(min=1)


@click.command()
@click.option("--items", type=SIZE, multiple=True, help="Of a catalogue; may be repeated. [20000, 100000, 1000000]")
@click.option("--batch-users", type=SIZE, multiple=True, help="Of a batch; may be repeated. [64, 256, 1024]")
@click.option("--users", type=SIZE, default=12_076, help="Of the synthetic dataset.")
@click.option("--layers", type=SIZE, default=4, help="Kept layers of each of two views.")
@click.option("--width", type=SIZE, default=384, help="Width of the hidden states.")
@click.option("--plot", type=FILE, callback=writable_file, help="A PNG file for a plot.")
@out_option
@device_option
@json_option
def growth(
    items: tuple[int, ...],
    batch_users: tuple[int, ...],
    plot: Path | None,
    out: Path | None,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Time epochs and evaluations of a synthetic dataset against users a batch and items in the catalogue."""
    from ..benchmarks import growth  # imports torch, which takes seconds

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: needs matplotlib; pip install 'iisan-fast[bench]'")
    lists = {"items": tuple(sorted(set(items))), "batch_users": tuple(sorted(set(batch_users)))}
    settings = growth.GrowthSettings(**{name: value for name, value in lists.items() if value}, **values)
    result = growth.benchmark(settings, torch_device(device))
    result = {"command": command_line("growth", None, asdict(settings)), **result}
    if plot is not None:
        growth.draw(result, plot)
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    shape = f"2 views of {settings['layers']} layers of {settings['width']}"
    table = Table(title=Text(f"{settings['users']:,} users, {shape}"))
    for column in ("items", "users a batch", "epoch s", "evaluation s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = (f"{row[name]:.2f}" for name in ("epoch_s", "evaluation_s"))
        table.add_row(f"{row['items']:,}", f"{row['batch_users']:,}", *times)
    return table
