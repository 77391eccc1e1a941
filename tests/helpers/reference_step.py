"""A second implementation of the whole training step, as literal as possible: padded slots, each encoded alone; loops.

It shares no code with the library: parameters come as a dictionary of named tensors, sequences as lists of
item numbers. Whatever form the library gives the step (jagged, deduplicated, padded, fused, on several
ranks), its loss and its gradients must be those of `reference_loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 0
GATE_TEMPERATURE = 0.1
LAYER_NORM_EPS = 1e-6
MASKED_SCORE = -1e9  # finite, so that a padded query, which may see no key at all, gives no NaN

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class ReferenceSettings:
    """The settings of a model. method: "iisan" or "iisan-versa". activation: "relu" or "gelu"."""

    embedding_dim: int
    max_inputs: int = 10
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.1
    seed: int = 0
    method: str = "iisan"
    activation: str = "relu"
    gates: bool = True
    intra: bool = True
    inter: bool = True


def reference_loss(
    parameters: Parameters,
    settings: ReferenceSettings,
    first: Tensor,
    second: Tensor | None,
    sequences: list[list[int]],
    users: list[int],
    popularity: Tensor,
    step: int,
) -> Tensor:
    """Return the mean debiased in-batch cross-entropy of a batch of users, a scalar in the dtype of the parameters.

    parameters: by the names of the model's state dict; first, second: hidden states of the whole catalogue
    [items + 1, K, D], row 0 being padding, `second` None for one view; sequences: the users' training
    sequences of item numbers, oldest first, of 2 to max_inputs + 1 items; users: their numbers, which with
    `step` decide the dropout; popularity: p(i), [items + 1].

    Raises ValueError for a sequence that does not fit its slots and for heads that are not the method's.
    """
    dtype = parameters["sequence_encoder.position"].dtype
    slots = [padded_slots(sequence, settings.max_inputs) for sequence in sequences]
    occurrences = torch.tensor([item for row in slots for item in row])
    views = [view[occurrences].to(dtype) for view in (first, second) if view is not None]
    vectors = item_vectors(parameters, settings, views).unflatten(0, (len(slots), settings.max_inputs + 1))
    states = [
        sequence_states(parameters, settings, vectors[i, :-1], slots[i][:-1], Dropout(settings, step, user))
        for i, user in enumerate(users)
    ]
    return in_batch_cross_entropy(slots, vectors, states, popularity.to(dtype))


def padded_slots(sequence: list[int], max_inputs: int) -> list[int]:
    """Return the max_inputs + 1 slots of a user, with the sequence at their right end."""
    if not 2 <= len(sequence) <= max_inputs + 1:
        raise ValueError(f"a training sequence has 2 to {max_inputs + 1} items, not {len(sequence)}")
    return [PADDING] * (max_inputs + 1 - len(sequence)) + list(sequence)


# ---- side network ------------------------------------------------------------------------------------------


def item_vectors(parameters: Parameters, settings: ReferenceSettings, views: list[Tensor]) -> Tensor:
    """Return item vectors [N, d] of one or two views [N, K, D]: towers, two linear maps each, concatenation, fusion."""
    towers = {}
    if settings.intra:
        towers["first"] = intra_tower(parameters, settings, "first", views[0])
    if settings.intra and len(views) == 2:
        towers["second"] = intra_tower(parameters, settings, "second", views[1])
    if settings.inter and len(views) == 2:
        towers["inter"] = inter_tower(parameters, settings, *aligned_pairs(parameters, *views))
    heads = []
    for name, state in towers.items():
        require_head_shapes(parameters, settings, name)
        heads.append(linear(parameters, f"heads.{name}.1", linear(parameters, f"heads.{name}.0", state)))
    return linear(parameters, "heads.fusion", torch.cat(heads, dim=-1))


def require_head_shapes(parameters: Parameters, settings: ReferenceSettings, name: str) -> None:
    """Raise ValueError unless a head's first map is D -> d in Versa's intra heads and D -> D in all others."""
    rows, width = parameters[f"heads.{name}.0.weight"].shape
    expected = settings.embedding_dim if settings.method == "iisan-versa" and name != "inter" else width
    if rows != expected:
        raise ValueError(f"heads.{name}.0 of {settings.method} must give {expected} coordinates, not {rows}")


def intra_tower(parameters: Parameters, settings: ReferenceSettings, name: str, view: Tensor) -> Tensor:
    """Return s = SANB_i( g_i h_i + (1 - g_i) s ), s starting at 0: [N, K, D] -> [N, D]."""
    state = torch.zeros_like(view[:, 0])
    for layer in range(view.shape[1]):
        mixed = gated(parameters, settings, name, layer, view[:, layer], state)
        state = sanb(parameters, settings, name, layer, mixed)
    return state


def inter_tower(parameters: Parameters, settings: ReferenceSettings, first: Tensor, second: Tensor) -> Tensor:
    """Return s = SANB_i( s + b_i h_i^first + (1 - b_i) h_i^second ), s starting at 0: two [N, K, D] -> [N, D]."""
    state = torch.zeros_like(first[:, 0])
    for layer in range(first.shape[1]):
        mixed = state + gated(parameters, settings, "inter", layer, first[:, layer], second[:, layer])
        state = sanb(parameters, settings, "inter", layer, mixed)
    return state


def aligned_pairs(parameters: Parameters, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last layers that both views have, with the wider view mapped to the narrower width layer by layer."""
    pairs = min(first.shape[1], second.shape[1])
    first, second = first[:, -pairs:], second[:, -pairs:]
    if first.shape[2] > second.shape[2]:
        first = narrowed(parameters, first)
    elif second.shape[2] > first.shape[2]:
        second = narrowed(parameters, second)
    return first, second


