"""Define IISAN's item encoder: towers of SANBs over the selected layers of one or two views, and heads that fuse them.

An intra tower reads one view, the inter tower reads both (IISAN, section 3.2). The views may differ in width and depth
(IISAN-Versa, section 3): the last layers of both are paired, and the wider view is mapped to the narrower width.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import PHM_TERMS as TERMS
from ..config import ModelConfig
from ..errors import InputError
from ..kernels import States
from ..states import ViewShape

WEIGHT_STD = 0.01  # of a SANB's first matrices
TOWER_VIEWS = {"first": (0,), "second": (1,), "inter": (0, 1)}  # the views of each tower


class KroneckerSum(nn.Module):
    """Matrices [layers, rows, columns] that are sums of n Kronecker products: a PHM layer (Zhang et al. 2021).

    Each product is of an n x n and a smaller matrix, as in Compacter's adapters. With n = 4 this takes about a quarter
    of the parameters.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        """Draw the matrices. Raises InputError if 4 does not divide both `rows` and `columns`."""
        super().__init__()
        if rows % TERMS or columns % TERMS:
            raise InputError(
                f"sanb: phm needs a bottleneck and widths that are multiples of {TERMS}, found {rows} and {columns}"
            )
        rules = torch.empty(layers, TERMS, TERMS, TERMS)
        parts = torch.empty(layers, TERMS, rows // TERMS, columns // TERMS)
        self.rules = nn.Parameter(rules.normal_(std=TERMS**-0.5))  # so that the sum's deviation is that of the parts
        self.parts = nn.Parameter(parts.normal_(std=WEIGHT_STD))

    def forward(self) -> Tensor:
        """Return the matrices [layers, rows, columns]."""
        products = torch.einsum("knab,knrc->karbc", self.rules, self.parts)
        return products.flatten(3, 4).flatten(1, 2)


class RankOne(nn.Module):
    """Matrices [layers, rows, columns] of rank 1, as in Compacter's low-rank adapters."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        """Draw the columns and rows."""
        super().__init__()
        self.left = nn.Parameter(torch.empty(layers, rows, 1).normal_(std=WEIGHT_STD**0.5))
        self.right = nn.Parameter(torch.empty(layers, 1, columns).normal_(std=WEIGHT_STD**0.5))

    def forward(self) -> Tensor:
        """Return the matrices [layers, rows, columns]."""
        return self.left * self.right


def _weight(sanb: str, layers: int, rows: int, columns: int) -> nn.Parameter | nn.Module:
    """Return a trained tensor [layers, rows, columns], or a module that computes it. sanb: one of config.SANBS."""
    if sanb == "adapter":
        return nn.Parameter(torch.empty(layers, rows, columns).normal_(std=WEIGHT_STD))
    return {"phm": KroneckerSum, "low-rank": RankOne}[sanb](layers, rows, columns)


class SideTower(nn.Module):
    """The parameters of one tower: a SANB and a gate for each of K layers of width D, bottleneck R.

    SANB(x) = x + W_up act(W_down x + b_down) + b_up. `kernels.side_towers` computes the tower (IISAN, equations 2 to
    4).
    """

    def __init__(self, layers: int, width: int, bottleneck: int, config: ModelConfig) -> None:
        """Make the parameters: K = layers, D = width, R = bottleneck. config: the gates and the kind of matrix."""
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(layers)) if config.gates else None
        self.down_weight = _weight(config.sanb, layers, bottleneck, width)
        self.down_bias = nn.Parameter(torch.zeros(layers, bottleneck))
        self.up_weight = _weight(config.sanb, layers, width, bottleneck)
        self.up_bias = nn.Parameter(torch.zeros(layers, width))

    def reading(self, *views: int) -> kernels.Tower:
        """Return the tower in the form that the op takes, reading the views at these positions."""
        matrices = (self.down_weight, self.up_weight)
        down, up = (matrix() if isinstance(matrix, nn.Module) else matrix for matrix in matrices)
        return kernels.Tower(views, self.gate, down, self.down_bias, up, self.up_bias)


class SideNetwork(nn.Module):
    """The towers of a configuration over one or two views; the sum of their projected outputs is the item vector."""

    def __init__(self, views: list[ViewShape], config: ModelConfig) -> None:
        """Make the towers. Raises InputError if the method cannot take these views (see `check_views`)."""
        super().__init__()
        check_views(views, config)
        self.activation = config.activation
        self.paired = min(layers for layers, _ in views)
        self.widths = [width for _, width in views]
        shapes = {**dict(zip(("first", "second"), views)), "inter": (self.paired, min(self.widths))}
        self.towers = config.towers(len(views))
        self.by_bottleneck: dict[int, list[str]] = {}
        for name in self.towers:
            bottleneck = config.bottlenecks.get(name, config.bottleneck)
            self.by_bottleneck.setdefault(bottleneck, []).append(name)
            self.add_module(name, SideTower(*shapes[name], bottleneck, config))
        self.alike = len(set(views)) == len(self.by_bottleneck) == 1  # True: one call of the op computes all towers
        if "inter" in self.towers and self.widths[0] != self.widths[1]:
            bound = 1 / math.sqrt(max(self.widths))
            weight = torch.empty(self.paired, min(self.widths), max(self.widths))
            self.align_weight = nn.Parameter(weight.uniform_(-bound, bound))
            self.align_bias = nn.Parameter(torch.empty(weight.shape[:2]).uniform_(-bound, bound))

    @property
    def output_widths(self) -> dict[str, int]:
        """Return the output width of each tower by name, in the order in which the heads concatenate the towers."""
        return {name: getattr(self, name).up_bias.shape[1] for name in self.towers}

    def forward(self, states: list[States], projections: dict[str, Tensor]) -> Tensor:
        """Return the sum of the towers' projected outputs, [N, d].

        states: the views, tables [M, K, D] with the rows int64 [N] to read. projections: a matrix [d, D] for each tower
        by name, which maps the tower's output [N, D] to [N, d].
        """

        def outputs(states: list[States], reads: dict[str, tuple[int, ...]]) -> list[Tensor]:
            towers = [getattr(self, name).reading(*views) for name, views in reads.items()]
            chosen = [projections[name] for name in reads]
            return kernels.side_towers(states, towers, self.activation, chosen)

        summands = []
        if len({view.table.shape[1:] for view in states}) == 1:  # one call for all towers with the same bottleneck
            for names in self.by_bottleneck.values():
                summands += outputs(states, {name: TOWER_VIEWS[name] for name in names})
            return functools.reduce(torch.add, summands)
        for name, view in zip(("first", "second"), states):
            if name in self.towers:
                summands += outputs([view], {name: (0,)})
        if "inter" in self.towers:
            summands += outputs(self._aligned(states), {"inter": (0, 1)})
        return functools.reduce(torch.add, summands)

    def weights(self) -> list[kernels.Tower]:
        """Return the towers in the form that a fused step takes. `step_refusal` must be ""."""
        return [getattr(self, name).reading(*TOWER_VIEWS[name]) for name in self.towers]

    def step_refusal(self) -> str:
        """Return why a fused step cannot take the towers, in one phrase; "" if it can.

        It can if one call of the op computes all towers from their parameters.
        """
        if not self.alike:
            return "its towers differ in shape"
        if any(isinstance(getattr(self, name).down_weight, nn.Module) for name in self.towers):
            return "its towers' weights are products of others"
        return ""

    def _aligned(self, states: list[States]) -> list[States]:
        """Return the paired last layers of both views, the wider view mapped to the narrower width."""
        paired = [States(view.table[:, view.table.shape[1] - self.paired :], view.rows) for view in states]
        if self.widths[0] == self.widths[1]:
            return paired
        wide = self.widths.index(max(self.widths))
        table, rows = paired[wide]
        states = (table if rows is None else table[rows]).to(self.align_weight.dtype)
        aligned = torch.einsum("nkw,kdw->nkd", states, self.align_weight)
        paired[wide] = States(aligned + self.align_bias)
        return paired


class Heads(nn.Module):
    """Two linear maps for each tower, and the fusion of the towers' outputs into item vectors.

    IISAN: Linear(D, D) and Linear(D, d) for each tower. IISAN-Versa: Linear(D, d) and Linear(d, d) for an intra tower,
    and IISAN's maps for the inter tower. Then Linear(towers * d, d) of the concatenation. No activation is between
    them, so `folded` multiplies the three maps of a tower into one matrix [d, D]. Trained are the three maps.
    """

    def __init__(self, widths: dict[str, int], config: ModelConfig) -> None:
        """Make the maps. widths: the output width D of each tower, by name."""
        super().__init__()
        d = config.embedding_dim
        for name, width in widths.items():
            hidden = d if config.method == "iisan-versa" and name != "inter" else width
            self.add_module(name, nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, d)))
        self.towers = tuple(widths)
        self.fusion = nn.Linear(len(widths) * d, d)

    def folded(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the folded matrix [d, D] of each tower by name, and one bias [d].

        An item's vector is the sum of the towers' outputs, each multiplied by its matrix, and the bias.
        """
        parts = self.fusion.weight.chunk(len(self.towers), dim=1)
        chains = [kernels.Chain(part, *head) for part, head in zip(parts, self.weights())]
        weights, biases = zip(*kernels.fold_heads(chains))
        return dict(zip(self.towers, weights)), sum(biases, self.fusion.bias)

    def weights(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return the two maps of each tower: weight and bias of the second map, then of the first."""
        maps = [getattr(self, name) for name in self.towers]
        return [(second.weight, second.bias, first.weight, first.bias) for first, second in maps]


class SideItemEncoder(nn.Module):
    """Item vectors from hidden states by the side network of IISAN or IISAN-Versa."""

    small_operators = True  # the C++ form divides the towers' work between cores itself

    def __init__(self, views: list[ViewShape], config: ModelConfig) -> None:
        """Make the side network and its heads. Raises InputError if the method cannot take these views."""
        super().__init__()
        self.side_network = SideNetwork(views, config)
        self.heads = Heads(self.side_network.output_widths, config)

    def forward(self, states: list[States]) -> Tensor:
        """Return the item vectors [N, d] for the hidden states of N items, one entry of `states` for each view."""
        projections, bias = self.heads.folded()
        return self.side_network(states, projections) + bias

    def weights(self, sequence: kernels.SequenceWeights) -> kernels.RecommenderWeights:
        """Return all trained weights, with those of the sequence encoder, in the form that a fused step takes.

        `step_refusal` must be "".
        """
        fusion = self.heads.fusion
        towers = self.side_network.weights()
        heads = self.heads.weights()
        return kernels.RecommenderWeights(
            towers, self.side_network.activation, heads, fusion.weight, fusion.bias, sequence
        )

    def step_refusal(self) -> str:
        """Return why a fused step cannot train this item encoder, in one phrase; "" if it can."""
        return self.side_network.step_refusal()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by the name of their learning rate, each parameter once."""
        towers = [module for module in self.side_network.modules() if isinstance(module, SideTower)]
        gates = [tower.gate for tower in towers if tower.gate is not None]
        adapters = [parameter for tower in towers for parameter in tower.parameters() if parameter is not tower.gate]
        align = [parameter for name, parameter in self.side_network.named_parameters() if name.startswith("align_")]
        return {"adapters": adapters, "gates": gates, "heads": [*align, *self.heads.parameters()]}


def check_views(views: list[ViewShape], config: ModelConfig) -> None:
    """Raise InputError if the configured method cannot join views of these shapes, or of this number.

    The number is checked by `ModelConfig.check_views`; iisan takes two views of equal shape alone.
    """
    config.check_views(len(views))
    if len(views) == 2 and views[0] != views[1] and config.method == "iisan":
        shapes = " and ".join(f"{layers} layers of width {width}" for layers, width in views)
        raise InputError(f"method: iisan needs views of equal shape, found {shapes}; choose iisan-versa")
