"""The side network: SANB towers over the kept layers of one or two views, and the heads that fuse them.

Intra towers read one view each, the inter tower both (IISAN, section 3.2). Views may differ in width and depth
(IISAN-Versa, section 3): the last layers of both pair up, and the wider view is aligned to the narrower width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import kernels
from .config import ModelConfig
from .errors import InputError
from .kernels import States

ViewShape = tuple[int, int]  # kept layers K, width D


class SideTower(nn.Module):
    """The parameters of the SANB blocks over `layers` kept layers of width `width`."""

    def __init__(self, layers: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(layers)) if config.gates else None
        self.down_weight = nn.Parameter(torch.empty(layers, config.bottleneck, width).normal_(std=0.01))
        self.down_bias = nn.Parameter(torch.zeros(layers, config.bottleneck))
        self.up_weight = nn.Parameter(torch.empty(layers, width, config.bottleneck).normal_(std=0.01))
        self.up_bias = nn.Parameter(torch.zeros(layers, width))

    def reading(self, *views: int) -> kernels.Tower:
        """What the op takes: the numbers of the views that the tower reads, and its parameters."""
        return kernels.Tower(views, self.gate, self.down_weight, self.down_bias, self.up_weight, self.up_bias)


class SideNetwork(nn.Module):
    """The towers that the configuration asks for, over one or two views."""

    def __init__(self, views: list[ViewShape], config: ModelConfig) -> None:
        super().__init__()
        check_views(views, config)
        self.activation = config.activation
        self.paired = min(layers for layers, _ in views)
        self.widths = [width for _, width in views]
        shapes = dict(zip(("first", "second"), views)) if config.intra else {}
        if config.inter and len(views) == 2:
            shapes["inter"] = (self.paired, min(self.widths))
        self.towers = tuple(shapes)
        for name, shape in shapes.items():
            self.add_module(name, SideTower(*shape, config))
        if "inter" in shapes and self.widths[0] != self.widths[1]:
            bound = 1 / math.sqrt(max(self.widths))
            weight = torch.empty(self.paired, min(self.widths), max(self.widths))
            self.align_weight = nn.Parameter(weight.uniform_(-bound, bound))
            self.align_bias = nn.Parameter(torch.empty(weight.shape[:2]).uniform_(-bound, bound))

    @property
    def output_widths(self) -> dict[str, int]:
        """Each tower's output width, in the order the heads concatenate them."""
        return {name: getattr(self, name).up_bias.shape[1] for name in self.towers}

    def forward(
        self, states: list[States], projections: dict[str, Tensor], operands: torch.dtype | None = None
    ) -> Tensor:
        """The views, tables [M, K, D] with the rows to read, int64 [N] -> the towers' outputs, each [N, D] through its
        projection [d, D], added up: [N, d]. `operands` as `kernels.side_towers` takes them."""
        reads = {"first": (0,), "second": (1,), "inter": (0, 1)}

        def outputs(states: list[States], reads: dict[str, tuple[int, ...]]) -> list[Tensor]:
            towers = [getattr(self, name).reading(*views) for name, views in reads.items()]
            chosen = [projections[name] for name in reads]
            return kernels.side_towers(states, towers, self.activation, chosen, operands)

        if len({view.table.shape[1:] for view in states}) == 1:  # equal shapes: one call for all towers
            return sum(outputs(states, {name: reads[name] for name in self.towers}))
        found = []
        for name, view in zip(("first", "second"), states):
            if name in self.towers:
                found += outputs([view], {name: (0,)})
        if "inter" in self.towers:
            found += outputs(self._aligned(states), {"inter": (0, 1)})
        return sum(found)

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
        """({tower's name: projection [d, D]}, bias [d]): item vectors are the projected outputs' sum, and the bias."""
        projections, bias = {}, self.fusion.bias
        for name, part in zip(self.towers, self.fusion.weight.chunk(len(self.towers), dim=1)):
            first, second = getattr(self, name)
            narrow = part @ second.weight  # [d, hidden]
            projections[name] = kernels.fold(narrow, first.weight)
            bias = bias + narrow @ first.bias + part @ second.bias
        return projections, bias


def check_views(views: list[ViewShape], config: ModelConfig) -> None:
    """Refuses views that the configured method cannot join."""
    if len(views) == 1 and not config.intra:
        raise InputError("intra: one view has no inter tower, so its intra tower cannot be left out")
    if len(views) == 2 and views[0] != views[1] and config.method == "iisan":
        shapes = " and ".join(f"{layers} layers of width {width}" for layers, width in views)
        raise InputError(f"method: iisan needs views of equal shape, found {shapes}; choose iisan-versa")
