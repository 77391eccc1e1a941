"""iisan-fast train: a run from cached hidden states, from encoders that run, or the embedded demo from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import api
from ..config import (
    ACTIVATIONS,
    LEARNING_RATES,
    METHODS,
    PLACEMENTS,
    PRECISIONS,
    SANBS,
    STORE_DTYPES,
)
from ..errors import InputError
from .options import (
    FOLDER,
    attention_option,
    device_option,
    json_option,
    k_option,
    missing_captions_option,
    missing_images_option,
    protocol_options,
)
from .output import percent, print_json, print_metrics
from .run_config import flat_settings
from .views import encoder_settings, view_options

GROUPS = dict.fromkeys(group for rates in LEARNING_RATES.values() for group in rates)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--cache", type=FOLDER, help="Hidden states that iisan-fast extract made.")
@click.option("--uncached", is_flag=True, help="Run the encoders in every step instead; say which, as for extract.")
@click.option("--out", type=FOLDER, help="Folder of the run. [the next free runs/NAME-N]")
@click.option(
    "--views", help="One or two of the cache's views, as image,title; the first takes the image's role. [all]"
)
@click.option("--config", type=FOLDER, help="A JSON file of settings, as a run's config.json.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="IISAN, or what it is compared with: encoders fine-tuned in full, with adapters, LoRA or biases alone; frozen "
    "encoders; SASRec on item ids. [iisan]",
)
@click.option("--epochs", type=int, help="At most. [100]")
@click.option("--patience", type=int, help="Stop after this many epochs without a better validation HR@10. [10]")
@click.option("--batch-users", type=int, help="Users a step. [64]")
@click.option(
    "--bottleneck",
    "bottlenecks",
    multiple=True,
    help="Width inside the SANBs, or adapters; first=, second= or inter=WIDTH for one tower; may be repeated. [64]",
)
@click.option("--embedding-dim", type=int, help="Width of item vectors and user states. [64]")
@click.option("--activation", type=click.Choice(ACTIVATIONS), help="[relu]")
@click.option("--sanb", type=click.Choice(SANBS), help="What a SANB's matrices are: whole, PHM or rank 1. [adapter]")
@click.option("--layer-groups", type=int, help="Blocks kept of each encoder, evenly spread, the last one among them.")
@click.option("--no-gates", "gates", flag_value=False, type=bool, default=None, help="Plain sums in place of gates.")
@click.option("--no-intra", "intra", flag_value=False, type=bool, default=None, help="Without intra-modal towers.")
@click.option("--inter/--no-inter", default=None, help="The inter-modal tower. [where there are two views]")
@click.option("--seed", type=int, help="[0]")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the trained matrix products; bfloat16 on a CPU is for fine-tuned encoders. [auto: bfloat16 on "
    "CUDA]",
)
@click.option(
    "--table",
    "placement",
    type=click.Choice(PLACEMENTS),
    default="auto",
    help="Where the hidden states (or images) lie: on the device, in (pinned) host memory, in their files, or where "
    "they fit.",
)
@click.option(
    "--learning-rate",
    "rates",
    multiple=True,
    help=f"GROUP=RATE, may be repeated; as a method has them: {', '.join(GROUPS)}. [the method's own]",
)
@click.option("--unmasked", is_flag=True, help="Leave the history in the rankings that lead and choose the best epoch.")
@click.option("--resume", "resume_path", type=FOLDER, help="Continue the run in this folder; takes no other settings.")
@protocol_options
@view_options
@attention_option
@missing_images_option
@missing_captions_option
@click.option(
    "--dtype",
    type=click.Choice(STORE_DTYPES),
    help="What the states of frozen encoders are rounded to, as extract --dtype stores them. [bfloat16]",
)
@click.option("--items-at-once", type=int, help="Items that a trained encoder takes at a time. [as memory allows]")
@click.option(
    "--checkpointing", is_flag=True, default=None, help="Compute a trained encoder's blocks twice: less memory."
)
@k_option
@device_option
@json_option
@click.pass_context
def train(
    context: click.Context,
    dataset: Path | None,
    resume_path: Path | None,
    placement: str,
    device: str,
    as_json: bool,
    **options,
):
    """Train on DATASET with the hidden states in --cache, or with encoders that run, and test the best epoch once.

    With no arguments it makes a small dataset of its own, encodes it, trains on it and prints the figures.
    """
    if resume_path is not None:
        _refuse_other_settings(context)
        result = api.resume(resume_path, device=device, table=placement, on_epoch=_report_epoch)
    else:
        encoders, views = encoder_settings(options)
        settings = {**encoders, **flat_settings(options)}
        settings["views"] = [*settings.get("views", ()), *views]
        result = api.train(dataset, **settings, device=device, table=placement, on_epoch=_report_epoch)
    if as_json:
        print_json(result)
        return
    title = f"{result['run']}: best epoch {result['best_epoch']} of {result['epochs']}"
    print_metrics(title, {result["method"]: result["test"], "popularity": result["popularity"]})


def _refuse_other_settings(context: click.Context) -> None:
    allowed = {"resume_path", "placement", "device", "as_json"}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    forbidden = [
        options[name]
        for name in context.params
        if name not in allowed and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if forbidden:
        raise InputError(f"--resume: takes its settings from the run; leave out {', '.join(sorted(forbidden))}")


def _report_epoch(line: dict[str, Any]) -> None:
    validation = line["validation"]
    figures = validation["masked" if validation["history_masked_by_default"] else "unmasked"]
    click.echo(
        f"epoch {line['epoch']:3d}  loss {line['loss']:.4f}  validation HR@10 {percent(figures['hr@10'])} "
        f"NDCG@10 {percent(figures['ndcg@10'])} %  {line['items_per_second']:,.0f} items/s"
        f"{'  best' if line['best'] else ''}",
        err=True,
    )
