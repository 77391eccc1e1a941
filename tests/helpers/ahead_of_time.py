"""Compile every kernel at every shipped launch configuration, for GPUs that the machine need not have.

Prints one JSON line for each kernel: shared memory, registers and spilled bytes, read from the compiled cubin. It runs
as a separate program, because under the interpreter, which other tests use, kernels are other objects.

    python tests/helpers/ahead_of_time.py [--dtype bfloat16] [--architecture 90] ...
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from flat_weights import flat_size, in_buffer, side_weights
from towers_on_meta import towers_on_meta

from iisan_fast.benchmarks import machine_code
from iisan_fast.kernels import FLAT_ALIGNMENT, AddedScores, Launch, RecommenderWeights, States, Tower
from iisan_fast.kernels.gpu import (
    adam,
    batch_selection,
    configurations,
    fold_heads,
    inbatch_cross_entropy,
    item_vector_gradients,
    loss_record,
    part_sums,
    projected_towers,
    score_tiles,
    sequence_encoder,
    side_towers,
    target_rank,
    top_items,
)
from iisan_fast.kernels.gpu.configurations import ANY_SIZE, Configuration
from iisan_fast.kernels.types import HEADER_WORDS, SequenceWeights, StepBatch, StepShape, TowerGradients

MODULES = (
    side_towers,
    projected_towers,
    inbatch_cross_entropy,
    item_vector_gradients,
    target_rank,
    top_items,
    score_tiles,
    fold_heads,
    sequence_encoder,
)
# modules whose kernels have one entry for all sizes
ONE_ENTRY = (batch_selection, loss_record, adam, part_sums, projected_towers)


def main() -> None:
    """Compile for the architectures named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--architecture", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kernel", default="", help="compile only kernels whose name holds this")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--embedding-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--appended", type=int, nargs="*", default=[192], help="more widths of the rank: with appended dimensions"
    )
    parser.add_argument(
        "--other-forms",
        action="store_true",
        help="one tower with GELU, no gates and a differentiable view, and the plain loss, instead of three gated ReLU "
        "towers over tables and the masked, debiased loss",
    )
    arguments = parser.parse_args()
    for architecture in arguments.architecture:
        compile_all(arguments, architecture)


def compile_all(arguments: argparse.Namespace, architecture: int) -> None:
    """Call the ops with a launcher that compiles for the architecture instead of launching."""
    compiled: set[tuple[Any, ...]] = set()
    device = f"sm_{architecture}"

    def configuration(kernel: str, rows: int, dtype: torch.dtype, _: torch.device, embedding_dim: int = 0):
        nonlocal size
        size = configurations.size_of(rows, dtype, embedding_dim)
        return configurations.table_entry(kernel, device, size)

    def only_configuration(kernel: str, _: torch.device):
        nonlocal size
        size = ANY_SIZE
        return configurations.table_entry(kernel, device, size)

    def compile_instead(kernel: Any, name: str, grid: Any, chosen: Configuration, *values: Any, **meta: Any):
        # the sequence encoder by halves of blocks, the towers in their two forms, Adam with what may be added, the rank
        # and the best items of rows of several widths and with added scores
        flags = ("ATTEND", "FEED", "END", "HEADS", "UP", "CLIPS", "ADDED", "CHUNKS", "BEST")
        variant = [str(meta.get(flag)) for flag in flags]
        variant += [str(meta["BD"])] if name.startswith(("target_rank", "top_items")) else []
        key = (name, size, bool(meta.get("TILE_ROWS")), *variant)  # the loss has two layouts of rows
        if key in compiled or arguments.kernel not in name:
            return
        compiled.add(key)
        report = compile_one(kernel, architecture, chosen, values, meta)
        line = {"kernel": name, "architecture": architecture, "size": size, "dtype": arguments.dtype}
        print(json.dumps(line | report), flush=True)

    for module in (*MODULES, *ONE_ENTRY):
        module.launch = compile_instead
    for module in MODULES:
        module.configuration = configuration
    for module in ONE_ENTRY:
        module.only_configuration = only_configuration
    dtype = getattr(torch, arguments.dtype)
    size = ANY_SIZE
    call_pairs_of_one_entry(dtype)
    for embedding_dim in arguments.embedding_dim:
        call_fold(arguments, embedding_dim, dtype)
    # Sizes of 64 and of 8,192 users of Scientific. None is a multiple of 16, for which Triton compiles a special case.
    batches = [(65, 245, 277), (8191, 30803, 12901)]
    for users, rows, items in batches[:1] if dtype == torch.float32 else batches:
        call_towers(arguments, items, dtype)
        call_projected_towers(arguments, items, dtype)
        for embedding_dim in arguments.embedding_dim:
            call_loss(rows, items, embedding_dim, dtype, plain=arguments.other_forms)
            call_loss_pairs(users, rows, items, embedding_dim, dtype)
            call_sequence_encoder(users, rows, embedding_dim, dtype)
        for width in (*arguments.embedding_dim, *arguments.appended):
            call_rank(users, items, width, dtype)
            call_top(users, items, width, dtype)