def narrowed(parameters: Parameters, view: Tensor) -> Tensor:
    weight, bias = parameters["side_network.align_weight"], parameters["side_network.align_bias"]
    layers = [view[:, layer] @ weight[layer].T + bias[layer] for layer in range(view.shape[1])]
    return torch.stack(layers, dim=1)


def gated(
    parameters: Parameters, settings: ReferenceSettings, tower: str, layer: int, one: Tensor, other: Tensor
) -> Tensor:
    """Return g one + (1 - g) other with g = sigmoid(theta / 0.1); without gates the sum."""
    if not settings.gates:
        return one + other
    gate = torch.sigmoid(parameters[f"side_network.{tower}.gate"][layer] / GATE_TEMPERATURE)
    return gate * one + (1 - gate) * other


def sanb(parameters: Parameters, settings: ReferenceSettings, tower: str, layer: int, x: Tensor) -> Tensor:
    """Return x + W_up act(W_down x + b_down) + b_up."""
    name = f"side_network.{tower}"
    down_weight, down_bias = (parameters[f"{name}.down_{part}"][layer] for part in ("weight", "bias"))
    up_weight, up_bias = (parameters[f"{name}.up_{part}"][layer] for part in ("weight", "bias"))
    activation = {"relu": functional.relu, "gelu": functional.gelu}[settings.activation]
    return x + activation(x @ down_weight.T + down_bias) @ up_weight.T + up_bias


# ---- sequence encoder --------------------------------------------------------------------------------------


def sequence_states(
    parameters: Parameters, settings: ReferenceSettings, vectors: Tensor, items: list[int], dropout: Dropout
) -> Tensor:
    """Return the states [max_inputs, d] after each slot of one user, from its item vectors [max_inputs, d]."""
    x = layer_norm(parameters, "sequence_encoder.norm", vectors + parameters["sequence_encoder.position"])
    x = dropout(x, site=0)
    for block in range(settings.blocks):
        name = f"sequence_encoder.blocks.{block}"
        site = 1 + 3 * block
        attended = attention(parameters, settings, name, x, items, dropout, site)
        x = layer_norm(parameters, f"{name}.attention_norm", x + dropout(attended, site + 1))
        inner = functional.relu(linear(parameters, f"{name}.feed_in", x))
        fed = linear(parameters, f"{name}.feed_out", inner)
        x = layer_norm(parameters, f"{name}.feed_norm", x + dropout(fed, site + 2))
    return x


