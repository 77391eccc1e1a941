"""iisan-fast evaluate: figures of a finished run, at any cut-off, on either split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import EvaluationConfig
from .help_pages import EVALUATION, command, option
from .options import FOLDER, device_option, output_options
from .output import print_json, print_run_metrics
from .setting_options import given_settings, setting_options

EXAMPLES = (
    "iisan-fast evaluate runs/first --k 5,10,20",
    "iisan-fast evaluate runs/first --split validation --json > validation.json",
)
NOT_HERE = ("mask_history",)  # both figures are printed


@command(examples=EXAMPLES, short_help="Print the figures of a finished run.")
@click.argument("run", type=FOLDER)
@option(
    "--split",
    group=EVALUATION,
    type=click.Choice(["test", "validation"]),
    default="test",
    help="Targets that are ranked.",
)
@setting_options(EvaluationConfig, EVALUATION, without=NOT_HERE)
@device_option
@output_options
def evaluate(run: Path, split: str, device: str, as_json: bool, **options: Any) -> None:
    """Print the metrics of RUN's best checkpoint over the full catalogue, history masked and unmasked."""
    from .. import api  # imports numpy

    result = api.evaluate(run, split, device=device, **given_settings(options, EvaluationConfig, without=NOT_HERE))
    if as_json:
        print_json(result)
        return
    title = f"{run}, epoch {result['best_epoch']}"
    print_run_metrics(title, result, split)
