"""AdamW in Triton against PyTorch's, and the flag that stops it."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import DEVICE
from iisan_fast.kernels.gpu import adam
from iisan_fast.kernels.gpu.adam import FlatAdam
from iisan_fast.kernels.gpu.configurations import ANY_SIZE, CONFIGURATIONS, Configuration
from iisan_fast.kernels.gpu.launch import launches
from iisan_fast.kernels.types import FLAT_LINE

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
SIZES = [32 * lines for lines in (1, 7, 40, 3)]
GROUPS = [0, 1, 1, 0]
RATES, DECAYS = (1e-2, 3e-4), (0.0, 5.0)
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Flat:
    """Parameters in one buffer, with Adam's state."""

    def __init__(self, dtype: torch.dtype | None, clip_norm: float | None = None, average_share: float = 0.0) -> None:
        torch.manual_seed(2)
        self.parameters = torch.randn(sum(SIZES), device=DEVICE)
        self.gradients, self.means, self.squares = (torch.zeros_like(self.parameters) for _ in range(3))
        self.operands = None if dtype is None else torch.empty(sum(SIZES), dtype=dtype, device=DEVICE)
        self.steps = torch.zeros((), device=DEVICE)
        self.record = torch.zeros(4, dtype=torch.float64, device=DEVICE)
        self.averages = self.parameters.clone() if average_share else None
        groups = torch.tensor(GROUPS, dtype=torch.uint8).repeat_interleave(torch.tensor(SIZES) // 32)
        rates, decays = (torch.tensor(values, device=DEVICE) for values in (RATES, DECAYS))
        self.update = FlatAdam(
            *(self.parameters, self.gradients, self.means, self.squares, self.operands, groups.to(DEVICE)),
            *(rates, decays, BETAS, EPSILON, self.steps, self.record),
            *(clip_norm, self.averages, average_share),
        ).update

    def state(self) -> list[torch.Tensor]:
        """Return copies of the tensors that an update writes."""
        tensors = (self.parameters, self.means, self.squares, self.operands, self.averages)
        return [tensor.clone() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("clip_norm", [None, 2.0])
@pytest.mark.parametrize("first", [0, 700])  # as in a run that is resumed after many steps
def test_steps_equal_pytorchs(first, clip_norm):
    flat = Flat(None, clip_norm, average_share=0.1)
    average = flat.parameters.clone()
    weights = [torch.nn.Parameter(part.clone()) for part in flat.parameters.split(SIZES)]
    groups = [
        {
            "params": [weight for weight, weight_group in zip(weights, GROUPS) if weight_group == group],
            "lr": rate,
            "weight_decay": decay,
        }
        for group, (rate, decay) in enumerate(zip(RATES, DECAYS))
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    start = flat.parameters.clone()
    flat.steps[...] = first
    for step in range(5):
        flat.gradients.copy_(torch.randn(sum(SIZES)) * 10.0 ** (step - 3))
        for weight, gradient in zip(weights, flat.gradients.split(SIZES)):
            weight.grad = gradient.clone()
        if not step:
            optimizer.step()
            for weight, part in zip(weights, start.split(SIZES)):  # restore them: the first step created the states
                weight.data.copy_(part)
                state = optimizer.state[weight]
                state["exp_avg"].zero_(), state["exp_avg_sq"].zero_(), state["step"].fill_(first)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        flat.steps += 1
        flat.update()
        moved = torch.cat([weight.detach() for weight in weights]) - start
        torch.testing.assert_close(flat.parameters - start, moved, rtol=1e-5, atol=1e-6)
        average.lerp_(flat.parameters, max(0.1, 9 / (10 + first + step + 1)))
        torch.testing.assert_close(flat.averages, average, rtol=1e-6, atol=1e-6)
        for ours, name in ((flat.means, "exp_avg"), (flat.squares, "exp_avg_sq")):
            theirs = torch.cat([optimizer.state[weight][name] for weight in weights])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 5, 600, 100_000])
def test_the_corrections_of_the_moments_keep_their_digits(steps):
    """The first gradient seen after `steps` steps of zeros moves a parameter by a quotient of the two corrections."""
    flat = Flat(None)
    start = flat.parameters.clone()
    flat.steps[...] = steps
    flat.gradients.fill_(1.0)
    flat.update()
    mean, square = ((1 - beta) / (1 - beta**steps) for beta in BETAS)
    moved = (flat.parameters - start)[:32].double()
    expected = torch.full_like(moved, -RATES[0] * mean / (square**0.5 + EPSILON))
    torch.testing.assert_close(moved, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_operands_follow_the_parameters(dtype):
    flat = Flat(dtype)
    flat.gradients.normal_()
    flat.steps += 1
    launches.clear()
    flat.update()
    assert launches == {"adam": 1}
    if dtype == torch.float16 or DEVICE == "cuda":
        assert torch.equal(flat.operands, flat.parameters.to(dtype))
    else:  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(flat.operands.float(), flat.parameters, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("count", [32, 64, 96, 64 * 9])
def test_the_norm_is_that_of_all_gradients(count, monkeypatch):
    """The sums of one program, of two, and of more programs than are read together."""
    monkeypatch.setitem(CONFIGURATIONS, "square_sums", {("default", ANY_SIZE): Configuration({"BLOCK": 64})})
    monkeypatch.setattr(adam, "SUMS_AT_ONCE", 4)
    gradients = torch.randn(count, device=DEVICE)
    means, squares, parameters = (torch.zeros_like(gradients) for _ in range(3))
    groups = torch.zeros(count // FLAT_LINE, dtype=torch.uint8, device=DEVICE)
    rates, decays, steps = (torch.tensor([value], device=DEVICE) for value in (1e-3, 0.0, 1.0))
    record = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    buffers = parameters, gradients, means, squares, None, groups
    launches.clear()
    FlatAdam(*buffers, rates, decays, BETAS, EPSILON, steps, record, clip_norm=0.5).update()
    assert launches == {"square_sums": 1, "adam": 1}
    clipped = gradients * min(0.5 / (gradients.double().norm().item() + 1e-6), 1)
    torch.testing.assert_close(means, clipped * (1 - BETAS[0]), rtol=1e-5, atol=1e-8)


def test_nothing_is_updated_once_a_loss_was_not_finite():
    flat = Flat(torch.float16, clip_norm=1.0, average_share=0.1)
    flat.gradients.normal_()
    flat.steps += 1
    flat.update()
    before = flat.state()
    flat.record[2] = 3
    flat.gradients.fill_(float("nan"))
    flat.update()
    assert all(torch.equal(now, then) for now, then in zip(flat.state(), before, strict=True))


def test_parameters_of_other_lines_are_refused():
    flat, nothing = torch.zeros(64), torch.zeros(1)
    with pytest.raises(ValueError, match="parameters: expected 32 for each of 3 lines, found 64"):
        groups = torch.zeros(3, dtype=torch.uint8)
        FlatAdam(flat, flat, flat, flat, None, groups, nothing, nothing, BETAS, EPSILON, nothing, nothing)
