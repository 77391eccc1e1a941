"""Write the sequence encoder and the item encoders as plain modules, which torch.export can trace.

They take dense tensors in place of packed rows and tables, and compute what the references of the ops compute. Maps
that depend on weights alone are multiplied beforehand: the folded heads, and the matrices that are products of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .item_encoders import FinalHeads, FrozenItemEncoder
from .side_network import TOWER_VIEWS, SideItemEncoder, SideNetwork

ACTIVATION_FUNCTIONS = {"relu": F.relu, "gelu": F.gelu}
GATE_TEMPERATURE = 0.1


class PlainSequenceEncoder(nn.Module):
    """SASRec without dropout over histories of one width."""

    def __init__(self, weights: kernels.SequenceWeights) -> None:
        """Copy the weights of a sequence encoder, in the form that its op takes."""
        super().__init__()
        self.heads = weights.heads
        self.epsilon = weights.epsilon
        self.position, self.scale, self.shift = map(_constant, weights.tensors[:3])
        self.blocks = nn.ModuleList(
            _PlainBlock(block._asdict(), weights.heads, weights.epsilon) for block in weights.blocks()
        )

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Return the state of each user after the last item, float32 [users, d].

        inputs: the item vectors of the histories, float32 [users, max_inputs, d], right-aligned: the last item of each
        history stands last, with zeros before the first one. lengths: of the histories, int64 [users], from 1.
        """
        count, width = self.position.shape
        places = torch.arange(count, device=inputs.device)
        later = places[None, :] > places[:, None]
        padding = places[None, :] < (count - lengths)[:, None]
        itself = torch.eye(count, dtype=torch.bool, device=inputs.device)  # a softmax over no key at all would be NaN
        hidden = (later | padding[:, None, :]) & ~itself
        x = F.layer_norm(inputs + self.position, (width,), self.scale, self.shift, self.epsilon)
        for block in self.blocks:
            x = block(x, hidden[:, None])
        return x[:, -1]


class _PlainBlock(nn.Module):
    """A post-norm transformer block over a grid."""

    def __init__(self, weights: dict[str, Tensor], heads: int, epsilon: float) -> None:
        """Copy the weights of a block, by the names that the op has for them."""
        super().__init__()
        self.heads = heads
        self.epsilon = epsilon
        for name, tensor in weights.items():
            setattr(self, name, _constant(tensor))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the output [users, L, d]. hidden: bool [users, 1, L, L], True for keys that a query must not see."""
        queries, keys, values = (
            F.linear(x, weight).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        attended = (weights @ values).transpose(1, 2).flatten(2)
        shape = self.attention_scale.shape
        x = x + F.linear(attended, self.output)
        x = F.layer_norm(x, shape, self.attention_scale, self.attention_shift, self.epsilon)
        fed = F.linear(F.relu(F.linear(x, self.feed_in, self.feed_in_bias)), self.feed_out, self.feed_out_bias)
        return F.layer_norm(x + fed, shape, self.feed_scale, self.feed_shift, self.epsilon)


class ViewTreatment(NamedTuple):
    """The dtype and the statistics by which the states of a view are prepared for the item encoder."""

    dtype: torch.dtype  # of the states with which the run was trained, to which they are rounded
    mean: Tensor | None  # float64 [K, D]; None if the states are not standardised
    deviation: Tensor | None  # float64 [K, D]


class PlainItemEncoder(nn.Module):
    """Item vectors from the hidden states of an encoder, as a cache stores them."""

    def __init__(self, item_encoder: SideItemEncoder | FrozenItemEncoder, treatments: Sequence[ViewTreatment]) -> None:
        """Copy the weights of an item encoder. treatments: of each view, in their order."""
        super().__init__()
        self.views = nn.ModuleList(map(_PlainView, treatments))
        if isinstance(item_encoder, SideItemEncoder):
            self.encoder: nn.Module = _PlainSide(item_encoder)
        else:
            self.encoder = _PlainFrozen(item_encoder.heads)

    def forward(self, *states: Tensor) -> Tensor:
        """Return the item vectors, float32 [N, d]. states: of each view, float32 [N, K, D]."""
        return self.encoder([view(part) for view, part in zip(self.views, states)])


class _PlainView(nn.Module):
    """Rounding and standardisation of a view's states."""

    def __init__(self, treatment: ViewTreatment) -> None:
        """Copy what is done to the states."""
        super().__init__()
        self.dtype = treatment.dtype
        self.standardised = treatment.mean is not None
        if treatment.mean is not None and treatment.deviation is not None:
            self.mean = _constant(treatment.mean)
            self.factors = _constant(torch.where(treatment.deviation > 0, 1 / treatment.deviation, 0.0))

    def forward(self, states: Tensor) -> Tensor:
        """Return the states as the item encoder reads them, float32 [N, K, D]."""
        states = self._rounded(states)
        if self.standardised:
            states = self._rounded(((states.double() - self.mean) * self.factors).float())
        return states

    def _rounded(self, states: Tensor) -> Tensor:
        """Round float32 states to the dtype of the run's table."""
        return states if self.dtype == torch.float32 else states.to(self.dtype).float()


