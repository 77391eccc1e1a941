"""iisan-fast add-items, update-items and remove-items: change the catalogue of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import MISSING_IMAGES
from ..errors import InputError
from .help_pages import DATA, ENCODERS, command, option
from .options import FILE, FILE_OR_FOLDER, FOLDER, device_option, output_options
from .output import print_counts, print_json
from .views import places_of_features

if TYPE_CHECKING:
    from ..serving import ChangedCatalogue

ADDING = (
    "iisan-fast add-items runs/first NEW.tsv",
    "iisan-fast add-items runs/first NEW.csv --images COVERS",
    "iisan-fast add-items runs/first NEW.tsv --text-encoder /new/place/minilm",
    "iisan-fast add-items runs/first NEW.tsv --features image=new_feat.npy",
)
UPDATING = (
    "iisan-fast update-items runs/first CHANGED.tsv",
    "iisan-fast update-items runs/first CHANGED.parquet --images COVERS --json",
)
REMOVING = (
    "iisan-fast remove-items runs/first B000A B001B",
    "iisan-fast remove-items runs/first --from SOLD-OUT.txt",
)


def _encoding_options(function: Any) -> Any:
    """Give a command the options of items that are encoded."""
    options = (
        option(
            "--images",
            group=DATA,
            type=FILE_OR_FOLDER,
            help="Folder of images named by item id, or an LMDB of images.",
        ),
        option(
            "--missing-images",
            group=DATA,
            type=click.Choice(MISSING_IMAGES),
            help="For images that are missing or cannot be read: stop, or encode a blank image.  [default: as the run]",
        ),
        option(
            "--features",
            group=DATA,
            multiple=True,
            metavar="VIEW=FILE",
            help="File of the items' ready-made features for a view of the run that reads such; may be repeated.",
        ),
        option(
            "--text-encoder",
            group=ENCODERS,
            metavar="PLACE",
            help="Folder or hub name to which the run's text encoder has moved.",
        ),
        option(
            "--image-encoder",
            group=ENCODERS,
            metavar="PLACE",
            help="Folder or hub name to which the run's image encoder has moved.",
        ),
        option(
            "--trust-remote-code",
            group=ENCODERS,
            is_flag=True,
            help="Run Python code that the run's encoders bring with them.",
        ),
        device_option,
        output_options,
    )
    for add_option in reversed(options):
        function = add_option(function)
    return function


@command("add-items", examples=ADDING, short_help="Add new items to the catalogue of a trained run.")
@click.argument("run", type=FOLDER)
@click.argument("items", type=FILE)
@_encoding_options
def add_items(run: Path, items: Path, **options: Any) -> None:
    """Encode the new items of ITEMS by RUN's encoders and add them to its catalogue, so that they can be recommended.

    ITEMS is a .tsv file with an id, a tab and a title a line, or a .csv, .parquet or .jsonl file with the columns
    item_id, title and, if RUN reads captions, caption.
    """
    from .. import serving  # imports numpy

    _change(serving.add_items, run, items, options)


@command("update-items", examples=UPDATING, short_help="Give items of a trained run new contents.")
@click.argument("run", type=FOLDER)
@click.argument("items", type=FILE)
@_encoding_options
def update_items(run: Path, items: Path, **options: Any) -> None:
    """Encode the new titles, captions and images of items that RUN's catalogue has already. ITEMS as for add-items."""
    from .. import serving  # imports numpy

    _change(serving.update_items, run, items, options)


@command("remove-items", examples=REMOVING, short_help="Remove items from the catalogue of a trained run.")
@click.argument("run", type=FOLDER)
@click.argument("ids", nargs=-1)
@option("--from", "file", group=DATA, type=FILE, help="File of item ids, one a line, or a table with a column item_id.")
@device_option
@output_options
def remove_items(run: Path, ids: tuple[str, ...], file: Path | None, device: str, as_json: bool) -> None:
    """Remove items from RUN's catalogue: they are not recommended again, and may still stand in histories."""
    from .. import serving  # imports numpy
    from ..devices import torch_device

    _refuse_other_than_one(ids, file)
    chosen = ids if file is None else serving.read_item_ids(file)
    _print(run, serving.remove_items(run, chosen, device=torch_device(device)), as_json)


def _refuse_other_than_one(ids: tuple[str, ...], file: Path | None) -> None:
    """Raise InputError unless there are either ids or a file of ids."""
    if bool(ids) == (file is not None):
        raise InputError("IDS, --from: expected ids of items, or a file of them; give one of the two")


def _change(change: Any, run: Path, items: Path, options: dict[str, Any]) -> None:
    """Add or update items, and print the counts."""
    from ..devices import torch_device
    from ..states import EncoderPlaces

    encoders = (options["image_encoder"], options["text_encoder"], options["trust_remote_code"])
    places = EncoderPlaces(*encoders, features=places_of_features(options["features"]))
    changed = change(
        run,
        items,
        options["images"],
        device=torch_device(options["device"]),
        encoders=places,
        missing_images=options["missing_images"],
    )
    _print(run, changed, options["as_json"])


def _print(run: Path, changed: ChangedCatalogue, as_json: bool) -> None:
    """Print what a change did, and the size of the catalogue."""
    counts = {"added": changed.added, "updated": changed.updated, "removed": changed.removed, "items": changed.items}
    if as_json:
        print_json({"run": str(run), **counts})
        return
    print_counts(str(run), {name: f"{count:,}" for name, count in counts.items() if count})
