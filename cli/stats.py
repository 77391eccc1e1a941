"""iisan-fast stats: what the data protocol leaves of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..data import load_dataset, statistics
from .options import FOLDER, chosen_protocol, json_option, protocol_options
from .output import percent, print_counts, print_json


@click.command()
@click.argument("dataset", type=FOLDER)
@protocol_options
@json_option
def stats(dataset: Path, as_json: bool, **options: Any) -> None:
    """Print the counts of DATASET after the protocol, its share of cold targets and of padding."""
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
