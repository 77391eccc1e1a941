"""The public ops: arguments checked, a backend chosen: the reference ("torch"), its CPU forms in PyTorch ("host") or
in C++ ("native"), or Triton.

Importing this needs no Triton and no compiler; the first op that they run asks for them.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import check_chains, check_loss, check_ranks, check_sequences, check_towers
from .cpu import (
    adam as adam_native,
)
from .cpu import (
    fold_heads as fold_native,
)
from .cpu import (
    fold_heads_torch as fold_host,
)
from .cpu import (
    inbatch_cross_entropy as cross_entropy_native,
)
from .cpu import (
    sequence_encoder as sequence_encoder_native,
)
from .cpu import (
    side_towers as side_network_native,
)
from .cpu import (
    side_towers_torch as side_network_host,
)
from .cpu import (
    target_rank as rank_host,
)
from .cpu.adam import AdamState, AdamUpdate
from .cpu.library import why_not
from .cpu.sequence_encoder import SequenceDropout, SequenceGrid, SequenceWeights
from .cpu.whole_step import RecommenderGradients
from .cpu.whole_step_plan import RecommenderBatch, RecommenderWeights
from .reference import Chain, States, Tower

BACKEND_VARIABLE = "IISAN_FAST_BACKEND"
BACKENDS = ("auto", "torch", "host", "native", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger("iisan_fast.kernels")


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """The towers of a side network, all of one shape (K, R, D), each over one or both of the views.

    SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), from s = 0 (IISAN, equations 2-4):
    one view: s = SANB_k(g_k h_k + (1 - g_k) s); both: s = SANB_k(s + g_k first_k + (1 - g_k) second_k).

    Args: states: one or two views, tables [M, K, D] read by row; towers: their parameters, shaped as
    `reference.side_tower` says; activation "relu" or "gelu". By Triton, tables of bf16 or fp16 are multiplied in their
    dtype and added up in fp32; fp32 as torch.set_float32_matmul_precision says. Elsewhere all is computed in the
    weights' dtype. Returns [N, D] a tower, or [N, d] by projections [d, D], one a tower; in the weights' dtype,
    differentiable in the parameters and in views read in order.
    Raises ValueError for bad arguments.
    """
    check_towers(states, towers, activation, projections)
    tensors = [view.table for view in states] + [towers[0].down_weight]
    chosen = _backend("side_towers", backend, tensors)
    parameters = [*tensors, *(each for tower in towers for each in tower[1:]), *(projections or ())]
    trained = _trained(parameters)
    if chosen == "native" and side_network_native.takes(towers[0], projections, trained):
        form = side_network_native.side_towers if trained else side_network_native.encode
        return form(states, towers, activation, projections=projections)
    if chosen in ("host", "native"):
        return side_network_host.side_towers(states, towers, activation, projections)
    if chosen == "triton":
        from .gpu import side_towers as side_network

        outputs = side_network.side_towers(states, towers, activation)
        return outputs if projections is None else list(map(F.linear, outputs, projections))
    return reference.side_towers(states, towers, activation, projections)


def fold(chains: Sequence[Chain], backend: str = "auto") -> list[tuple[Tensor, Tensor]]:
    """The weight [d, D] and the bias [d] of the one map that each chain of three comes to.

    Plain products but for the CPU's forms, which are differentiable once. Raises ValueError where maps do not fit.
    """
    check_chains(chains)
    weights = [weight for chain in chains for weight in chain]
    chosen, trained = _choice("fold", backend, weights)[0], _trained(weights)
    if chosen == "native" and trained and fold_native.takes(chains):
        return fold_native.fold(chains)
    if chosen in ("host", "native") and trained:
        return fold_host.fold(chains)
    return list(map(reference.fold, chains))


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None = None,
    history_bits: Tensor | None = None,
    log_multiplicity: Tensor | None = None,
    log_popularity: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Debiased in-batch cross-entropy over the distinct items of a batch (IISAN, equation 5, duplicates merged).

    Arguments and formula as `reference.row_losses`; without row_users and history_bits nothing is masked, without
    log_popularity nothing is debiased. reduction "mean" gives a scalar, "none" the loss of each row [R]. By Triton
    the losses are fp32 and no logit is stored. Raises ValueError for bad arguments.
    """
    check_loss(queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected mean or none, found {reduction!r}")
    arguments = (queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity)
    chosen = _backend("inbatch_cross_entropy", backend, [queries, items])
    constants = (log_multiplicity, log_popularity)
    if chosen == "native" and _trained([queries, items]) and cross_entropy_native.takes(queries, items, *constants):
        losses = cross_entropy_native.row_losses(*arguments)
    elif chosen == "triton":
        from .gpu import inbatch_cross_entropy as cross_entropy

        losses = cross_entropy.row_losses(*arguments)
    else:
        losses = reference.row_losses(*arguments)
    return losses.mean() if reduction == "mean" else losses


def sequence_encoder(
    specification: Callable[[], Tensor],
    x: Tensor,
    weights: SequenceWeights,
    grid: SequenceGrid,
    dropout: Callable[[], SequenceDropout | None],
    backend: str = "auto",
) -> Tensor:
    """SASRec's states [R, d] after each of the rows x [R, d] of right-aligned histories.

    specification: the caller's own PyTorch, which computes the same; C++ takes its place where it is trained on a CPU,
    in fp32 or fp64 and in widths that are multiples of 16.
    """
    check_sequences(x, weights, grid)
    chosen = _backend("sequence_encoder", backend, [x])
    if chosen == "native" and _trained([x, *weights.tensors]) and sequence_encoder_native.takes(weights):
        return sequence_encoder_native.sequence_encoder(x, weights, grid, dropout())
    return specification()


def last_states(
    specification: Callable[[], Tensor], x: Tensor, weights: SequenceWeights, grid: SequenceGrid, backend: str = "auto"
) -> Tensor:
    """SASRec's states [users, d] after whole histories, each of which holds an item, without dropout.

    specification: as `sequence_encoder` takes it; C++ takes its place where no backward follows.
    """
    check_sequences(x, weights, grid)
    chosen = _backend("last_states", backend, [x])
    if chosen == "native" and not _trained([x, *weights.tensors]) and sequence_encoder_native.takes(weights):
        return sequence_encoder_native.last_states(x, weights, grid)
    return specification()


def recommender_gradients(
    op: RecommenderGradients,
    operands: Callable[[], tuple[RecommenderWeights, RecommenderBatch] | None],
    weight: Tensor,
    told: Callable[[Tensor], None] = lambda loss: None,
    backend: str = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """A side-network recommender's mean loss over a batch's rows, a scalar, and its weights with their gradients, by
    C++ on a CPU; None where the ops above and autograd are what there is.

    op: the model's own, which keeps memory; operands: what it takes, or None where the model has other parts; weight:
    any of the weights; `told` is called with the loss, the gradients being under way.
    """
    if _backend("recommender_gradients", backend, [weight]) != "native":
        return None
    found = operands()
    if found is None or not op.takes(*found):
        return None
    loss, gradients = op(*found, told)
    return loss, list(zip(found[0].tensors(), gradients))


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rank of each target in the full catalogue: 1 + items that score higher + tie_share of the others that tie.

    Arguments and results as `reference.target_rank`; Triton holds no scores, so chunk_elements bounds nothing there.
    Raises ValueError for bad arguments.
    """
    check_ranks(queries, items, targets, excluded)
    chosen = _backend("target_rank", backend, [queries, items])
    if chosen == "triton":
        from .gpu import target_rank as rank

        return rank.target_rank(queries, items, targets, excluded, tie_share)
    form = rank_host if chosen in ("host", "native") else reference
    return form.target_rank(queries, items, targets, excluded, tie_share, chunk_elements)


def adam_update(states: Sequence[AdamState], backend: str = "auto") -> AdamUpdate | None:
    """Adam's update of these parameters in C++, or None where PyTorch's own is what there is."""
    native = states and _choice("Adam", backend, [states[0].parameter])[0] == "native"
    return AdamUpdate(states) if native and adam_native.takes(states) else None


def backend_on(device: torch.device) -> str:
    """What runs the ops on a device. Raises ValueError where the backend that the environment names cannot."""
    return _choice("the kernels", "auto", [torch.empty(0, device=device)])[0]


def _trained(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _backend(op: str, backend: str, tensors: Sequence[Tensor]) -> str:
    """What runs this op: torch, host, native or triton; says so once."""
    chosen, reason = _choice(op, backend, tensors)
    if not torch.compiler.is_compiling():
        _report(chosen, tensors[0].device.type, reason)
    return chosen


def _choice(op: str, backend: str, tensors: Sequence[Tensor]) -> tuple[str, str]:
    """What runs this op, and why what is fastest there cannot. What was asked for by name is refused where it cannot
    run; "native" takes the forms in PyTorch for what has none in C++."""
    source = "backend"
    if backend == "auto" and (named := os.environ.get(BACKEND_VARIABLE)):
        source, backend = BACKEND_VARIABLE, named
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected {', '.join(BACKENDS)}, found {backend!r}")
    device = tensors[0].device.type
    if backend in ("host", "native") and device != "cpu":
        raise ValueError(f"{source}: {backend} needs CPU tensors, found {device}; use torch or triton")
    if backend == "native" and (reason := why_not()):
        raise ValueError(f"{source}: native cannot run {op}: {reason}; use host")
    if backend in ("torch", "host", "native"):
        return backend, ""
    if backend == "auto" and device == "cpu":
        if torch.compiler.is_compiling():
            return "torch", ""  # a compiler sees into the reference alone
        return ("host", reason) if (reason := why_not()) else ("native", "")
    unable = _why_not(device, tuple(tensor.dtype for tensor in tensors))
    if backend == "triton":
        if unable:
            raise ValueError(f"{source}: triton cannot run {op}: {unable}; use torch")
        return "triton", ""
    return ("triton", "") if device == "cuda" and not unable else ("torch", unable)


@functools.cache
def _why_not(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """What keeps Triton from running an op on these tensors, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), found {device}"
    if wrong := [dtype for dtype in dtypes if dtype not in TRITON_DTYPES]:
        return f"it needs float32, bfloat16 or float16, found {wrong[0]}".replace("torch.", "")
    return ""


@functools.cache
def _report(chosen: str, device: str, reason: str) -> None:
    """Says once what runs the ops."""
    log.info("kernels: %s on %s%s", chosen, device, f" ({reason})" if reason else "")
