"""The sequence encoder on a GPU: the pair in bfloat16 and its captured graph, the op beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.gpu_checks import PRECISIONS, Precision, all_launched, each_precision, nan_in_new_memory
from helpers.gpu_checks import assert_as_good as assert_as_good_as_eager
from helpers.sequence_cases import GridCase, PairCase, sequence_by_gpu
from iisan_fast.kernels.gpu.sequence_encoder import SequenceEncoder
from iisan_fast.kernels.reference import sequence_encoder as sequence_encoder_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]

KERNELS = {"sequence_forward", "sequence_backward", "sequence_weight_gradients", "sum_parts"}
LENGTHS = [3, 10, 1, 7, 5] * 12


def results_of(case: PairCase, pair: SequenceEncoder) -> dict[str, Tensor]:
    """Return copies of the tensors that a step of the pair writes."""
    gradients = {f"weight {i}": gradient.clone() for i, gradient in enumerate(case.gradients.tensors)}
    return {"states": pair.states.clone(), "of_inputs": pair.of_inputs.clone(), **gradients}


@pytest.mark.parametrize(
    "sizes",
    [
        dict(d=64),
        dict(d=64, tile_rows=32),
        dict(d=64, heads=8, blocks=3),
        dict(d=32, heads=4),
        dict(d=128, heads=1),
        dict(d=64, positions=50, tile_rows=64),
        dict(d=64, dropout=0.0, spare=(4, 2, 200)),
    ],
    ids=str,
)
def test_the_pair_in_bfloat16_is_near_the_reference_and_repeats_in_a_graph(sizes):
    case = PairCase(LENGTHS, **sizes)
    with nan_in_new_memory():
        pair = case.pair(torch.bfloat16)
    with all_launched(KERNELS):
        pair.forward()
        pair.backward()
    first = results_of(case, pair)
    ours, theirs, exact = (
        {name: [value.cpu()] for name, value in results.items()}
        for results in (first, case.reference(torch.bfloat16), case.reference(torch.float64))
    )
    assert_as_good_as_eager(ours, theirs, exact, PRECISIONS["bf16"])
    assert torch.equal(pair.state_operands, pair.states.bfloat16())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.forward()
        pair.backward()
    for _ in range(3):
        pair.states.fill_(torch.nan)
        graph.replay()
        for name, values in results_of(case, pair).items():
            assert torch.equal(values, first[name]), name


@pytest.mark.parametrize("sizes", [dict(d=64), dict(d=128, heads=4, blocks=1), dict(d=32, tile_rows=32)], ids=str)
def test_the_pair_in_float32(sizes):
    with nan_in_new_memory():
        PairCase(LENGTHS, **sizes).check()


@each_precision
@pytest.mark.parametrize("sizes", [dict(d=64, blocks=2), dict(d=32, heads=4, spare=9)], ids=str)
def test_the_op_errs_as_little_as_eager(sizes, precision: Precision):
    case = GridCase(LENGTHS, **sizes, dtype=precision.dtype)
    names = ["states", "x", *(f"weight {i}" for i in range(len(case.tensors)))]

    def named(values: list[Tensor]) -> dict[str, list[Tensor]]:
        return {name: [value] for name, value in zip(names, values, strict=True)}

    reference = sequence_encoder_reference.sequence_encoder
    exact = named(case.run(reference, torch.float64))
    with precision.active():
        theirs = named(case.run(reference))
        with nan_in_new_memory(), all_launched(KERNELS):
            ours = named(case.run(sequence_by_gpu))
    assert_as_good_as_eager(ours, theirs, exact, precision, measured=not precision.is_tf32)
