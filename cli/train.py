"""iisan-fast train: a run from cached hidden states, from encoders that run, or the embedded demo from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import (
    PLACEMENTS,
    EvaluationConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    ScoringConfig,
    TrainConfig,
    UncachedConfig,
)
from ..errors import InputError
from .config_options import chosen_changes, config_options, read_config
from .dry_runs import print_run
from .help_pages import DATA, ENCODERS, EVALUATION, MODEL, OUTPUT, SCORING, TRAINING, command, option
from .options import FOLDER, device_option, output_options, protocol_options
from .output import percent, print_json, print_run_metrics
from .setting_options import given_settings, option_names, setting_options
from .verbosity import report
from .views import encoder_settings, places_of_features, view_options

EXAMPLES = (
    "iisan-fast train                    # the embedded demo, in about a minute",
    "iisan-fast train DATASET --cache STATES --out runs/first",
    "iisan-fast train DATASET --cache STATES --method iisan-versa --epochs 20 \\\n"
    "  --bottleneck 64 --bottleneck first=512 --learning-rate adapters=1e-3",
    "iisan-fast train DATASET --cache STATES --config SETTINGS.yaml \\\n  --set model.dropout=0.2",
    "iisan-fast train DATASET --method lora --text-encoder bert-base-uncased \\\n  --dry-run",
    "iisan-fast train DATASET --method iisan-versa \\\n"
    '  --view "source=features path=image_feat.npy name=image" \\\n'
    '  --view "source=features path=text.safetensors name=text"',
    "iisan-fast train DATASET --cache STATES --fit-terms",
    "iisan-fast train DATASET --cache STATES --method neighbours",
    "iisan-fast train DATASET --cache STATES --init runs/first --out runs/next",
    "iisan-fast train --resume runs/first",
    "iisan-fast train --resume runs/first --epochs 40 --cache /new/place/STATES",
    "iisan-fast train --resume runs/first \\\n  --features image=/new/place/image_feat.npy",
)
SECTIONS = {
    "protocol": ProtocolConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "scoring": ScoringConfig,
    "uncached": UncachedConfig,
}
WRITTEN_HERE = ("dataset", "cache", "init")  # settings of RunConfig with an argument or an option written below
OF_VIEWS = ("views",)  # the setting of UncachedConfig that the options of encoders describe
WITH_RESUME = {"resume_path", "trust_remote_code", "placement", "device", "as_json"}
MOVED_FEATURES = "features"  # the option that only --resume takes
CHANGED_BY_RESUME = {  # option: the argument of iisan_fast.resume
    **{name: name for name in ("dataset", "cache", "image_encoder", "text_encoder", "patience", "checkpoint_every")},
    "max_epochs": "epochs",
}


@command(examples=EXAMPLES, short_help="Train a recommender and test its best epoch.")
@click.argument("dataset", type=FOLDER, required=False)
@option("--cache", group=DATA, type=FOLDER, help="Folder of the hidden states that iisan-fast extract stored.")
@setting_options(RunConfig, DATA, without=WRITTEN_HERE)
@protocol_options
@option("--uncached", group=ENCODERS, is_flag=True, help="Run the encoders in every step, in place of a cache.")
@view_options
@setting_options(UncachedConfig, ENCODERS, without=OF_VIEWS)
@setting_options(ModelConfig, MODEL)
@setting_options(TrainConfig, TRAINING)
@option(
    "--init",
    group=TRAINING,
    type=FOLDER,
    help="Begin a new run with the best weights of the run in this folder, which has the same model and encoders.",
)
@option(
    "--resume",
    "resume_path",
    group=TRAINING,
    type=FOLDER,
    help="Continue the run in this folder as it began. Only the places of dataset, cache and encoders may be given "
    "anew, and --epochs, --patience and --checkpoint-every.",
)
@option(
    "--features",
    group=TRAINING,
    multiple=True,
    metavar="VIEW=FILE",
    help="File to which the ready-made features of a resumed run have moved; a new run takes them by --view.",
)
@setting_options(EvaluationConfig, EVALUATION)
@setting_options(ScoringConfig, SCORING)
@config_options
@option(
    "--table",
    "placement",
    group=OUTPUT,
    type=click.Choice(PLACEMENTS),
    default="auto",
    help="Where the hidden states (or images) lie: on the device, in host memory (pinned), over the ranks (sharded), "
    "in their files (mapped), or where they fit (auto).",
)
@option("--out", group=OUTPUT, type=FOLDER, help="Folder of the run.  [default: the next free runs/NAME-N]")
@device_option
@output_options
@click.pass_context
def train(
    context: click.Context,
    dataset: Path | None,
    resume_path: Path | None,
    **options: Any,
) -> None:
    """Train on DATASET, by the hidden states in --cache or by encoders that run, and test the best epoch once.

    Without any argument it makes a small dataset, encodes it, trains on it and prints the figures.
    """
    from .. import api  # imports numpy

    as_json, dry_run = options.pop("as_json"), options.pop("dry_run")
    where = {"device": options.pop("device"), "table": options.pop("placement")}
    if resume_path is not None:
        _refuse_other_settings(context)
        changes = {argument: context.params[name] for name, argument in CHANGED_BY_RESUME.items()}
        trusted = bool(options["trust_remote_code"])
        changes["features"] = places_of_features(options[MOVED_FEATURES])
        result = api.resume(resume_path, **changes, **where, on_epoch=_report_epoch, trust_remote_code=trusted)
    else:
        settings = _settings(dataset, options)
        result = api.train(dataset, **settings, **where, dry_run=dry_run, on_epoch=_report_epoch)
    if as_json:
        print_json(result)
    elif dry_run:
        print_run(result)
    else:
        epochs = f"best epoch {result['best_epoch']} of {result['epochs']}" if result["epochs"] else "without training"
        title = f"{result['run']}: {epochs}"
        print_run_metrics(title, result, "test")


def _settings(dataset: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `iisan_fast.train` that the options of a new run give.

    Raises InputError for an option that only --resume takes.
    """
    if options.pop(MOVED_FEATURES):
        raise InputError('--features: is for --resume; a new run takes them by --view "source=features path=FILE"')
    settings, views = encoder_settings(options)
    sources = given_settings(options, RunConfig, without=WRITTEN_HERE)
    option_of = {"views": "--views"} if sources else {}
    folders = (
        ("dataset", "DATASET", dataset),
        ("cache", "--cache", options["cache"]),
        ("init", "--init", options["init"]),
    )
    option_of |= {name: word for name, word, folder in folders if folder is not None}
    for section, kind in SECTIONS.items():
        values = given_settings(options, kind, without=OF_VIEWS)
        option_of |= option_names(values, section)
        settings |= values
    return settings | {
        "cache": options["cache"],
        "init": options["init"],
        "out": options["out"],
        "uncached": options["uncached"],
        "config": read_config(options["config"]),
        "changes": chosen_changes(options["changes"], option_of),
        "views": [*sources.get("views", ()), *views],
    }


def _refuse_other_settings(context: click.Context) -> None:
    """Raise InputError for options beside --resume that would change the run."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    names["dataset"] = "DATASET"
    forbidden = [
        names[name]
        for name in context.params
        if name not in {MOVED_FEATURES} | WITH_RESUME | CHANGED_BY_RESUME.keys()
        and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if forbidden:
        raise InputError(f"--resume: takes its settings from the run; leave out {', '.join(sorted(forbidden))}")


def _report_epoch(line: dict[str, Any]) -> None:
    """Write an epoch's figures on standard error."""
    from ..evaluation import headline_metrics  # imports torch, which takes seconds

    figures = headline_metrics(line["validation"])
    shown = f"validation HR@10 {percent(figures['hr@10'])} NDCG@10 {percent(figures['ndcg@10'])} %"
    if line["epoch"] == 0:  # of a method without training
        report(shown)
        return
    report(
        f"epoch {line['epoch']:3d}  loss {line['loss']:.4f}  {shown}  {line['items_per_second']:,.0f} items/s"
        f"{'  best' if line['best'] else ''}"
    )
