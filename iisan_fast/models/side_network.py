"""IISAN's item encoder: SANB towers over the kept layers of one or two views, and the heads that fuse them.

Intra towers read one view each, the inter tower both (IISAN, section 3.2). Views may differ in width and depth
(IISAN-Versa, section 3): the last layers of both pair up, and the wider view is aligned to the narrower width.
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

WEIGHT_STD = 0.01  # of a SANB's matrices at the start
TOWER_VIEWS = {"first": (0,), "second": (1,), "inter": (0, 1)}  # the views of each tower


class KroneckerSum(nn.Module):
    """Matrices [layers, rows, columns] as sums of n Kronecker products of an n x n and a smaller matrix: a PHM layer
    (Zhang et al. 2021), as Compacter's adapters take it, with a quarter of the parameters."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__()
        if rows % TERMS or columns % TERMS:
            raise InputError(
                f"sanb: phm needs a bottleneck and widths that are multiples of {TERMS}, found {rows} and {columns}"
            )
        rules = torch.empty(layers, TERMS, TERMS, TERMS)
        parts = torch.empty(layers, TERMS, rows // TERMS, columns // TERMS)
        self.rules = nn.Parameter(rules.normal_(std=TERMS**-0.5))  # so that the sum has the parts' deviation
        self.parts = nn.Parameter(parts.normal_(std=WEIGHT_STD))

    def forward(self) -> Tensor:
        """[layers, rows, columns]."""
        products = torch.einsum("knab,knrc->karbc", self.rules, self.parts)
        return products.flatten(3, 4).flatten(1, 2)


class RankOne(nn.Module):
    """Matrices [layers, rows, columns] as products of a column and a row: Compacter's low-rank adapters."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(layers, rows, 1).normal_(std=WEIGHT_STD**0.5))
        self.right = nn.Parameter(torch.empty(layers, 1, columns).normal_(std=WEIGHT_STD**0.5))

    def forward(self) -> Tensor:
        """[layers, rows, columns]."""
        return self.left * self.right


def _weight(sanb: str, layers: int, rows: int, columns: int) -> nn.Parameter | nn.Module:
    if sanb == "adapter":
        return nn.Parameter(torch.empty(layers, rows, columns).normal_(std=WEIGHT_STD))
    return {"phm": KroneckerSum, "low-rank": RankOne}[sanb](layers, rows, columns)


class SideTower(nn.Module):
    """The parameters of the SANB blocks over `layers` kept layers of width `width`."""

    def __init__(self, layers: int, width: int, bottleneck: int, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(layers)) if config.gates else None
        self.down_weight = _weight(config.sanb, layers, bottleneck, width)
        self.down_bias = nn.Parameter(torch.zeros(layers, bottleneck))
        self.up_weight = _weight(config.sanb, layers, width, bottleneck)
        self.up_bias = nn.Parameter(torch.zeros(layers, width))

    def reading(self, *views: int) -> kernels.Tower:
        """Return the tower as the op takes it, over views of these numbers."""
        matrices = (self.down_weight, self.up_weight)
        down, up = (matrix() if isinstance(matrix, nn.Module) else matrix for matrix in matrices)
        return kernels.Tower(views, self.gate, down, self.down_bias, up, self.up_bias)


class SideNetwork(nn.Module):
    """The towers that the configuration asks for, over one or two views."""

    def __init__(self, views: list[ViewShape], config: ModelConfig) -> None:
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
        self.alike = len(set(views)) == len(self.by_bottleneck) == 1  # one call of the op takes all towers
        if "inter" in self.towers and self.widths[0] != self.widths[1]:
            bound = 1 / math.sqrt(max(self.widths))
            weight = torch.empty(self.paired, min(self.widths), max(self.widths))
            self.align_weight = nn.Parameter(weight.uniform_(-bound, bound))
            self.align_bias = nn.Parameter(torch.empty(weight.shape[:2]).uniform_(-bound, bound))

    @property
    def output_widths(self) -> dict[str, int]:
        """Each tower's output width, in the order the heads concatenate them."""
        return {name: getattr(self, name).up_bias.shape[1] for name in self.towers}

    def forward(self, states: list[States], projections: dict[str, Tensor]) -> Tensor:
        """Return the sum of the towers' outputs [N, d].

        Args: states: the views, tables [M, K, D] with the rows to read, int64 [N]; projections: by tower, [d, D], which
        bring its output [N, D] to [N, d].
        """

        def outputs(states: list[States], reads: dict[str, tuple[int, ...]]) -> list[Tensor]:
            towers = [getattr(self, name).reading(*views) for name, views in reads.items()]
            chosen = [projections[name] for name in reads]
            return kernels.side_towers(states, towers, self.activation, chosen)

        summands = []
        if len({view.table.shape[1:] for view in states}) == 1:  # one call for all towers of one bottleneck
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
        """Return the towers' parameters; of towers that `step_refusal` does not refuse."""
        return [getattr(self, name).reading(*TOWER_VIEWS[name]) for name in self.towers]

    def step_refusal(self) -> str:
        """Return why one call of the op does not take all towers' parameters as they are, or ""."""
        if not self.alike:
            return "its towers differ in shape"
        if any(isinstance(getattr(self, name).down_weight, nn.Module) for name in self.towers):
            return "its towers' weights are products of others"
        return ""

    def _aligned(self, states: list[States]) -> list[States]:
        """The last paired layers of both views, the wider one brought to the narrower width."""
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
    """Linear maps from each tower to the embedding dimension, and the fusion of their concatenation.

    IISAN: Linear(D, D), Linear(D, d) a tower. IISAN-Versa: Linear(D, d), Linear(d, d) an intra tower, the inter
    tower as in IISAN. Then Linear(towers * d, d). No activation in between, so each tower's three maps are multiplied
    into one of [d, D] before they meet the items; what is trained are the three.
    """

    def __init__(self, widths: dict[str, int], config: ModelConfig) -> None:
        super().__init__()
        d = config.embedding_dim
        for name, width in widths.items():
            hidden = d if config.method == "iisan-versa" and name != "inter" else width
            self.add_module(name, nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, d)))
        self.towers = tuple(widths)
        self.fusion = nn.Linear(len(widths) * d, d)

    def folded(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({tower's name: projection [d, D]}, bias [d]): projected outputs and bias add up to item vectors."""
        parts = self.fusion.weight.chunk(len(self.towers), dim=1)
        chains = [kernels.Chain(part, *head) for part, head in zip(parts, self.weights())]
        weights, biases = zip(*kernels.fold_heads(chains))
        return dict(zip(self.towers, weights)), sum(biases, self.fusion.bias)

    def weights(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return each tower's two maps: weight and bias of the second, then of the first."""
        maps = [getattr(self, name) for name in self.towers]
        return [(second.weight, second.bias, first.weight, first.bias) for first, second in maps]


class SideItemEncoder(nn.Module):
    """Item vectors from hidden states: IISAN, or IISAN-Versa."""

    small_operators = True  # C++ shares the towers' work out itself; the reference waits for no other core

    def __init__(self, views: list[ViewShape], config: ModelConfig) -> None:
        super().__init__()
        self.side_network = SideNetwork(views, config)
        self.heads = Heads(self.side_network.output_widths, config)

    def forward(self, states: list[States]) -> Tensor:
        """[N, d] for the hidden states of N items."""
        projections, bias = self.heads.folded()
        return self.side_network(states, projections) + bias

    def weights(self, sequence: kernels.SequenceWeights) -> kernels.RecommenderWeights:
        """Return all trained weights by their roles, with a sequence encoder's.

        Of towers that `step_refusal` does not refuse.
        """
        fusion, towers = self.heads.fusion, self.side_network.weights()
        heads = self.heads.weights()
        return kernels.RecommenderWeights(
            towers, self.side_network.activation, heads, fusion.weight, fusion.bias, sequence
        )

    def step_refusal(self) -> str:
        """Return why the weights have no roles in a fused step, or ""."""
        return self.side_network.step_refusal()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter under the name of its learning rate, once."""
        towers = [module for module in self.side_network.modules() if isinstance(module, SideTower)]
        gates = [tower.gate for tower in towers if tower.gate is not None]
        adapters = [parameter for tower in towers for parameter in tower.parameters() if parameter is not tower.gate]
        align = [parameter for name, parameter in self.side_network.named_parameters() if name.startswith("align_")]
        return {"adapters": adapters, "gates": gates, "heads": [*align, *self.heads.parameters()]}


def check_views(views: list[ViewShape], config: ModelConfig) -> None:
    """Refuses views that the configured method cannot join."""
    config.check_views(len(views))
    if len(views) == 2 and views[0] != views[1] and config.method == "iisan":
        shapes = " and ".join(f"{layers} layers of width {width}" for layers, width in views)
        raise InputError(f"method: iisan needs views of equal shape, found {shapes}; choose iisan-versa")
