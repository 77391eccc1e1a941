"""The public ops: arguments checked, a form chosen (`dispatch.py`), and run.

Importing this needs no Triton and no compiler; the first op that they run asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_chains, check_loss, check_moments, check_ranks, check_sequences, check_towers
from .cpu import adam as adam_cpu
from .cpu import fold_heads as fold_heads_cpu
from .cpu import inbatch_cross_entropy as inbatch_cross_entropy_cpu
from .cpu import sequence_encoder as sequence_encoder_cpu
from .cpu import side_towers as side_towers_cpu
from .cpu import step as step_cpu
from .cpu import target_rank as target_rank_cpu
from .cpu.adam import AdamUpdate
from .cpu.library import why_no_library
from .cpu.step import CpuStep
from .cpu.step_batch import check_step_batch
from .dispatch import CPU, GPU, REFERENCE, choose, named_form, report, why_not_by_triton
from .reference import fold_heads as fold_heads_reference
from .reference import inbatch_cross_entropy as inbatch_cross_entropy_reference
from .reference import sequence_encoder as sequence_encoder_reference
from .reference import side_towers as side_towers_reference
from .reference import target_rank as target_rank_reference
from .types import (
    AdamState,
    Chain,
    RecommenderBatch,
    RecommenderWeights,
    SequenceDropout,
    SequenceGrid,
    SequenceWeights,
    States,
    StepShape,
    StepTensors,
    Tower,
)

if TYPE_CHECKING:
    from .gpu.step import GpuStep

STEP_OPS = ("fold_heads", "side_towers", "sequence_encoder", "inbatch_cross_entropy", "adam")  # as the log names them


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
    form: str = "auto",
) -> list[Tensor]:
    """Return the outputs of a side network's towers, all of one shape (K, R, D), each over one or both of the views.

    SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), from s = 0 (IISAN, equations 2-4):
    one view: s = SANB_k(g_k h_k + (1 - g_k) s); both: s = SANB_k(s + g_k first_k + (1 - g_k) second_k).

    Args: states: one or two views, tables [M, K, D] read by row; towers: their parameters; activation "relu" or "gelu".
    By gpu, tables of bf16 or fp16 are multiplied in their dtype and added up in fp32; fp32 as
    torch.set_float32_matmul_precision says. Elsewhere all is computed in the weights' dtype. Returns [N, D] a tower, or
    [N, d] by projections [d, D], one a tower; in the weights' dtype, differentiable in the parameters and in views read
    in order. Raises ValueError for bad arguments.
    """
    check_towers(states, towers, activation, projections)
    tensors = [view.table for view in states] + [towers[0].down_weight]
    trained = _trained([*tensors, *(weight for tower in towers for weight in tower[1:]), *(projections or ())])
    refusals = {CPU: lambda: side_towers_cpu.refusal(towers[0], projections, trained)}
    chosen = choose("side_towers", form, tensors, refusals)
    if chosen == GPU:
        from .gpu import side_towers as side_towers_gpu

        return side_towers_gpu.side_towers(states, towers, activation, projections)
    if chosen == CPU:
        run = side_towers_cpu.side_towers if trained else side_towers_cpu.encode
        return run(states, towers, activation, projections)
    return side_towers_reference.side_towers(states, towers, activation, projections)


def fold_heads(chains: Sequence[Chain], form: str = "auto") -> list[tuple[Tensor, Tensor]]:
    """Return the weight [d, D] and the bias [d] of the one map that equals each chain of three.

    The form for a CPU is differentiable once; `auto` takes it only if a backward may follow. Raises ValueError if maps
    do not fit.
    """
    check_chains(chains)
    if not chains:
        return []
    weights = [weight for chain in chains for weight in chain]
    refusals = {CPU: lambda: fold_heads_cpu.refusal(chains)}
    chosen = choose("fold_heads", form, weights, refusals, candidates=None if _trained(weights) else ())
    module = fold_heads_cpu if chosen == CPU else fold_heads_reference
    return module.fold_heads(chains)


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None = None,
    history_bits: Tensor | None = None,
    log_multiplicity: Tensor | None = None,
    log_popularity: Tensor | None = None,
    reduction: str = "mean",
    form: str = "auto",
) -> Tensor:
    """Return the debiased in-batch cross-entropy over the distinct items of a batch (IISAN, equation 5).

    t = <q, e_target> - log p_target; Z(row) = exp(t) + sum over v not in the user's items of
    exp(<q, e_v> + log m_v - log p_v); the loss of a row is log Z - t.

    Args: queries [R, d]; items [V, d]; targets int64 [R], indices of items; row_users int64 [R], rows of history_bits;
    history_bits int32 [B, ceil(V / 32)], bit v set where item v is in the user's history (without these two nothing is
    masked); log_multiplicity, log_popularity [V], zero where None; reduction "mean" gives a scalar, "none" the loss of
    each row [R]. By gpu the losses are fp32 and no logit is stored. Raises ValueError for bad arguments.
    """
    check_loss(queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected mean or none, found {reduction!r}")
    refusals = {CPU: lambda: inbatch_cross_entropy_cpu.refusal(queries, items, log_multiplicity, log_popularity)}
    chosen = choose("inbatch_cross_entropy", form, [queries, items], refusals)
    if chosen == GPU:
        from .gpu import inbatch_cross_entropy as module
    else:
        module = inbatch_cross_entropy_cpu if chosen == CPU else inbatch_cross_entropy_reference
    losses = module.inbatch_cross_entropy(
        queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity
    )
    return losses.mean() if reduction == "mean" else losses


def sequence_encoder(
    x: Tensor,
    weights: SequenceWeights,
    grid: SequenceGrid,
    dropout: SequenceDropout | None = None,
    form: str = "auto",
) -> Tensor:
    """Return SASRec's states [R, d] after each of the rows x [R, d] of right-aligned histories.

    The forms for a CPU and a GPU are differentiable once. By gpu, products are in the dtype of x and added up in fp32.
    Raises ValueError for bad arguments.
    """
    check_sequences(x, weights, grid, dropout)
    refusals = {CPU: lambda: sequence_encoder_cpu.refusal(weights), GPU: lambda: _gpu_sequence_refusal(weights)}
    chosen = choose("sequence_encoder", form, [x], refusals)
    return _sequence_module(chosen).sequence_encoder(x, weights, grid, dropout)


def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid, form: str = "auto") -> Tensor:
    """Return SASRec's state after each user's whole history, [users, d], without dropout.

    Every history holds an item. The forms for a CPU and a GPU have no gradients. Raises ValueError for bad arguments.
    """
    check_sequences(x, weights, grid)
    trained = "it has no gradients" if _trained([x, *weights.tensors]) else ""
    refusals = {
        CPU: lambda: trained or sequence_encoder_cpu.refusal(weights),
        GPU: lambda: trained or _gpu_sequence_refusal(weights),
    }
    chosen = choose("last_states", form, [x], refusals)
    return _sequence_module(chosen).last_states(x, weights, grid)


def step_refusal(weights: RecommenderWeights, form: str = "auto") -> str:
    """Return why `cpu_step` does not take a recommender's weights, or "". Compiles the C++ if need be."""
    source, name = named_form(form)
    if name not in ("auto", CPU):
        return f"{source} names {name}"
    return step_cpu.refusal(weights) or why_no_library()


