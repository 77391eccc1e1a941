"""The public ops: each checks its arguments, chooses a form (`dispatch.py`) and runs it.

The import needs neither Triton nor a compiler. The first op that runs by such a form needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_chains, check_loss, check_moments, check_ranks, check_sequences, check_top, check_towers
from .cpu import adam as adam_cpu
from .cpu import fold_heads as fold_heads_cpu
from .cpu import inbatch_cross_entropy as inbatch_cross_entropy_cpu
from .cpu import sequence_encoder as sequence_encoder_cpu
from .cpu import side_towers as side_towers_cpu
from .cpu import step as step_cpu
from .cpu import target_rank as target_rank_cpu
from .cpu import top_items as top_items_cpu
from .cpu.adam import AdamUpdate
from .cpu.library import why_no_library
from .cpu.step import CpuStep
from .dispatch import CPU, GPU, REFERENCE, choose, named_form, report, why_not_by_triton
from .reference import fold_heads as fold_heads_reference
from .reference import inbatch_cross_entropy as inbatch_cross_entropy_reference
from .reference import sequence_encoder as sequence_encoder_reference
from .reference import side_towers as side_towers_reference
from .reference import target_rank as target_rank_reference
from .reference import top_items as top_items_reference
from .types import (
    AdamState,
    AddedScores,
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

STEP_OPS = ("fold_heads", "side_towers", "sequence_encoder", "inbatch_cross_entropy", "adam")  # names in the log


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
    form: str = "auto",
) -> list[Tensor]:
    """Return the output of each tower of a side network (IISAN, equations 2-4).

    All towers have K layers, bottleneck R and width D. A tower reads one view or both. Its state s starts at 0. With
    SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), layer k computes
        over one view:   s = SANB_k(g_k h_k + (1 - g_k) s)
        over two views:  s = SANB_k(s + g_k first_k + (1 - g_k) second_k)
    Without gates all weights are 1.

    Args:
        states: one or two views; each has a table [M, K, D], read in order or by row number.
        towers: the parameters of 1 to 32 towers.
        activation: "relu" or "gelu".
        projections: one matrix [d, D] for each tower, which multiplies its output; None for none.
        form: "auto", "reference", "gpu" or "cpu".

    Returns one tensor for each tower, in the weights' dtype: [N, D], or [N, d] with projections. It is differentiable
    in the parameters, the projections and the tables that are read in order. The gpu form multiplies bf16 and fp16
    tables in their dtype and accumulates in fp32; torch.set_float32_matmul_precision applies to fp32 tables. Other
    forms compute in the weights' dtype. Raises ValueError for arguments that do not fit, FormError (a ValueError) if
    the named form cannot run.
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
    """Multiply the three linear maps of each chain; return one weight [d, D] and bias [d] for each chain.

    weight = outer middle inner; bias = outer (middle inner_bias + middle_bias). Both are differentiable in all weights.
    The cpu form is differentiable once, and `auto` takes it only if a backward may follow. Raises ValueError if the
    shapes of a chain do not fit, FormError if the named form cannot run.
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

    With t = <q, e_target> - log p_target, the loss of a row is log Z - t, where
    Z = exp(t) + sum over the items v outside the user's history of exp(<q, e_v> + log m_v - log p_v).

    Args:
        queries: [R, d].
        items: [V, d], the vectors of the distinct items.
        targets: int64 [R], indices of items.
        row_users: int64 [R], the row of history_bits that holds the mask of each query.
        history_bits: int32 [B, ceil(V / 32)]; bit v % 32 of word v // 32 is set where item v is in the user's history.
            The target counts once, whether its bit is set or not. Without row_users and history_bits nothing is masked.
        log_multiplicity: [V], log m, how often each item occurs in the batch; 0 where None.
        log_popularity: [V], log p; 0 where None.
        reduction: "mean" returns a scalar, "none" the loss of each row [R].
        form: "auto", "reference", "gpu" or "cpu".

    The gpu form returns fp32 and stores no logits. The result is differentiable in queries and items. Raises ValueError
    for arguments that do not fit, FormError if the named form cannot run.
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
    """Return SASRec's hidden states [R, d], one for each row of right-aligned histories.

    Args:
        x: [R, d], the item vectors of all histories, one after the other.
        weights: in the dtype of x; d is a multiple of their number of heads.
        grid: the user and position of each row.
        dropout: one step's dropout, as `sequence_dropout` makes it; None for none.
        form: "auto", "reference", "gpu" or "cpu".

    Row r attends to the rows of its user up to itself. The result is differentiable in x and the weights; in the cpu
    and gpu forms once. The gpu form multiplies in the dtype of x and accumulates in fp32. Raises ValueError for
    arguments that do not fit, FormError if the named form cannot run.
    """
    check_sequences(x, weights, grid, dropout)
    refusals = {CPU: lambda: sequence_encoder_cpu.refusal(weights), GPU: lambda: _gpu_sequence_refusal(weights)}
    chosen = choose("sequence_encoder", form, [x], refusals)
    return _sequence_module(chosen).sequence_encoder(x, weights, grid, dropout)


def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid, form: str = "auto") -> Tensor:
    """Return SASRec's hidden state [users, d] at the end of each user's history, without dropout.

    Takes x, weights and grid as `sequence_encoder` does; every user of the grid has at least one row. The cpu and gpu
    forms have no gradients, so they are not taken where a backward may follow. Raises ValueError for arguments that do
    not fit, FormError if the named form cannot run.
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
    """Return why `cpu_step` cannot train these weights in this form, or "" if it can.

    Compiles the C++ if it is not in the cache. Raises FormError if `form` or IISAN_FAST_FORM is not the name of a form.
    """
    source, name = named_form(form)
    if name not in ("auto", CPU):
        return f"{source} names {name}"
    return step_cpu.refusal(weights) or why_no_library()


