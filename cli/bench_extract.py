"""iisan-fast bench extract: extraction beside a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..config import STORE_DTYPES
from ..devices import torch_device
from .options import FOLDER, device_option, json_option, out_option
from .output import command_line, mebibytes, print_result

SIZE = click.IntRange(min=1)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--items", type=SIZE, help="As many items, spread over the catalogue. [all]")
@click.option("--source", type=click.Choice(["title", "image"]), default="title", help="What is encoded.")
@click.option("--encoder", help="Hub name or folder. [the embedded demo's, small and random]")
@click.option("--max-tokens", type=SIZE, default=30, help="Tokens of a title that are read.")
@click.option("--dtype", type=click.Choice(STORE_DTYPES), default="bfloat16", help="What the states are stored in.")
@click.option("--batch-size", type=SIZE, default=64, help="Items encoded at a time.")
@click.option("--workers", type=click.IntRange(min=0), help="Of the fast path. [as idle CPUs and images suggest]")
@click.option("--rounds", type=SIZE, default=3, help="Runs of each form.")
@out_option
@device_option
@json_option
def extract(dataset: Path | None, out: Path | None, device: str, as_json: bool, **values: Any) -> None:
    """Time extraction beside a plain reference, on items of DATASET or of the embedded demo.

    Both fill an empty cache; their states are compared. Without CUDA its memory is not measured.
    """
    from ..benchmarks.extract import ExtractSettings, benchmark  # imports transformers, which takes seconds

    settings = ExtractSettings(**values)
    result = benchmark(dataset, settings, torch_device(device))
    result = {"command": command_line("extract", dataset, result["settings"]), **result}
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    title = f"{result['items']:,} {settings['source']}s of {result['dataset']}, {settings['workers']} workers"
    agree = f"states agree within {result['largest_difference']:.1e} of the largest"
    table = Table(title=Text(title), caption=f"plain / fast: {result['ratio']:.2f} in time; {agree}")
    for column in ("", "p20 / p50 / p80 s"):
        table.add_column(column, no_wrap=True)
    for column in ("items a second", "peak MiB", "peak CUDA MiB"):
        table.add_column(column, justify="right")
    for row in result["forms"]:
        times = " / ".join(f"{row[name]:.2f}" for name in ("p20_s", "p50_s", "p80_s"))
        memory = (mebibytes(row[name]) for name in ("peak_pss_bytes", "peak_cuda_bytes"))
        table.add_row(row["form"], times, f"{row['items_per_second']:,.0f}", *memory)
    return table
