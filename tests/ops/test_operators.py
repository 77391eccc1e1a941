"""The ops in Triton as PyTorch operators: registered as they behave, and compiled as one graph."""

from __future__ import annotations

import pytest
import torch

from helpers.gpu_checks import OpRecorder, check_registrations
from helpers.kernel_cases import DEVICE, LossCase, SideCase, TopCase, added_case, rank_case
from helpers.sequence_cases import EPSILON, GridCase, sequence_by_gpu
from iisan_fast import kernels
from iisan_fast.kernels import CONFIGURATIONS, Configuration, SequenceWeights
from iisan_fast.kernels.gpu import inbatch_cross_entropy, side_towers, target_rank, top_items

pytestmark = pytest.mark.slow


def test_the_ops_are_sound_operators():
    """Check that schema, fake tensors, autograd and ahead-of-time dispatch agree with the kernels."""
    side = SideCase(items=3, layers=2, width=16, bottleneck=8, kinds=[(0,), (0, 1)], dense=[1])
    loss = LossCase(5, 40)
    captured: list[tuple] = []
    for module, name in (
        (side_towers, "_side_towers"),
        (inbatch_cross_entropy, "_row_losses"),
        (target_rank, "_counts"),
        (target_rank, "_corrections"),
        (top_items, "_best_keys"),
    ):
        operator = getattr(module, name)

        def record(*arguments, operator=operator):
            captured.append((operator, arguments))
            return operator(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, record)
            side.run(lambda *a: kernels.side_towers(*a, form="gpu"))
            loss.run(lambda *a, **k: kernels.inbatch_cross_entropy(*a, **k, reduction="none", form="gpu"))
            ranks = rank_case(4, 9, 8, 2)
            kernels.target_rank(*ranks, form="gpu", added=added_case(*ranks[2:], 9, torch.float32))
            TopCase(4, 9, 8, torch.float32, DEVICE).best(3, "gpu")
    assert len(captured) == 5
    for operator, arguments in captured:
        detached = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, detached)


@pytest.mark.parametrize("kinds", [((0,), (1,), (0, 1)), ((0,),)])
def test_the_ops_compile_as_one_graph(kinds):
    side = SideCase(items=5, layers=2, kinds=kinds)
    loss = LossCase(5, 40)
    names = [name for name, value in loss.keywords.items() if value is not None]

    def both(outputs_of: list, queries: torch.Tensor, items: torch.Tensor, values: list) -> torch.Tensor:
        towers = kernels.side_towers(side.states, outputs_of, form="gpu")
        keywords = dict(zip(names, values, strict=True))
        return sum(t.sum() for t in towers) + kernels.inbatch_cross_entropy(queries, items, **keywords, form="gpu")

    leaves = [p.requires_grad_() for tower in side.towers for p in tower[1:]]
    leaves += [tensor.requires_grad_() for tensor in (loss.queries, loss.items)]
    arguments = (side.towers, loss.queries, loss.items, [loss.keywords[name] for name in names])
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        torch.autograd.grad(compiled(*arguments), leaves), torch.autograd.grad(both(*arguments), leaves), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.fixture
def one_split(monkeypatch) -> None:
    """Let the interpreter compute the sequence encoder's weight gradients in a quarter of the programs."""
    chosen = Configuration({"BN": 64, "BK": 32, "SPLITS": 1}, warps=4, stages=1)
    monkeypatch.setitem(CONFIGURATIONS["sequence_weight_gradients"], ("default", "fp32"), chosen)


def test_the_operators_of_the_sequence_encoder_are_sound(one_split):
    case = GridCase([2, 1])

    def run() -> None:
        weights = SequenceWeights(case.tensors, case.heads, EPSILON)
        kernels.last_states(case.x, weights, case.grid, form="gpu")
        case.run(sequence_by_gpu)

    with OpRecorder() as recorder:
        run()
    names = {func.name() for func, _ in recorder.calls}
    assert names == {f"iisan_fast::{op}" for op in ("last_states", "sequence_states", "sequence_states_backward")}
    check_registrations(run, "sequence_states")


def test_the_sequence_encoder_compiles_as_one_graph(one_split):
    case = GridCase([2, 1])
    compiled = torch.compile(sequence_by_gpu, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(case.run(compiled), case.run(sequence_by_gpu), strict=True):
        torch.testing.assert_close(ours, eager)
