"""iisan-fast extract: hidden states of a catalogue into a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import ExtractionConfig, ProtocolConfig
from ..errors import InputError
from .config_options import chosen_changes, config_options, read_config
from .dry_runs import print_extraction
from .help_pages import DATA, ENCODERS, command, option
from .options import FOLDER, device_option, output_options, protocol_options
from .output import print_counts, print_json
from .setting_options import given_settings, option_names, setting_options
from .views import encoder_settings, view_options

if TYPE_CHECKING:
    from ..states import Extracted, Merged

EXAMPLES = (
    "iisan-fast extract DATASET --cache STATES \\\n"
    "  --image-encoder google/vit-base-patch16-224 --text-encoder bert-base-uncased",
    "iisan-fast extract DATASET --cache STATES --raw-titles --batch-size 16 \\\n"
    '  --view "source=title pooling=mean encoder=bert-base-uncased layers=0,6,12"',
    "iisan-fast extract DATASET --cache STATES --config SETTINGS.yaml --dry-run",
    "torchrun --nproc-per-node 4 -m iisan_fast extract DATASET --cache SHARDS \\\n  --text-encoder bert-base-uncased",
    "iisan-fast extract --cache SHARDS --merge",
)
WITH_MERGE = {"cache", "merge", "as_json", "quiet", "verbose"}  # parameters that --merge takes
SECTIONS = {"protocol": ProtocolConfig, "extraction": ExtractionConfig}


@command(examples=EXAMPLES, short_help="Store the hidden states of frozen encoders in a cache.")
@click.argument("dataset", type=FOLDER, required=False)
@option("--cache", group=DATA, type=FOLDER, help="Folder of the hidden states, made if it is missing.")
@option(
    "--shard",
    group=DATA,
    metavar="K/N",
    help="Fill shard K of N alone, as 2/4: one that a rank has lost, or by a process of its own.",
)
@option("--merge", group=DATA, is_flag=True, help="Merge the shards of the cache into one store; encode nothing.")
@protocol_options
@view_options
@setting_options(ExtractionConfig, ENCODERS)
@config_options
@device_option
@output_options
@click.pass_context
def extract(
    context: click.Context,
    dataset: Path | None,
    cache: Path | None,
    shard: str | None,
    merge: bool,
    config: Path | None,
    changes: tuple[str, ...],
    dry_run: bool,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Run DATASET's items through frozen encoders and store their pooled hidden states in a cache.

    A stopped extraction goes on where it stopped; only new or changed items are encoded again. Dataset, cache and
    encoders may stand in the file of --config. Under torchrun each process fills a shard of the cache.
    """
    from .. import api  # imports numpy

    if merge:
        _refuse_beside_merge(context)
        _print_merged(api.merge_shards(cache), as_json)
        return
    settings, views = encoder_settings(options)
    folders = (("dataset", "DATASET", dataset), ("cache", "--cache", cache))
    option_of = {name: word for name, word, folder in folders if folder is not None}
    for section, kind in SECTIONS.items():
        values = given_settings(options, kind)
        option_of |= option_names(values, section)
        settings |= values
    named_changes = chosen_changes(changes, option_of)
    base = read_config(config)
    results = api.extract(
        dataset,
        cache,
        views=views,
        config=base,
        changes=named_changes,
        device=device,
        dry_run=dry_run,
        shard=shard,
        **settings,
    )
    folder = str(cache or named_changes.get("cache") or (base or {})["cache"])
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    elif dry_run:
        print_extraction(results, folder)
    else:
        _print_results(results, folder)


def _refuse_beside_merge(context: click.Context) -> None:
    """Raise InputError for options beside --merge that say how to encode, or without --cache."""
    forbidden = [
        parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        for parameter in context.command.params
        if parameter.name not in WITH_MERGE
        and context.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE
    ]
    if forbidden:
        raise InputError(f"--merge: merges the shards of --cache; leave out {', '.join(sorted(forbidden))}")
    if context.params["cache"] is None:
        raise InputError("--merge: expected --cache, the folder of a cache in shards, found none")


def _print_merged(merged: Merged, as_json: bool) -> None:
    """Print what was merged."""
    if as_json:
        print_json(dataclasses.asdict(merged))
    else:
        print_counts(f"{merged.cache}: one store", {"shards": f"{merged.shards:,}", "entries": f"{merged.entries:,}"})


def _print_results(results: list[Extracted], cache: str) -> None:
    """Print how many items there are of each view, and how many were encoded."""
    rows = {}
    for result in results:
        blank = f", {result.blank:,} of them blank" if result.blank else ""
        rows[f"{result.view}: {result.items:,} items"] = f"{result.encoded:,} encoded{blank}"
    print_counts(cache, rows)
