"""The processes of a job over several devices: who they are, and what they exchange."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .agreement import refuse_disagreement, refuse_too_few
    from .gathering import gathered
    from .joining import joined_ranks
    from .ranks import ALONE, Ranks

__all__ = [
    "ALONE",
    "Ranks",
    "gathered",
    "joined_ranks",
    "refuse_disagreement",
    "refuse_too_few",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