def cpu_step(tensors: StepTensors, batch: RecommenderBatch, least: tuple[int, int, int] = (0, 0, 0)) -> CpuStep:
    """Return the ops of a training step in C++, with memory for batches one eighth larger than this one.

    Args:
        tensors: the weights, for which `step_refusal` returns "", and the buffers that the step writes.
        batch: the first batch.
        least: the numbers of items, of rows and of items with states that the memory must at least hold.

    Raises ValueError if the tensors do not fit together, or the batch does not fit them.
    """
    for op in STEP_OPS:
        report(op, CPU)
    return CpuStep(tensors, batch, least)


def gpu_step_refusal(weights: RecommenderWeights, products: torch.dtype, form: str = "auto") -> str:
    """Return why `gpu_step` cannot train these weights with matrix products in a dtype, or "" if it can.

    Raises FormError if `form` or IISAN_FAST_FORM is not the name of a form.
    """
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
    """Return the ops of a training step in Triton, with all their memory.

    Takes the arguments of `GpuStep`. `gpu_step_refusal` must return "" for the weights. Raises ValueError for sizes
    that no kernel takes, and for weights that are not views of flat buffers.
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
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rank of each target: 1 + items that score higher + tie_share times the other items that tie.

    Args:
        queries: [U, d]; the score of an item is its dot product with the query, plus what `added` has for the item.
        items: [N, d].
        targets: int64 [U], row numbers of items.
        excluded: int64 [U, H], row numbers of the items to leave out of each ranking; -1 stands for no item.
        tie_share: 0.5 counts half of the ties, 0 none, 1 all.
        chunk_elements: how many scores are in memory at once. The gpu form stores no scores and ignores it.
        form: "auto", "reference", "gpu" or "cpu".
        added: added to the scores of a few items of each user, in one rounded addition: in the dtype of the queries,
            in the gpu form in fp32. None adds nothing.

    Returns two float64 [U]: the rank without the excluded items, infinite if the target is excluded, and the rank among
    all items. Both are NaN for a user with a score that is not finite. Raises ValueError for arguments that do not fit,
    FormError if the named form cannot run.
    """
    check_ranks(queries, items, targets, excluded, added)
    chosen = choose("target_rank", form, [queries, items], {})
    if chosen == GPU:
        from .gpu import target_rank as target_rank_gpu

        return target_rank_gpu.target_rank(queries, items, targets, excluded, tie_share, added)
    module = target_rank_reference if chosen == REFERENCE else target_rank_cpu
    return module.target_rank(queries, items, targets, excluded, tie_share, chunk_elements, added)


def top_items(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None = None,
    chunk_elements: int = 1 << 24,
    form: str = "auto",
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best items of each user by falling score; of equal scores the item with the lower row comes first.

    Args:
        queries: [U, d]; the score of an item is its dot product with the query, plus what `added` has for the item.
        items: [N, d].
        count: K, the items to return for each user, at least 1.
        excluded: int64 [U, H], row numbers of the items to leave out; -1 stands for no item.
        allowed: bool [N], the items that may be returned; None allows all.
        chunk_elements: how many scores are in memory at once. The gpu form stores no scores and ignores it.
        form: "auto", "reference", "gpu" or "cpu".
        added: added to the scores of a few items of each user, in one rounded addition: in the dtype of the queries,
            in the gpu form in fp32. None adds nothing.

    Returns int64 [U, K], row numbers of items, and their scores [U, K] in the dtype of the queries. A user with fewer
    items left has -1 and minus infinity behind them. A user with a score that is not finite, of whatever item, has -1
    and NaN everywhere. The gpu form orders the items by fp32 scores, and rounds them at the end. Raises ValueError for
    arguments that do not fit, FormError if the named form cannot run.
    """
    check_top(queries, items, count, excluded, allowed, added)
    refusals = {GPU: lambda: _gpu_top_refusal(count), CPU: lambda: top_items_cpu.refusal(queries)}
    chosen = choose("top_items", form, [queries, items], refusals)
    if chosen == GPU:
        from .gpu import top_items as top_items_gpu

        return top_items_gpu.top_items(queries, items, count, excluded, allowed, added)
    module = top_items_cpu if chosen == CPU else top_items_reference
    return module.top_items(queries, items, count, excluded, allowed, chunk_elements, added)


def adam(states: Sequence[AdamState], form: str = "auto") -> AdamUpdate | None:
    """Return a callable that takes Adam's step on these parameters in C++, or None if PyTorch's Adam has to do it.

    Raises ValueError if a moment has another shape than its parameter, FormError if the named form cannot run.
    """
    check_moments(states)
    if not states:
        return None
    chosen = choose("adam", form, [states[0].parameter], {CPU: lambda: adam_cpu.refusal(states)})
    return adam_cpu.adam(states) if chosen == CPU else None


def _trained(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if gradients are recorded and a tensor requires one."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _gpu_sequence_refusal(weights: SequenceWeights) -> str:
    """Return why the gpu form of SASRec does not take these weights, or ""."""
    from .gpu import sequence_encoder as sequence_encoder_gpu

    return sequence_encoder_gpu.refusal(weights, len(weights.tensors[0]))


def _gpu_top_refusal(count: int) -> str:
    """Return why the gpu form does not return so many items, or ""."""
    from .gpu import top_items as top_items_gpu

    return top_items_gpu.refusal(count)


def _sequence_module(form: str) -> ModuleType:
    """Return the module with `sequence_encoder` and `last_states` in a form."""
    if form == GPU:
        from .gpu import sequence_encoder_grids

        return sequence_encoder_grids
    return sequence_encoder_cpu if form == CPU else sequence_encoder_reference
