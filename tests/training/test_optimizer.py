"""Adam by C++ beside PyTorch's: the same updates, the same states, and PyTorch's own wherever C++ has no part."""

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
    """The parameters of each update by C++."""
    found: list[int] = []
    own = AdamUpdate.__call__
    monkeypatch.setattr(AdamUpdate, "__call__", lambda self, *rest: found.append(len(self.states)) or own(self, *rest))
    return found


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups(own: list[nn.Parameter]) -> list[dict]:
    return [{"params": own[:3], "lr": 1e-2}, {"params": own[3:], "lr": 3e-3}]


def give_gradients(own: list[nn.Parameter], step: int) -> None:
    """Of steps that differ by orders of magnitude; every second one not contiguous."""
    generator = torch.Generator().manual_seed(step)
    for each in own:
        gradient = torch.randn(each.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 3)
        transposed = step % 2 and gradient.dim() == 2
        each.grad = (gradient.T.contiguous().T if transposed else gradient).to(each.dtype)


def states(optimizer: torch.optim.Adam, own: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[each][kind] for each in own for kind in ("exp_avg", "exp_avg_sq", "step")]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_updates_are_those_of_pytorch(dtype, tolerance, threads, counted):
    torch.set_num_threads(threads)
    ours, theirs = parameters(dtype), parameters(torch.float64)
    own, exact = Adam(groups(ours), CPU), torch.optim.Adam(groups(theirs))
    for step in range(STEPS):
        for each in (ours, theirs):
            give_gradients(each, step)
        own.step()
        exact.step()
        pairs = [*zip(ours, theirs), *zip(states(own, ours), states(exact, theirs))]
        for found, expected in pairs:
            torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert counted == [len(SHAPES)] * (STEPS - 1)  # PyTorch's makes the states


@needs_compiler
def test_numbers_repeat_whatever_the_threads(counted):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = parameters(torch.float32)
        optimizer = Adam(groups(own), CPU)
        for step in range(3):
            give_gradients(own, step)
            optimizer.step()
        found.append(own)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    assert len(counted) == 6


@needs_compiler
@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_leaves_everything_as_it_is(flag, counted):
    own = parameters(torch.float32)
    optimizer = Adam(groups(own), CPU)
    for step in range(2):
        give_gradients(own, step)
        optimizer.step()
    before = [each.detach().clone() for each in (*own, *states(optimizer, own))]
    optimizer.found_inf = torch.tensor(flag)
    give_gradients(own, 2)
    optimizer.step()
    same = [torch.equal(each, kept) for each, kept in zip((*own, *states(optimizer, own)), before) if each.numel()]
    assert all(same) if flag else not any(same)
    assert len(counted) == (1 if flag else 2)


@needs_compiler
def test_states_that_came_from_elsewhere_are_the_ones_updated(counted):
    """As a checkpoint puts them in place of others."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    own, other = Adam(groups(ours), CPU), torch.optim.Adam(groups(theirs))
    for step in range(6):
        for each in (ours, theirs):
            give_gradients(each, step)
        if step == 3:
            for each in ours:
                own.state[each] = {kind: value.clone() for kind, value in own.state[each].items()}
            own.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.5
        own.step()
        other.step()
    for found, expected in zip((*ours, *states(own, ours)), (*theirs, *states(other, theirs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 5


@needs_compiler
def test_a_graph_that_saved_a_parameter_refuses_to_go_back(counted):
    own = [nn.Parameter(torch.ones(4))]
    optimizer = Adam([{"params": own, "lr": 0.1}], CPU)
    for _ in range(2):
        loss = own[0].square().sum()
        own[0].grad = torch.ones(4)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert counted == [1]


@needs_compiler
@pytest.mark.parametrize("move", [lambda data: data.clone(), lambda data: data.double()])
def test_a_parameter_that_was_given_other_memory_is_updated_there(move, counted):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    own, other = Adam(groups(ours), CPU), torch.optim.Adam(groups(theirs))
    for step in range(5):
        if step == 3:
            for optimizer, each in ((own, ours), (other, theirs)):
                for parameter in each:
                    parameter.grad = None
                    parameter.data = move(parameter.data)
                    state = optimizer.state[parameter]
                    state |= {kind: move(state[kind]) for kind in ("exp_avg", "exp_avg_sq")}
        for optimizer, each in ((own, ours), (other, theirs)):
            give_gradients(each, step)
            optimizer.step()
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 4


@needs_compiler
def test_parameters_may_have_taken_other_numbers_of_steps(counted):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    own, other = Adam(groups(ours), CPU), torch.optim.Adam(groups(theirs))
    for step in range(5):
        for optimizer, each in ((own, ours), (other, theirs)):
            give_gradients(each, step)
            if step == 2:  # PyTorch's fused form takes gradients as contiguous
                each[1].grad = None
            optimizer.step()
    for found, expected in zip((*ours, *states(own, ours)), (*theirs, *states(other, theirs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 3 and own.state[ours[1]]["step"] == 4 and own.state[ours[0]]["step"] == 5


@needs_compiler
def test_an_update_refuses_too_few_or_too_many_of_anything():
    own = parameters(torch.float32)
    update = kernels.adam(
        [kernels.AdamState(each, *map(torch.zeros_like, (each, each)), torch.tensor(0.0)) for each in own]
    )
    for gradients, rates in ((own[:5], [0.1] * 6), (own, [0.1] * 5), ([*own, own[0]], [0.1] * 6)):
        with pytest.raises(ValueError, match=f"expected 6 of each, found {len(gradients)} and {len(rates)}"):
            update(gradients, rates, (0.9, 0.999), 1e-8)


@needs_compiler
def test_a_copy_goes_on_by_itself(counted):
    own = parameters(torch.float32)
    optimizer = Adam(groups(own), CPU)
    for step in range(2):
        give_gradients(own, step)
        optimizer.step()
    again = copy.deepcopy(optimizer)
    copies = [parameter for group in again.param_groups for parameter in group["params"]]
    before = [each.detach().clone() for each in own]
    for each, step in ((copies, again), (own, optimizer)):
        give_gradients(each, 2)
        step.step()
        assert all(map(torch.equal, own, before)) == (each is copies)
    assert all(map(torch.equal, own, copies)) and len(counted) == 3


RULES = [{"weight_decay": 0.5}, {"betas": (0.5, 0.5)}, {"eps": 0.1}, {"amsgrad": True}, {"maximize": True}]


@pytest.mark.parametrize("case", ["reference", "no gradient", "half", "strided", *RULES])
def test_pytorchs_own_updates_what_c_does_not(case, counted, monkeypatch):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    if case == "reference":
        monkeypatch.setenv(kernels.FORM_VARIABLE, case)
    if case == "half":
        ours, theirs = ([nn.Parameter(each.data.bfloat16()) for each in own] for own in (ours, theirs))
    if case == "strided":
        ours[1], theirs[1] = (nn.Parameter(own[1].data.T.contiguous().T) for own in (ours, theirs))
    rules = case if isinstance(case, dict) else {}
    own, other = (
        make([{**group, **rules} for group in groups(each)])
        for make, each in (
            (lambda each: Adam(each, CPU), ours),
            (lambda each: torch.optim.Adam(each, fused=True), theirs),
        )
    )
    for step in range(4):
        for each in (ours, theirs):
            give_gradients(each, step)
            if case == "no gradient":
                each[step % 3].grad = None
        own.step()
        other.step()
    assert all(map(torch.equal, ours, theirs)) and not counted
