"""The fold on a GPU at the published sizes: accuracy, repeatability, and a graph of four launches."""

from __future__ import annotations

import pytest
import torch

from helpers.folds import Fold
from helpers.kernel_cases import INTRA_AND_INTER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]
IISAN = {"kinds": INTRA_AND_INTER, "layers": 7, "width": 768, "bottleneck": 64, "dim": 64}
VERSA = {"kinds": INTRA_AND_INTER, "layers": 4, "width": 384, "bottleneck": 64, "dim": 64, "hidden": [64, 64, 384]}
WIDE = {"kinds": [(0, 1)], "layers": 13, "width": 1024, "bottleneck": 128, "dim": 128}


@pytest.mark.parametrize("shape", [IISAN, VERSA, WIDE], ids=["iisan", "versa", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_and_gradient(shape, dtype):
    fold = Fold(dtype, **shape)
    fold.check()
    for first, second in zip(fold.run(), fold.run()):
        assert torch.equal(first, second)


def test_a_captured_graph_gives_the_same():
    fold = Fold(torch.bfloat16, **IISAN)
    eager = fold.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fold.pair.forward()
        fold.pair.backward()
    fold.gradient.fill_(float("nan"))
    graph.replay()
    for first, second in zip(eager, fold.results()):
        assert torch.equal(first, second)
