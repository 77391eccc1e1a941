"""Check AdamW in C++ against PyTorch's: equal updates and states, and PyTorch's own update where C++ cannot take it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.kernels.cpu.adam import AdamUpdate
from iisan_fast.training.optimizer import Adam

CPU = torch.device("cpu")
SHAPES = [(3, 5), (40, 17), (), (1,), (2, 3, 4), (0, 3)]
STEPS = 12
pytestmark = pytest.mark.usefixtures("threads_given_back")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Return a list of the numbers of parameters in each update by C++."""
    counts: list[int] = []
    update = AdamUpdate.__call__
    monkeypatch.setattr(
        AdamUpdate, "__call__", lambda self, *rest: counts.append(len(self.states)) or update(self, *rest)
    )
    return counts


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups(weights: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": weights[:3], "lr": 1e-2, "weight_decay": 0.0},
        {"params": weights[3:], "lr": 3e-3, "weight_decay": 5.0},
    ]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    """Set gradients that differ by orders of magnitude between steps; in every second step they are not contiguous."""
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 3)
        transposed = step % 2 and gradient.dim() == 2
        weight.grad = (gradient.T.contiguous().T if transposed else gradient).to(weight.dtype)


def states(optimizer: torch.optim.AdamW, weights: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[weight][kind] for weight in weights for kind in ("exp_avg", "exp_avg_sq", "step")]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_updates_are_those_of_pytorch(dtype, tolerance, threads, counted):
    torch.set_num_threads(threads)
    ours, theirs = parameters(dtype), parameters(torch.float64)
    adam = Adam(groups(ours), CPU)
    exact = torch.optim.AdamW(groups(theirs))
    for step in range(STEPS):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        adam.step()
        exact.step()
        pairs = [*zip(ours, theirs), *zip(states(adam, ours), states(exact, theirs))]
        for result, expected in pairs:
            torch.testing.assert_close(result.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert counted == [len(SHAPES)] * (STEPS - 1)  # PyTorch makes the first update, with the states


@needs_compiler
def test_numbers_repeat_whatever_the_threads(counted):
    weights_by_threads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights = parameters(torch.float32)
        optimizer = Adam(groups(weights), CPU)
        for step in range(3):
            give_gradients(weights, step)
            optimizer.step()
        weights_by_threads.append(weights)
    for other_weights in weights_by_threads[1:]:
        assert all(map(torch.equal, weights_by_threads[0], other_weights))
    assert len(counted) == 6


@needs_compiler
@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_leaves_everything_as_it_is(flag, counted):
    weights = parameters(torch.float32)
    optimizer = Adam(groups(weights), CPU)
    for step in range(2):
        give_gradients(weights, step)
        optimizer.step()
    before = [tensor.detach().clone() for tensor in (*weights, *states(optimizer, weights))]
    optimizer.found_inf = torch.tensor(flag)
    give_gradients(weights, 2)
    optimizer.step()
    unchanged = [
        torch.equal(tensor, old)
        for tensor, old in zip((*weights, *states(optimizer, weights)), before)
        if tensor.numel()
    ]
    assert all(unchanged) if flag else not any(unchanged)
    assert len(counted) == (1 if flag else 2)


@needs_compiler
def test_states_that_came_from_elsewhere_are_the_ones_updated(counted):
    """A checkpoint that is loaded replaces the tensors of a state."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    adam = Adam(groups(ours), CPU)
    reference = torch.optim.AdamW(groups(theirs))
    for step in range(6):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        if step == 3:
            for weight in ours:
                adam.state[weight] = {kind: value.clone() for kind, value in adam.state[weight].items()}
            adam.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.5
        adam.step()
        reference.step()
    for result, expected in zip((*ours, *states(adam, ours)), (*theirs, *states(reference, theirs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 5


@needs_compiler
def test_a_graph_that_saved_a_parameter_refuses_to_go_back(counted):
    weights = [nn.Parameter(torch.ones(4))]
    optimizer = Adam([{"params": weights, "lr": 0.1}], CPU)
    for _ in range(2):
        loss = weights[0].square().sum()
        weights[0].grad = torch.ones(4)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert counted == [1]


@needs_compiler
@pytest.mark.parametrize("move", [lambda data: data.clone(), lambda data: data.double()])
def test_a_parameter_that_was_given_other_memory_is_updated_there(move, counted):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    adam = Adam(groups(ours), CPU)
    reference = torch.optim.AdamW(groups(theirs))
    for step in range(5):
        if step == 3:
            for optimizer, weights in ((adam, ours), (reference, theirs)):
                for parameter in weights:
                    parameter.grad = None
                    parameter.data = move(parameter.data)
                    state = optimizer.state[parameter]
                    state |= {kind: move(state[kind]) for kind in ("exp_avg", "exp_avg_sq")}
        for optimizer, weights in ((adam, ours), (reference, theirs)):
            give_gradients(weights, step)
            optimizer.step()
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 4


@needs_compiler
def test_parameters_may_have_taken_other_numbers_of_steps(counted):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    adam = Adam(groups(ours), CPU)
    reference = torch.optim.AdamW(groups(theirs))
    for step in range(5):
        for optimizer, weights in ((adam, ours), (reference, theirs)):
            give_gradients(weights, step)
            if step == 2:  # PyTorch's fused form assumes that gradients are contiguous
                weights[1].grad = None
            optimizer.step()
    for result, expected in zip((*ours, *states(adam, ours)), (*theirs, *states(reference, theirs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 3 and adam.state[ours[1]]["step"] == 4 and adam.state[ours[0]]["step"] == 5


@needs_compiler
def test_an_update_refuses_too_few_or_too_many_of_anything():
    weights = parameters(torch.float32)
    update = kernels.adam(
        [kernels.AdamState(weight, *map(torch.zeros_like, (weight, weight)), torch.tensor(0.0)) for weight in weights]
    )
    for decays in ([0.1] * 5, []):
        with pytest.raises(ValueError, match=f"decays: expected 6, found {len(decays)}"):
            update(weights, [0.1] * 6, (0.9, 0.999), 1e-8, decays)
    for gradients, rates in ((weights[:5], [0.1] * 6), (weights, [0.1] * 5), ([*weights, weights[0]], [0.1] * 6)):
        with pytest.raises(ValueError, match=f"expected 6 of each, found {len(gradients)} and {len(rates)}"):
            update(gradients, rates, (0.9, 0.999), 1e-8)


@needs_compiler
def test_a_copy_goes_on_by_itself(counted):
    weights = parameters(torch.float32)
    optimizer = Adam(groups(weights), CPU)
    for step in range(2):
        give_gradients(weights, step)
        optimizer.step()
    again = copy.deepcopy(optimizer)
    copies = [parameter for group in again.param_groups for parameter in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    for updated, step in ((copies, again), (weights, optimizer)):
        give_gradients(updated, 2)
        step.step()
        assert all(map(torch.equal, weights, before)) == (updated is copies)
    assert all(map(torch.equal, weights, copies)) and len(counted) == 3


RULES = [{"betas": (0.5, 0.5)}, {"eps": 0.1}, {"amsgrad": True}, {"maximize": True}]


@pytest.mark.parametrize("case", ["reference", "no gradient", "half", "strided", *RULES])
def test_pytorchs_own_updates_what_c_does_not(case, counted, monkeypatch):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    if case == "reference":
        monkeypatch.setenv(kernels.FORM_VARIABLE, case)
    if case == "half":
        ours, theirs = ([nn.Parameter(weight.data.bfloat16()) for weight in weights] for weights in (ours, theirs))
    if case == "strided":
        ours[1], theirs[1] = (nn.Parameter(weights[1].data.T.contiguous().T) for weights in (ours, theirs))
    rules = case if isinstance(case, dict) else {}
    adam = Adam([{**group, **rules} for group in groups(ours)], CPU)
    reference = torch.optim.AdamW([{**group, **rules} for group in groups(theirs)], fused=True)
    for step in range(4):
        for weights in (ours, theirs):
            give_gradients(weights, step)
            if case == "no gradient":
                weights[step % 3].grad = None
        adam.step()
        reference.step()
    assert all(map(torch.equal, ours, theirs)) and not counted