def call_towers(arguments: argparse.Namespace, items: int, dtype: torch.dtype) -> None:
    """Call the towers, forward and backward, on tensors without values."""
    layers = arguments.layers
    width = arguments.width
    bottleneck = arguments.bottleneck
    rows = torch.zeros(items, dtype=torch.int64)
    views = [States(torch.zeros(4, layers, width, dtype=dtype), rows) for _ in range(2)]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, requires_grad=True)

    if arguments.other_forms:
        views[1] = States(leaf(items, layers, width))
    towers = [
        Tower(
            reads,
            None if arguments.other_forms else leaf(layers),
            leaf(layers, bottleneck, width),
            leaf(layers, bottleneck),
            leaf(layers, width, bottleneck),
            leaf(layers, width),
        )
        for reads in ([(0, 1)] if arguments.other_forms else [(0,), (1,), (0, 1)])
    ]
    outputs = side_towers.side_towers(views, towers, "gelu" if arguments.other_forms else "relu")
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def call_projected_towers(arguments: argparse.Namespace, items: int, dtype: torch.dtype) -> None:
    """Call the towers' pair, forward and backward, on tensors without values."""
    rows, header = (torch.empty(size, dtype=torch.int32, device="meta") for size in (items, HEADER_WORDS))
    views = [(0,), (1,), (0, 1)]
    activation = "relu"
    if arguments.other_forms:
        views = [(0, 1)]
        activation = "gelu"
    sizes = (arguments.layers, arguments.width, arguments.bottleneck, arguments.embedding_dim[0])
    pair = towers_on_meta(rows, header, dtype, views, *sizes, activation)
    pair.forward()
    pair.backward()


