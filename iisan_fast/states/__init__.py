"""Extract hidden states into a store, load them into tables for training, and prepare batches ahead of the steps."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .encoder_inputs import open_sources, view_inputs
    from .entries import content_digest
    from .extraction import Extracted, extract
    from .feature_table import FeatureTable, final_states, load_table, unread_table
    from .input_table import EncodedTable, open_inputs
    from .item_source import Chunks, ItemInputs, ItemSource
    from .loader import PlannedBatch, PreparedBatch, planned_batches, prepared_batches
    from .manifest import describes_view
    from .merging import Merged, merge_shards
    from .placement import free_memory, size_text, usable_memory
    from .recorded_encoders import EncoderPlaces, RecordedEncoders
    from .recorded_views import refuse_other_encoders
    from .shards import parsed_shard
    from .standardise import StateStatistics
    from .state_reader import StateReader, open_states
    from .state_writer import GROUP_ITEMS
    from .store import Store, group_positions
    from .verification import verify_cache
    from .view_shapes import ViewShape

__all__ = [
    "Chunks",
    "EncodedTable",
    "EncoderPlaces",
    "Extracted",
    "FeatureTable",
    "GROUP_ITEMS",
    "ItemInputs",
    "ItemSource",
    "Merged",
    "PlannedBatch",
    "PreparedBatch",
    "RecordedEncoders",
    "StateReader",
    "StateStatistics",
    "Store",
    "ViewShape",
    "content_digest",
    "describes_view",
    "final_states",
    "extract",
    "free_memory",
    "group_positions",
    "load_table",
    "merge_shards",
    "open_inputs",
    "open_sources",
    "open_states",
    "parsed_shard",
    "planned_batches",
    "prepared_batches",
    "refuse_other_encoders",
    "size_text",
    "unread_table",
    "usable_memory",
    "verify_cache",
    "view_inputs",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
