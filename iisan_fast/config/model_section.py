"""Define the settings of the method, its side network and heads, and the sequence encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError, check_choice
from ..setting_fields import check_settings, setting
from .method_names import METHODS, NEIGHBOURS, SIDE_METHODS

ACTIVATIONS = ("relu", "gelu")
SANBS = ("adapter", "phm", "low-rank")
PHM_TERMS = 4  # of a sum of Kronecker products
TOWERS = ("first", "second", "inter")  # over the first view, the second, and both


@dataclass(frozen=True)
class ModelConfig:
    """The method, its side network and heads, and the sequence encoder."""

    method: str = setting(
        "iisan",
        help="IISAN, or a method to compare with: tuned encoders (full, adapter, lora, bitfit), frozen encoders, "
        "SASRec on item ids (id), or no training (neighbours).",
        choices=METHODS,
    )
    embedding_dim: int = setting(64, help="Width of item vectors and user states.", minimum=1, maximum=65_536)
    bottleneck: int = setting(64, help="Width inside the SANBs, or inside adapters.", minimum=1, maximum=65_536)
    bottlenecks: Mapping[str, int] = setting(
        {}, help="Width inside one tower's SANBs: first, second or inter.", minimum=1, maximum=65_536
    )
    activation: str = setting("relu", help="Activation inside the SANBs, or inside adapters.", choices=ACTIVATIONS)
    sanb: str = setting(
        "adapter",
        help="Form of a SANB's weights: matrices, sums of Kronecker products, or products of rank 1.",
        choices=SANBS,
    )
    gates: bool = setting(True, help="Join a tower's layers by learned gates; without, by plain sums.")
    intra: bool = setting(True, help="Use a tower for each view.")
    inter: bool | None = setting(None, help="Use a tower that joins two views.", automatic="if there are two views")
    layer_groups: int | None = setting(
        None,
        help="Keep only the embedding output and the last block of each of so many equal groups.",
        minimum=1,
        maximum=1000,
        automatic="all layers that there are",
    )
    blocks: int = setting(2, help="Transformer blocks of the sequence encoder.", minimum=1, maximum=65_536)
    attention_heads: int = setting(2, help="Attention heads of the sequence encoder.", minimum=1, maximum=65_536)
    dropout: float = setting(0.1, help="Dropout probability of the sequence encoder.", minimum=0, below=1)
    standardise: bool = setting(
        False, help="Give each number of the cached states mean 0 and deviation 1 over the catalogue."
    )
    item_ids: bool = setting(
        False, help="Add a trained vector to the vector of each item that occurs in training, and none to other items."
    )
    item_id_dropout: float = setting(
        0.3, help="Dropout probability of the vectors that item_ids adds.", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.sanb == "phm":
            for tower, width in {"all": self.bottleneck, **self.bottlenecks}.items():
                if width % PHM_TERMS:
                    raise InputError(f"sanb: phm needs bottlenecks that {PHM_TERMS} divides, found {width} ({tower})")
        for tower in self.bottlenecks:
            check_choice("bottlenecks", tower, TOWERS)
        if self.embedding_dim % self.attention_heads:
            raise InputError(
                f"embedding_dim: expected a multiple of attention_heads ({self.attention_heads}), "
                f"found {self.embedding_dim}"
            )
        if not self.intra and self.inter is False:
            raise InputError("intra, inter: expected at least one of the two towers, found neither")
        if self.method not in SIDE_METHODS:
            self._refuse_towers()
        if self.item_ids and self.method == "id":
            raise InputError("item_ids: id has a trained vector of each item already; leave it out")
        if not self.item_ids and self.item_id_dropout != ModelConfig.item_id_dropout:
            raise InputError("item_id_dropout: is for the vectors that item_ids adds; give item_ids, or leave it out")

    def _refuse_towers(self) -> None:
        """Raise InputError for settings of towers, which the method does not have."""
        names = ("bottlenecks", "sanb", "gates", "intra", "inter", "layer_groups")
        for name in names if self.method == "adapter" else (*names, "bottleneck", "activation"):
            if (value := getattr(self, name)) != getattr(ModelConfig(), name):
                raise InputError(
                    f"{name}: {self.method} has no towers; {json.dumps(value)} is for {' and '.join(SIDE_METHODS)}"
                )

    def towers(self, count: int) -> tuple[str, ...]:
        """Return the names of the towers over `count` views, of "first", "second" and "inter"."""
        intra = TOWERS[:count] if self.intra else ()
        return intra if self.inter is False or count < 2 else (*intra, "inter")

    def check_views(self, count: int) -> None:
        """Raise InputError if the method cannot take `count` views."""
        if self.method == "id" and count:
            raise InputError("views: id reads neither encoders nor their states; leave them out")
        least = 0 if self.method == NEIGHBOURS else 1
        if self.method != "id" and not least <= count <= 2:
            raise InputError(f"views: {self.method} takes {least or 'none, 1'} or 2, found {count}")
        if count == 1 and self.inter:
            raise InputError("inter: the inter tower joins two views, found one; leave it out or give two views")
        if count == 1 and not self.intra:
            raise InputError("intra: one view has no inter tower, so its intra tower cannot be left out")
        towers = self.towers(count)
        for tower in self.bottlenecks:
            if tower not in towers:
                raise InputError(f"bottlenecks.{tower}: the model has no such tower, but {' and '.join(towers)}")
