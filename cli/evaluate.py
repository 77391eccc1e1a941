"""iisan-fast evaluate: a finished run's figures again, at any cut-off, on either split."""

from __future__ import annotations

from pathlib import Path

import click

from .. import api
from ..config import TIE_SHARES, EvaluationConfig
from .options import FOLDER, device_option, json_option, k_option
from .output import print_json, print_metrics


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which targets.")
@k_option
@click.option(
    "--ties",
    type=click.Choice(list(TIE_SHARES)),
    default=EvaluationConfig().ties,
    help="Of the items that score like the target, count half above it, or none (best), as some published code does.",
)
@click.option("--chunk-mib", type=int, default=EvaluationConfig().chunk_mib, help="Memory for scores, MiB.")
@device_option
@json_option
def evaluate(run: Path, split: str, ks: tuple[int, ...], ties: str, chunk_mib: int, device: str, as_json: bool) -> None:
    """Print the metrics of RUN's best checkpoint over the full catalogue, history masked and unmasked."""
    result = api.evaluate(run, split=split, device=device, ks=ks or (10,), ties=ties, chunk_mib=chunk_mib)
    if as_json:
        print_json(result)
        return
    title = f"{run}, epoch {result['best_epoch']}"
    print_metrics(title, {"iisan": result[split], "popularity": result["popularity"]})
