"""iisan-fast bench uncached: an epoch with encoders in every step, by each attention, beside a cached one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..devices import torch_device
from .options import FOLDER, device_option, json_option, out_option
from .output import command_line, mebibytes, print_result

SIZE = click.IntRange(min=1)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--users", type=SIZE, default=64, help="Users a batch.")
@click.option(
    "--encoder-size",
    type=click.Choice(["base", "demo"]),
    default="base",
    help="base: ViT-B/16 and BERT-base; demo: the embedded demo's, small.",
)
@click.option("--steps", type=SIZE, help="Time as many steps, and scale them to an epoch. [all]")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--keep", type=FOLDER, help="A folder for encoders and dataset; used again where it has them.")
@out_option
@device_option
@json_option
def uncached(
    dataset: Path | None, keep: Path | None, out: Path | None, device: str, as_json: bool, **values: Any
) -> None:
    """Time uncached training on the histories and titles of DATASET or of the embedded demo.

    Encoders are built from their configurations, with random weights; images are noise.
    """
    from ..benchmarks.uncached import UncachedSettings, benchmark  # imports transformers, which takes seconds

    result = benchmark(dataset, UncachedSettings(**values), torch_device(device), keep)
    result = {"command": command_line("uncached", dataset, result["settings"]), **result}
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    settings, notes = result["settings"], result["notes"]
    title = f"{result['dataset']}, {settings['users']} users a batch, {settings['encoder_size']} encoders"
    caption = f"{result['steps_an_epoch']:,} steps an epoch"
    if result["scaled"]:
        caption += f", scaled from {result['steps_timed']:,}"
    table = Table(title=Text(title), caption=f"{caption}\nthe paper: {notes['paper']}\nthe aim: {notes['aim']}")
    for column in ("", f"{' / '.join(result['forms'][-1]['phases_ms'])}, ms"):
        table.add_column(column)
    for column in ("opening s", "epoch s" + "\n(scaled)" * result["scaled"], "peak MiB", "CUDA MiB"):
        table.add_column(column, justify="right")
    for row in result["forms"]:
        table.add_row(row["form"], *_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str | Text]:
    if "why" in row:
        return [Text(row["why"]), "", row["epoch_s"]]
    return [
        " / ".join(f"{figure:,.1f}" for figure in row["phases_ms"].values()),
        f"{row['opening_s']:.1f}",
        f"{row['epoch_s']:,.2f}",
        mebibytes(row["peak_pss_bytes"]),
        mebibytes(row["peak_cuda_bytes"]),
    ]
