"""iisan-fast bench encoders: what a method reaches and costs over encoders of several sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..devices import torch_device
from ..errors import InputError
from .options import FILE, FOLDER, device_option, json_option, out_option, writable_file
from .output import command_line, mebibytes, print_result, with_deviation, write_result
from .sweeps import said, sweep_options, sweep_settings


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--method", default="iisan-versa", help="That train --method knows; with -uncached, encoders run.")
@click.option("--plot", type=FILE, callback=writable_file, help="A PNG file for a plot.")
@sweep_options
@out_option
@device_option
@json_option
def encoders(
    dataset: Path, method: str, plot: Path | None, out: Path | None, device: str, as_json: bool, **options: Any
) -> None:
    """Train a method on DATASET over several sets of encoders (--pair), and set what it reaches against their size."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: needs matplotlib; pip install 'iisan-fast[bench]'")
    command = command_line("encoders", dataset, {"method": method, **said(options)})
    settings = sweep_settings(options, (method,))
    from ..benchmarks import encoders  # imports torch, which takes seconds

    result = encoders.benchmark(dataset, options["folder"], settings, torch_device(device))
    result = {"command": command, **result}
    write_result(options["folder"] / "result.json", result)
    if plot is not None:
        encoders.draw(result, plot)
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=Text(f"{result['dataset']}, {result['settings']['methods'][0]}: test set, history masked"))
    table.add_column("encoders", no_wrap=True)
    for column in ("their M", "HR@10", "NDCG@10", "encoding s", "s / epoch", "trained M", "peak MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        encoding = row["encoding_s"]
        table.add_row(
            row["encoders"],
            f"{row['encoder_parameters'] / 1e6:.1f}",
            with_deviation(row["hr"], row["hr_sd"]),
            with_deviation(row["ndcg"], row["ndcg_sd"]),
            encoding if isinstance(encoding, str) else f"{encoding:.0f}",
            f"{row['epoch_s']:.2f}",
            f"{row['trainable_parameters'] / 1e6:.2f}",
            mebibytes(row["peak_bytes"]),
        )
    return table