class _PlainFrozen(nn.Module):
    """The heads on the last selected layer of each view."""

    def __init__(self, heads: FinalHeads) -> None:
        """Take the heads."""
        super().__init__()
        self.heads = heads

    def forward(self, states: list[Tensor]) -> Tensor:
        """Return the item vectors [N, d]."""
        return self.heads([view[:, -1] for view in states])


class _PlainSide(nn.Module):
    """A side network with its folded heads."""

    def __init__(self, item_encoder: SideItemEncoder) -> None:
        """Copy the weights, and fold the heads."""
        super().__init__()
        with torch.no_grad():
            projections, bias = item_encoder.heads.folded()
        network = item_encoder.side_network
        self.bias = _constant(bias)
        self.towers = nn.ModuleDict(
            {name: _PlainTower(network, name, projections[name]) for name in network.towers},
        )
        self.paired = network.paired
        widths = network.widths
        self.wide = widths.index(max(widths)) if hasattr(network, "align_weight") else None
        if self.wide is not None:
            self.align_weight = _constant(network.align_weight)
            self.align_bias = _constant(network.align_bias)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Return the item vectors [N, d]."""
        vectors = self.bias
        for name, tower in self.towers.items():
            views = [states[view] for view in TOWER_VIEWS[name]]
            vectors = vectors + tower(self._paired(views) if len(views) == 2 else views)
        return vectors

    def _paired(self, states: list[Tensor]) -> list[Tensor]:
        """Return the paired last layers of both views, the wider view mapped to the narrower width."""
        paired = [view[:, view.shape[1] - self.paired :] for view in states]
        if self.wide is not None:
            aligned = torch.einsum("nkw,kdw->nkd", paired[self.wide], self.align_weight)
            paired[self.wide] = aligned + self.align_bias
        return paired


class _PlainTower(nn.Module):
    """One tower, and the matrix that maps its output to item vectors."""

    def __init__(self, network: SideNetwork, name: str, projection: Tensor) -> None:
        """Copy the weights of a tower by name."""
        super().__init__()
        with torch.no_grad():
            tower = getattr(network, name).reading(*TOWER_VIEWS[name])
        self.activation = ACTIVATION_FUNCTIONS[network.activation]
        self.gated = tower.gate is not None
        if tower.gate is not None:
            self.gate = _constant(torch.sigmoid(tower.gate / GATE_TEMPERATURE))
        self.down_weight, self.down_bias, self.up_weight, self.up_bias = map(_constant, tower[2:])
        self.projection = _constant(projection)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Return the projected output [N, d]. views: states [N, K, D] of one view, or of two."""
        state = torch.zeros_like(views[0][:, 0])
        for i in range(len(self.down_weight)):
            other = views[1][:, i] if len(views) == 2 else state
            layer = views[0][:, i]
            mixed = other + self.gate[i] * (layer - other) if self.gated else layer + other
            x = state + mixed if len(views) == 2 else mixed
            hidden = self.activation(F.linear(x, self.down_weight[i], self.down_bias[i]))
            state = x + F.linear(hidden, self.up_weight[i], self.up_bias[i])
        return F.linear(state, self.projection)


def _constant(tensor: Tensor) -> nn.Parameter:
    """Return a copy of a weight on the host that is not trained."""
    return nn.Parameter(tensor.detach().cpu().clone(), requires_grad=False)
