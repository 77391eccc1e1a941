"""iisan-fast train: a run from cached hidden states, or the embedded demo from nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..config import (
    ACTIVATIONS,
    LEARNING_RATE_GROUPS,
    METHODS,
    PLACEMENTS,
    PRECISIONS,
    RunConfig,
    from_dict,
    read_settings,
)
from ..errors import InputError
from .options import FOLDER, device_option, json_option, k_option, torch_device
from .output import percent, print_json, print_metrics

RUNS = Path("runs")


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--cache", type=FOLDER, help="Hidden states that iisan-fast extract made.")
@click.option("--out", type=FOLDER, help="Folder of the run. [the next free runs/NAME-N]")
@click.option(
    "--views", help="One or two of the cache's views, as image,title; the first takes the image's role. [all]"
)
@click.option("--config", "config_path", type=FOLDER, help="A JSON file of settings, as a run's config.json.")
@click.option("--method", type=click.Choice(METHODS), help="[iisan]")
@click.option("--epochs", type=int, help="At most. [100]")
@click.option("--patience", type=int, help="Epochs without a better validation HR@10 that are borne. [10]")
@click.option("--batch-users", type=int, help="Users a step. [64]")
@click.option("--bottleneck", type=int, help="Width inside the SANBs. [64]")
@click.option("--embedding-dim", type=int, help="Width of item vectors and user states. [64]")
@click.option("--activation", type=click.Choice(ACTIVATIONS), help="[relu]")
@click.option("--seed", type=int, help="[0]")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Of the side network's products. [auto: bfloat16 on CUDA]"
)
@click.option(
    "--table",
    "placement",
    type=click.Choice(PLACEMENTS),
    default="auto",
    help="Where the hidden states lie: on the device, in (pinned) host memory, in the cache's file, or where they fit.",
)
@click.option(
    "--learning-rate",
    "rates",
    multiple=True,
    help=f"GROUP=RATE, GROUP one of {', '.join(LEARNING_RATE_GROUPS)}; may be repeated. [adapters 1e-4, rest 2e-4]",
)
@click.option("--unmasked", is_flag=True, help="Leave the history in the rankings that lead and choose the best epoch.")
@click.option("--resume", "resume_path", type=FOLDER, help="Continue the run in this folder; takes no other settings.")
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
    """Train on DATASET with the hidden states in --cache, and test the best epoch once.

    With no arguments it makes a small dataset of its own, encodes it, trains on it and prints the figures.
    """
    from .. import trainer  # imports torch, which takes seconds

    where = torch_device(device)
    if resume_path is not None:
        _refuse_other_settings(context)
        out, result = resume_path, trainer.resume(resume_path, where, _report_epoch, placement)
    else:
        out = options.pop("out") or _next_run(dataset.resolve().name if dataset else "demo")
        if dataset is None and options["config_path"] is None:
            config = _demo_config(out, where, options)
        else:
            config = _config(dataset, options)
        result = trainer.train(config, out, where, _report_epoch, placement)
    if as_json:
        print_json({"run": str(out), **result})
        return
    title = f"{out}: best epoch {result['best_epoch']} of {result['epochs']}"
    print_metrics(title, {"iisan": result["test"], "popularity": result["popularity"]})


def _demo_config(out: Path, device, options: dict[str, Any]) -> RunConfig:
    from .. import demo, extract
    from ..run_folder import RunFolder
    from ..sequences import load_dataset

    if options["cache"] is not None or options["views"] is not None:
        raise InputError("--cache, --views: they need a DATASET; the demo makes its own")
    RunFolder(out).refuse_if_used()
    home = out.resolve() / "demo"
    settings = {**demo.SETTINGS, "views": ["image", "title"]}
    config = _config(home / "dataset", {**options, "cache": home / "states"}, settings)
    click.echo("No dataset given: this is the embedded demo.", err=True)
    dataset, views = demo.write_demo(home)
    extract.extract(load_dataset(dataset, config.protocol), views, Path(config.cache), device)
    return config


def _config(dataset: Path | None, options: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    """The run's configuration: defaults, then the file's settings, then the command line's."""
    values = json.loads(json.dumps(base or {}))
    if options["config_path"] is not None:
        values = read_settings(options["config_path"])
    for section, name, value in _given(dataset, options):
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise InputError(f"{section}: expected an object of settings, found {json.dumps(target)}")
        target[name] = value
    for key, option in (("dataset", "a DATASET argument"), ("cache", "--cache")):
        if not isinstance(values.get(key), str):
            raise InputError(f"{key}: expected a path, found {json.dumps(values.get(key))}; give {option}")
    if "views" not in values:
        values["views"] = _all_views(Path(values["cache"]))
    if options["rates"]:
        defaults = from_dict(RunConfig, values).train.learning_rates
        values.setdefault("train", {})["learning_rates"] = {**defaults, **dict(map(_rate, options["rates"]))}
    return from_dict(RunConfig, values)


def _given(dataset: Path | None, options: dict[str, Any]):
    """(section, setting, value) of everything that the command line says."""
    paths = {"dataset": dataset, "cache": options["cache"]}
    yield from (("", name, str(path.resolve())) for name, path in paths.items() if path is not None)
    if options["views"] is not None:
        yield "", "views", options["views"].split(",")
    sections = {
        "model": {name: name for name in ("method", "bottleneck", "embedding_dim", "activation")},
        "train": {"epochs": "max_epochs", **{name: name for name in ("patience", "batch_users", "seed", "precision")}},
    }
    for section, names in sections.items():
        yield from ((section, setting, options[name]) for name, setting in names.items() if options[name] is not None)
    if options["ks"]:
        yield "evaluation", "ks", list(options["ks"])
    if options["unmasked"]:
        yield "evaluation", "mask_history", False


def _all_views(cache: Path) -> list[str]:
    from ..hidden_states import Store

    with Store(cache) as store:
        names = list(store.views)
    if not names:
        raise InputError(f"{cache}: holds no view yet; run iisan-fast extract")
    if len(names) > 2:
        raise InputError(f"{cache}: holds {len(names)} views ({', '.join(names)}); choose one or two with --views")
    return names


def _rate(text: str) -> tuple[str, float]:
    group, _, rate = text.partition("=")
    try:
        return group, float(rate)
    except ValueError:
        raise InputError(f"--learning-rate: expected GROUP=RATE, found {text!r}") from None


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