def cpu_step(tensors: StepTensors, batch: RecommenderBatch, least: tuple[int, int] = (0, 0)) -> CpuStep:
    """Return a training step's ops by C++, with memory for batches up to the size of this one and a little more.

    least: items and rows that there must be memory for. Raises ValueError for a batch that does not fit the weights,
    which `step_refusal` does not refuse.
    """
    check_step_batch(batch, tensors.weights)
    for op in STEP_OPS:
        report(op, CPU)
    return CpuStep(tensors, batch, least)


def gpu_step_refusal(weights: RecommenderWeights, products: torch.dtype, form: str = "auto") -> str:
    """Return why `gpu_step` does not take a recommender's weights with matrix products in a dtype, or ""."""
    source, name = named_form(form)
    if name not in ("auto", GPU):
        return f"{source} names {name}"
    if reason := why_not_by_triton(weights.fusion.device.type, ()):
        return reason
    from .gpu import step as step_gpu

    return step_gpu.refusal(weights, products)


def gpu_step(
    tensors: StepTensors,
    shape: StepShape,
    tables: Sequence[Tensor],
    log_popularity: Tensor,
    window_batches: int,
    dropout: float,
    reads_by_number: bool = True,
) -> GpuStep:
    """Return a training step's ops by Triton with all their memory, for weights that `gpu_step_refusal` lets pass.

    Args: as `GpuStep` takes them.
    """
    from .gpu.step import GpuStep

    if tensors.loss.device.type != "meta":  # where the step is counted, nothing runs
        for op in STEP_OPS:
            report(op, GPU)
    return GpuStep(tensors, shape, tables, log_popularity, window_batches, dropout, reads_by_number)


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the rank of each target: 1 + items that score higher + tie_share of the others that tie.

    The result is float64 [U] twice: among the items that are not excluded (infinity for a target that is itself
    excluded), and among all items. A row with any non-finite score has rank NaN in both.

    Args: queries [U, d]; items [N, d]; targets int64 [U], row numbers of items; excluded int64 [U, H], items left
    out of each ranking, -1 for none; chunk_elements bounds the scores held at a time (by gpu none are). Raises
    ValueError for bad arguments.
    """
    check_ranks(queries, items, targets, excluded)
    chosen = choose("target_rank", form, [queries, items], {})
    if chosen == GPU:
        from .gpu import target_rank as target_rank_gpu

        return target_rank_gpu.target_rank(queries, items, targets, excluded, tie_share)
    module = target_rank_reference if chosen == REFERENCE else target_rank_cpu
    return module.target_rank(queries, items, targets, excluded, tie_share, chunk_elements)


def adam(states: Sequence[AdamState], form: str = "auto") -> AdamUpdate | None:
    """Return Adam's update of these parameters, or None where PyTorch's own has to do it.

    Raises ValueError for moments that are not shaped as their parameter.
    """
    check_moments(states)
    if not states:
        return None
    chosen = choose("adam", form, [states[0].parameter], {CPU: lambda: adam_cpu.refusal(states)})
    return adam_cpu.adam(states) if chosen == CPU else None


def _trained(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if a backward may follow."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _gpu_sequence_refusal(weights: SequenceWeights) -> str:
    from .gpu import sequence_encoder as sequence_encoder_gpu

    return sequence_encoder_gpu.refusal(weights, len(weights.tensors[0]))


def _sequence_module(form: str) -> ModuleType:
    """Return the module of a form of SASRec."""
    if form == GPU:
        from .gpu import sequence_encoder_grids

        return sequence_encoder_grids
    return sequence_encoder_cpu if form == CPU else sequence_encoder_reference
