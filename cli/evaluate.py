"""iisan-fast evaluate: figures of a finished run, at any cut-off, on either split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import EvaluationConfig, ScoringConfig
from ..ranks import joined_ranks
from .help_pages import EVALUATION, SCORING, command, option
from .options import FOLDER, device_option, output_options
from .output import print_json, print_run_metrics
from .setting_options import given_settings, setting_options

EXAMPLES = (
    "iisan-fast evaluate runs/first --k 5,10,20",
    "iisan-fast evaluate runs/first --split validation --json > validation.json",
    "iisan-fast evaluate runs/first --cooccurrence 2 --similarity 6",
    "iisan-fast evaluate runs/first --fit-terms",
)
NOT_HERE = ("mask_history",)  # both figures are printed
FIXED = ("cooccurrence_neighbours", "similarity_dims")  # of the terms in the run's folder
WEIGHTS_OF_RUN = dict.fromkeys(("cooccurrence", "similarity", "cold_bias"), "the run's")


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
@setting_options(ScoringConfig, SCORING, without=FIXED, defaults=WEIGHTS_OF_RUN)
@device_option
@output_options
def evaluate(run: Path, split: str, device: str, as_json: bool, **options: Any) -> None:
    """Print the metrics of RUN's best checkpoint over the full catalogue, history masked and unmasked.

    It ranks by RUN's weights of the neighbour terms, unless you give others or fit them.
    """
    from .. import api  # imports numpy

    settings = given_settings(options, EvaluationConfig, without=NOT_HERE)
    settings |= given_settings(options, ScoringConfig, without=FIXED)
    result = api.evaluate(run, split, device=device, **settings)
    if not joined_ranks().is_first:
        return
    if as_json:
        print_json(result)
        return
    title = f"{run}, epoch {result['best_epoch']}" if result["best_epoch"] else str(run)
    print_run_metrics(title, result, split)
