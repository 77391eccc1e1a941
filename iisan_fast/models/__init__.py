"""Build the recommender: an item encoder, the sequence encoder SASRec, a loss and scores."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .activation_memory import EncodingPlan, activation_bytes
    from .cooccurrence import RECENT, CoOccurrence
    from .item_ids import trained_rows
    from .neighbours import TERM_CONSTANTS, NeighbourTerms, Scores, popularity_scores
    from .plain_modules import PlainItemEncoder, PlainSequenceEncoder, ViewTreatment
    from .recommender import ITEM_PARAMETERS, Recommender, build_recommender
    from .sasrec import Block
    from .side_network import SideNetwork, check_views
    from .similarity import Similarity

__all__ = [
    "Block",
    "CoOccurrence",
    "EncodingPlan",
    "ITEM_PARAMETERS",
    "NeighbourTerms",
    "PlainItemEncoder",
    "PlainSequenceEncoder",
    "RECENT",
    "Recommender",
    "Scores",
    "SideNetwork",
    "Similarity",
    "TERM_CONSTANTS",
    "ViewTreatment",
    "activation_bytes",
    "build_recommender",
    "check_views",
    "popularity_scores",
    "trained_rows",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
