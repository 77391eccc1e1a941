"""iisan-fast export: a run's vectors, encoders and index in a folder for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .help_pages import OUTPUT, command, option
from .options import FOLDER, output_options
from .output import print_counts, print_json

EXAMPLES = (
    "iisan-fast export runs/first --to EXPORTED",
    "iisan-fast export runs/first --to EXPORTED --index faiss",
)


@command(examples=EXAMPLES, short_help="Write a run's vectors and encoders for other programs.")
@click.argument("run", type=FOLDER)
@option("--to", "folder", group=OUTPUT, type=FOLDER, required=True, help="New folder for the files.")
@option(
    "--index",
    group=OUTPUT,
    type=click.Choice(["faiss", "usearch"]),
    help="Also write an approximate index, and measure how many of the best items it finds.",
)
@output_options
def export(run: Path, folder: Path, index: str | None, as_json: bool) -> None:
    """Write RUN's item vectors, ids, co-occurrence matrix and encoders (ONNX and torch.export) into a new folder.

    Each encoder is run after it is written, and compared with RUN's own results.
    """
    from ..serving import export as export_run  # imports torch

    report = export_run(run, folder, index)
    if as_json:
        print_json({**asdict(report), "folder": str(report.folder)})
        return
    rows = {name: f"{size:,} bytes" for name, size in report.files.items()}
    for name, compared in report.compared.items():
        for form, deviation in compared["largest_deviation"].items():
            rows[f"deviation of {name}.{form}"] = f"{deviation:.1e}"
    if report.index is not None:
        rows[f"recall@{report.index.k} of the index, {report.index.users:,} users"] = (
            f"{100 * report.index.recall:.2f} %"
        )
    print_counts(f"exported to {report.folder}", rows)
    for name, compared in report.compared.items():
        click.echo(f"{name}: compared on {compared['on']}", err=True)
    for line in report.left_out:
        click.echo(f"left out: {line}", err=True)
