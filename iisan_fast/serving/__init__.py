"""Use a trained run: rank items for any history, let its catalogue grow, export it, and look at it."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .catalogue import Catalogue
    from .changing_catalogue import ChangedCatalogue, add_items, remove_items, update_items
    from .exporting import export
    from .item_matrix import ItemMatrix
    from .model import IISAN
    from .new_items import read_item_ids
    from .page import show
    from .recommendation import recommend
    from .trained_model import TrainedModel
    from .user_histories import UserHistories

__all__ = [
    "Catalogue",
    "ChangedCatalogue",
    "IISAN",
    "ItemMatrix",
    "TrainedModel",
    "UserHistories",
    "add_items",
    "export",
    "read_item_ids",
    "recommend",
    "remove_items",
    "show",
    "update_items",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
