"""Use a trained run: rank items for any history, let its catalogue grow, export it, and look at it."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .exports.exporting import export
    from .growing.catalogue import Catalogue
    from .growing.changing_catalogue import ChangedCatalogue, add_items, remove_items, update_items
    from .growing.new_items import read_item_ids
    from .histories.history_arguments import allowed_items
    from .histories.history_files import read_histories
    from .histories.history_numbers import UserRow, number_histories
    from .histories.user_histories import UserHistories
    from .item_matrix import ItemMatrix
    from .model import IISAN
    from .recommendation import Recommended, recommend
    from .recommendation_files import check_format, json_lines, write_recommendations
    from .report.page import show
    from .trained_model import TrainedModel

__all__ = [
    "Catalogue",
    "ChangedCatalogue",
    "IISAN",
    "ItemMatrix",
    "Recommended",
    "TrainedModel",
    "UserHistories",
    "UserRow",
    "add_items",
    "allowed_items",
    "check_format",
    "export",
    "json_lines",
    "number_histories",
    "read_histories",
    "read_item_ids",
    "recommend",
    "remove_items",
    "show",
    "update_items",
    "write_recommendations",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
