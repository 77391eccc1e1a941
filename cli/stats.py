"""iisan-fast stats: counts of a dataset under the data protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .help_pages import command
from .options import FOLDER, chosen_protocol, output_options, protocol_options
from .output import percent, print_counts, print_json

EXAMPLES = ("iisan-fast stats DATASET", "iisan-fast stats DATASET --min-interactions 10 --json")


@command(examples=EXAMPLES, short_help="Count the users, items and interactions of a dataset.")
@click.argument("dataset", type=FOLDER)
@protocol_options
@output_options
def stats(dataset: Path, as_json: bool, **options: Any) -> None:
    """Print the counts of DATASET under the data protocol, and its shares of cold targets and of padding."""
    from ..data import load_dataset, statistics  # imports numpy

    counts = statistics(load_dataset(dataset, chosen_protocol(options)).sequences)
    if as_json:
        print_json(counts)
        return
    rows = {}
    for name, value in counts.items():
        label = name.replace("_share", "").replace("_", " ")
        if name.endswith("_share"):
            rows[label] = f"{percent(value)} %"
        else:
            rows[label] = f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
    print_counts(str(dataset), rows)
