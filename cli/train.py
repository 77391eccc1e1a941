"""iisan-fast train: a run from cached hidden states, from encoders that run, or the embedded demo from nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..config import (
    ACTIVATIONS,
    LEARNING_RATES,
    METHODS,
    PLACEMENTS,
    PRECISIONS,
    SANBS,
    STORE_DTYPES,
    TUNING_METHODS,
    RunConfig,
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
    torch_device,
)
from .output import percent, print_json, print_metrics
from .run_config import run_config
from .views import chosen_views, view_options

RUNS = Path("runs")
GROUPS = dict.fromkeys(group for rates in LEARNING_RATES.values() for group in rates)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--cache", type=FOLDER, help="Hidden states that iisan-fast extract made.")
@click.option("--uncached", is_flag=True, help="Run the encoders in every step instead; say which, as for extract.")
@click.option("--out", type=FOLDER, help="Folder of the run. [the next free runs/NAME-N]")
@click.option(
    "--views", help="One or two of the cache's views, as image,title; the first takes the image's role. [all]"
)
@click.option("--config", "config_path", type=FOLDER, help="A JSON file of settings, as a run's config.json.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="IISAN, or what it is compared with: encoders fine-tuned in full, with adapters, LoRA or biases alone; frozen "
    "encoders; SASRec on item ids. [iisan]",
)
@click.option("--epochs", type=int, help="At most. [100]")
@click.option("--patience", type=int, help="Epochs without a better validation HR@10 that are borne. [10]")
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
    help="Of the trained matrix products; bfloat16 on a CPU is for fine-tuned encoders. [auto: bfloat16 on CUDA]",
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
    from .. import training  # imports torch, which takes seconds

    where = torch_device(device)
    if resume_path is not None:
        _refuse_other_settings(context)
        out, result = resume_path, training.resume(resume_path, where, _report_epoch, placement)
    else:
        out = options.pop("out") or _next_run(dataset.resolve().name if dataset else "demo")
        options["encoded"] = chosen_views(options)
        if dataset is None and options["config_path"] is None:
            config = _demo_config(out, where, options)
        else:
            config = run_config(dataset, options)
        result = training.train(config, out, where, _report_epoch, placement)
    if as_json:
        print_json({"run": str(out), **result})
        return
    title = f"{out}: best epoch {result['best_epoch']} of {result['epochs']}"
    print_metrics(title, {result["method"]: result["test"], "popularity": result["popularity"]})


def _demo_config(out: Path, device, options: dict[str, Any]) -> RunConfig:
    """The embedded demo, written and, where the method reads states from a cache, encoded."""
    from .. import demo, encoders, states
    from ..data import load_dataset
    from ..training import check_new_run

    given = options["cache"] is not None or options["views"] is not None or options["encoded"]
    if given or options["split"] == "temporal":
        raise InputError("--cache, --views, encoders, --split temporal: they need a DATASET; the demo makes its own")
    home = out.resolve() / "demo"
    dataset, views = demo.plan(home)
    if options["layer_groups"] is not None:
        encoders.grouped_layers(
            demo.ENCODER_SHAPE["num_hidden_layers"], options["layer_groups"]
        )  # before anything is written
    method = options["method"] or "iisan"
    if options["uncached"] or method in TUNING_METHODS:
        options["encoded"] = views
    elif method != "id":
        views = [replace(view, layer_groups=options["layer_groups"]) for view in views]
        options |= {"cache": home / "states", "views": ",".join(view.name for view in views)}
    config = run_config(dataset, options, demo.settings(method))
    check_new_run(config, out, device)
    click.echo("No dataset given: this is the embedded demo.", err=True)
    demo.write_demo(home)
    if config.cache is not None:
        states.extract(load_dataset(dataset, config.protocol), views, Path(config.cache), device)
    return config


def _refuse_other_settings(context: click.Context) -> None:
    allowed = {"resume_path", "placement", "device", "as_json"}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [
        options[name]
        for name in context.params
        if name not in allowed and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise InputError(f"--resume: takes its settings from the run; leave out {', '.join(sorted(given))}")


def _next_run(name: str) -> Path:
    number = 1
    while (out := RUNS / f"{name}-{number}").exists():
        number += 1
    return out


def _report_epoch(line: dict[str, Any]) -> None:
    validation = line["validation"]
    figures = validation["masked" if validation["history_masked_by_default"] else "unmasked"]
    click.echo(
        f"epoch {line['epoch']:3d}  loss {line['loss']:.4f}  validation HR@10 {percent(figures['hr@10'])} "
        f"NDCG@10 {percent(figures['ndcg@10'])} %  {line['items_per_second']:,.0f} items/s"
        f"{'  best' if line['best'] else ''}",
        err=True,
    )
