"""Datasets: items, histories under the data protocol, training batches, and imports of other layouts."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .array_files import pack_texts, unpack_texts
    from .batches import Batch, Shape, epoch_batches, padded_shape
    from .databases import open_database
    from .epoch_plan import Window, steps_per_epoch
    from .frames import as_polars, text_id
    from .images.dataset_images import open_image_files, open_images
    from .images.image_database import ImageLmdb
    from .images.image_decoding import ImageError
    from .images.image_folder import ImageFolder, read_image_file, refuse_unfit_name
    from .images.image_listing import is_image_name
    from .imports.bad_rows import BAD_ROWS, BadKind, describe_bad_rows
    from .imports.families.amazon import import_amazon
    from .imports.families.feature_views import feature_views
    from .imports.families.iisan import import_iisan
    from .imports.families.microlens import import_microlens
    from .imports.families.mmrec import import_mmrec
    from .imports.families.movielens import import_movielens
    from .imports.families.recbole import import_recbole
    from .imports.flat import import_files
    from .imports.options import (
        DUPLICATES,
        MISSING_TITLES,
        RECBOLE_FIELDS,
        TABLE_COLUMNS,
        Imported,
        ImportOptions,
        TableOptions,
    )
    from .item_contents import ItemContents
    from .jagged_arrays import places, row_blocks
    from .loss_columns import IN_BATCH, Negatives
    from .packed_batches import PackedWindow, RunPlan
    from .parsed_cache import CACHE_VARIABLE
    from .rank_batches import batch_slots, local_batches
    from .reversed_users import with_reversed_users
    from .saved_items import RunItems, load_items
    from .saved_sequences import load_sequences
    from .sequences import Dataset, Sequences, load_dataset, statistics
    from .split import Split, right_align
    from .strict_tables import read_table, refuse_unfit_id
    from .table_files import read_json_lines, read_table_file

__all__ = [
    "BAD_ROWS",
    "DUPLICATES",
    "IN_BATCH",
    "BadKind",
    "CACHE_VARIABLE",
    "Batch",
    "TABLE_COLUMNS",
    "Dataset",
    "RECBOLE_FIELDS",
    "ItemContents",
    "ImageError",
    "ImageFolder",
    "ImageLmdb",
    "ImportOptions",
    "Imported",
    "MISSING_TITLES",
    "Negatives",
    "PackedWindow",
    "Sequences",
    "Shape",
    "Split",
    "RunItems",
    "RunPlan",
    "TableOptions",
    "Window",
    "as_polars",
    "batch_slots",
    "describe_bad_rows",
    "epoch_batches",
    "feature_views",
    "import_amazon",
    "import_files",
    "import_iisan",
    "import_microlens",
    "import_mmrec",
    "import_movielens",
    "import_recbole",
    "is_image_name",
    "load_dataset",
    "load_items",
    "load_sequences",
    "local_batches",
    "open_database",
    "open_image_files",
    "open_images",
    "pack_texts",
    "padded_shape",
    "places",
    "read_image_file",
    "read_json_lines",
    "read_table",
    "read_table_file",
    "refuse_unfit_id",
    "refuse_unfit_name",
    "right_align",
    "row_blocks",
    "statistics",
    "steps_per_epoch",
    "text_id",
    "unpack_texts",
    "with_reversed_users",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