def attention(
    parameters: Parameters,
    settings: ReferenceSettings,
    name: str,
    x: Tensor,
    items: list[int],
    dropout: Dropout,
    site: int,
) -> Tensor:
    """Return causal attention [max_inputs, d] among one user's slots; padding is masked."""
    query, key, value = (x @ parameters[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
    slots = len(items)
    width = settings.embedding_dim // settings.heads
    contexts = []
    for slot in range(slots):
        unseen = torch.tensor([other > slot or items[other] == PADDING for other in range(slots)])
        context = []
        for head in range(settings.heads):
            part = slice(head * width, (head + 1) * width)
            scores = (key[:, part] @ query[slot, part] / math.sqrt(width)).masked_fill(unseen, MASKED_SCORE)
            factors = dropout.factors(site, slot, range(head * slots, (head + 1) * slots))
            context.append((scores.softmax(dim=0) * x.new_tensor(factors)) @ value[:, part])
        contexts.append(torch.cat(context))
    return torch.stack(contexts) @ parameters[f"{name}.output.weight"].T


def layer_norm(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normalised = centred / (variance + LAYER_NORM_EPS).sqrt()
    return normalised * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


# ---- stateless dropout -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropout:
    """One user's dropout in one step, by a hash of (seed, step, site, user, position, channel)."""

    settings: ReferenceSettings
    step: int
    user: int

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """Return x [slots, channels] with elements dropped or scaled."""
        slots, channels = x.shape
        return x * x.new_tensor([self.factors(site, slot, range(channels)) for slot in range(slots)])

    def factors(self, site: int, position: int, channels: range) -> list[float]:
        """Return a factor for each channel: 0 if it is dropped, else 1 / (1 - rate)."""
        rate = self.settings.dropout
        threshold = round(rate * 2**32)
        scale = 1 / (1 - rate)
        prefix = hashed(self.settings.seed, self.step, site, self.user, position)
        return [scale if absorb(prefix, channel) >= threshold else 0.0 for channel in channels]


def hashed(seed: int, *fields: int) -> int:
    """Return the 32-bit hash of a seed and the fields after it, in order."""
    return reduce(absorb, fields, mix(seed % 2**32))


def absorb(state: int, field: int) -> int:
    return mix(state ^ (field * 0x9E3779B1 % 2**32))


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ (h >> 16)


# ---- loss --------------------------------------------------------------------------------------------------


def in_batch_cross_entropy(slots: list[list[int]], vectors: Tensor, states: list[Tensor], popularity: Tensor) -> Tensor:
    """Return the dense loss: a row for each slot with a next item, a column for each real slot, with multiplicity.

    logit = <q, e> - log p(item). A row does not see the columns whose item occurs anywhere in its own user's
    sequence, but for its target's slot. slots: [B][max_inputs + 1]; vectors: [B, max_inputs + 1, d];
    states: B of [max_inputs, d].
    """
    columns = [(user, slot) for user, row in enumerate(slots) for slot, item in enumerate(row) if item != PADDING]
    items = [slots[user][slot] for user, slot in columns]
    column_vectors = torch.stack([vectors[user, slot] for user, slot in columns])
    log_popularity = popularity[torch.tensor(items)].log()
    losses = []
    for user, row in enumerate(slots):
        for slot in range(len(row) - 1):
            if row[slot] == PADDING:
                continue
            target = columns.index((user, slot + 1))
            counted = [column for column, item in enumerate(items) if column == target or item not in row]
            logits = column_vectors @ states[user][slot] - log_popularity
            losses.append(logits[counted].logsumexp(dim=0) - logits[target])
    return torch.stack(losses).mean()