def call_loss(rows: int, items: int, embedding_dim: int, dtype: torch.dtype, plain: bool) -> None:
    """Call the loss, forward and backward, on tensors without values."""
    queries = torch.zeros(rows, embedding_dim, dtype=dtype, requires_grad=True)
    vectors = torch.zeros(items, embedding_dim, dtype=dtype, requires_grad=True)
    zeros = torch.zeros(rows, dtype=torch.int64)
    bits = torch.zeros(16, -(-items // 32), dtype=torch.int32)
    log_values = torch.zeros(items)
    corrections = (None,) * 4 if plain else (zeros, bits, log_values, log_values)
    inbatch_cross_entropy.inbatch_cross_entropy(queries, vectors, zeros, *corrections).sum().backward()


def call_rank(users: int, items: int, width: int, dtype: torch.dtype) -> None:
    """Call the rank, without and with added scores, on tensors without values."""
    queries, vectors = (torch.zeros(count, width, dtype=dtype) for count in (users, items))
    zeros = torch.zeros(users, dtype=torch.int64)
    history = torch.zeros(users, 12, dtype=torch.int64)
    for added in (None, AddedScores(torch.arange(users + 1), zeros, torch.zeros(users, dtype=dtype))):
        target_rank.target_rank(queries, vectors, zeros, history, added=added)


def call_top(users: int, items: int, width: int, dtype: torch.dtype) -> None:
    """Call the best items, few without added scores and many with them, on tensors without values."""
    queries, vectors = (torch.zeros(count, width, dtype=dtype) for count in (users, items))
    history = torch.zeros(users, 12, dtype=torch.int64)
    added = AddedScores(torch.arange(users + 1), history[:, 0], torch.zeros(users, dtype=dtype))
    top_items.top_items(queries, vectors, 10, history)
    top_items.top_items(queries, vectors, top_items.MOST, history, torch.ones(items, dtype=torch.bool), added)


def call_loss_pairs(users: int, rows: int, items: int, embedding_dim: int, dtype: torch.dtype) -> None:
    """Call the loss of a packed batch and the gradient of its item vectors, on tensors without values."""
    tile_rows = 16
    shape = StepShape(users, -(-items // 32) * 32, -(-rows // tile_rows), tile_rows, positions=10)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    batch = StepBatch.of(empty(shape.starts()[-1], dtype=torch.int32), shape)
    states, vectors = (empty(size, embedding_dim, dtype=dtype) for size in (shape.rows, shape.distinct))
    columns = empty(shape.distinct), empty(shape.distinct)
    loss = inbatch_cross_entropy.InbatchCrossEntropy(states, vectors, batch, *columns, shape, dtype)
    loss.forward()
    loss.backward()
    item_vector_gradients.ItemVectorGradients(loss, empty(shape.rows, embedding_dim)).backward()


def call_sequence_encoder(users: int, rows: int, embedding_dim: int, dtype: torch.dtype) -> None:
    """Call the sequence encoder's pair: two blocks of two heads, tiles of 16 rows, or of 32 for many narrow rows."""
    tile_rows = 32 if rows > configurations.SMALL_ROWS and embedding_dim <= configurations.WIDE else 16
    shape = StepShape(users, distinct=704, tiles=-(-rows // tile_rows), tile_rows=tile_rows, positions=10)
    batch = StepBatch.of(torch.empty(shape.starts()[-1], dtype=torch.int32, device="meta"), shape)
    d = embedding_dim
    norm, feed_forward = [(d,), (d,)], [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes = [(shape.positions, d), *norm, *([(d, d)] * 4 + norm + feed_forward + norm) * 2]

    def weights(dtype: torch.dtype) -> SequenceWeights:
        buffer = torch.empty(1 << 20, dtype=dtype, device="meta")
        start = 0
        tensors = []
        for sizes in shapes:
            tensors.append(buffer[start : start + math.prod(sizes)].view(sizes))
            start += -(-math.prod(sizes) // FLAT_ALIGNMENT) * FLAT_ALIGNMENT
        return SequenceWeights(tensors, heads=2, epsilon=1e-6)

    vectors = torch.empty(shape.distinct, d, device="meta")
    rate = sequence_encoder.DropoutRate(1 << 29, 1.125)
    weights_of = [weights(weights_dtype) for weights_dtype in (torch.float32, dtype, torch.float32)]
    pair = sequence_encoder.SequenceEncoder(*weights_of, vectors, batch, shape, rate, dtype)
    pair.connect(torch.empty_like(pair.states))
    pair.forward()
    pair.backward()


def call_pairs_of_one_entry(dtype: torch.dtype) -> None:
    """Call the selection of a batch, the record of losses, Adam and a sum of parts, on tensors without values."""
    shape = StepShape(users=64, distinct=704, tiles=64, tile_rows=16, positions=10)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    words = shape.starts()[-1]
    counter = empty(1, dtype=torch.int32)
    window, buffer = empty(4, words, dtype=torch.int32), empty(words, dtype=torch.int32)
    batch_selection.SelectBatch(window, counter, buffer, shape, empty(20315)).forward()
    record, steps = empty(4, dtype=torch.float64), empty()
    header = empty(HEADER_WORDS, dtype=torch.int32)
    of_record = empty(shape.rows), header, shape.tile_rows, record, empty(1), steps, counter
    loss_record.LossRecord(*of_record).forward()
    of_ranks = loss_record.LossRecord(*of_record, empty(2))
    of_ranks.forward()
    of_ranks.count()
    part_sums.sum_parts(empty(8, 1000), empty(1000))
    flat = [empty(4_114_272) for _ in range(4)]
    groups, values = empty(len(flat[0]) // 32, dtype=torch.uint8), empty(2)
    operands = None if dtype == torch.float32 else empty(len(flat[0]), dtype=dtype)
    adam.FlatAdam(*flat, operands, groups, values, values, (0.9, 0.999), 1e-8, steps, record).update()
    more = 1.0, torch.empty_like(flat[0]), 1e-3
    adam.FlatAdam(*flat, operands, groups, values, values, (0.9, 0.999), 1e-8, steps, record, *more).update()


def call_fold(arguments: argparse.Namespace, embedding_dim: int, dtype: torch.dtype) -> None:
    """Call the fold, forward and backward, on tensors without values."""
    kinds = [(0, 1)] if arguments.other_forms else [(0,), (1,), (0, 1)]
    sizes = arguments.layers, arguments.width, arguments.bottleneck, embedding_dim
    shapes = side_weights(kinds, *sizes, gated=not arguments.other_forms)

    def views(of: torch.dtype) -> RecommenderWeights:
        return in_buffer(shapes, torch.empty(flat_size(shapes), dtype=of, device="meta"))

    weights = views(torch.float32)
    operands = weights if dtype == torch.float32 else views(dtype)
    pair = fold_heads.FoldHeads(weights, operands, views(torch.float32), dtype)
    of_down = torch.stack([tower.down_weight for tower in weights.towers])
    shaped = (pair.coefficients, of_down, pair.bias, pair.composites, pair.projected_up, pair.projections)
    gradients = [torch.empty_like(tensor, dtype=torch.float32) for tensor in (*shaped, pair.vector_bias)]
    pair.connect(TowerGradients(*gradients))
    pair.forward()
    pair.backward()


def compile_one(
    kernel: Any, architecture: int, chosen: Configuration, values: tuple, meta: dict[str, Any]
) -> dict[str, Any]:
    """Compile a kernel for the arguments of a launch; return its shared memory, registers and spilled bytes."""
    launch = Launch(kernel, kernel.fn.__name__, (1,), chosen, values, meta)
    wanted = machine_code.specialization(launch, architecture)
    binary = machine_code.compile_kernel(kernel, architecture, wanted.values, meta, chosen)
    return {**machine_code.resources(binary), "warps": chosen.warps}


if __name__ == "__main__":
    main()
