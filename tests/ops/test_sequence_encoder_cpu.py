"""SASRec by C++ against the reference, states and all gradients, in fp64 and fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.kernels import SequenceGrid, sequence_dropout
from iisan_fast.kernels.cpu import sequence_encoder as sequence_encoder_cpu
from iisan_fast.kernels.cpu.step_memory import Memory
from iisan_fast.kernels.reference import sequence_encoder as sequence_encoder_reference
from iisan_fast.models.sasrec import SASRec

pytestmark = [
    needs_compiler,
    pytest.mark.usefixtures("two_threads_and_nan_in_new_memory"),
]


@pytest.fixture(autouse=True)
def by_cpu(monkeypatch) -> None:
    """Name the cpu form in the environment; a call that it cannot run then raises FormError."""
    monkeypatch.setenv(kernels.FORM_VARIABLE, "cpu")


class Case:
    """An encoder with random weights, none at its initial value, and users with histories of these lengths."""

    def __init__(
        self, lengths: list[int], d: int = 32, heads: int = 2, blocks: int = 2, dropout: float = 0.25, spare: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        length = max(lengths, default=1)
        config = ModelConfig(embedding_dim=d, attention_heads=heads, blocks=blocks, dropout=dropout)
        self.model = SASRec(config, length + spare).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        slots = [length * (user + 1) - rows + i for user, rows in enumerate(lengths) for i in range(rows)]
        self.grid = SequenceGrid(torch.tensor(slots, dtype=torch.int64), len(lengths), length)
        users = torch.randint(0, 2**31, (len(lengths),), generator=generator)
        self.dropout = sequence_dropout(dropout, 3, 17, users)
        self.x = torch.randn(len(slots), d, generator=generator)
        self.upstream = torch.randn(len(slots), d, generator=generator)

    def run(self, specification: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        model = self.model.to(dtype)
        x = self.x.to(dtype, copy=True).requires_grad_()
        op = sequence_encoder_reference.sequence_encoder if specification else kernels.sequence_encoder
        states = op(x, model.weights(), self.grid, self.dropout)
        gradients = torch.autograd.grad(states, [x, *model.parameters()], self.upstream.to(dtype))
        names = ["x", *(name for name, _ in model.named_parameters())]
        return {"states": states.detach(), **dict(zip(names, gradients))}

    def last(self, x: Tensor) -> Tensor:
        """Return the reference's states after whole histories."""
        return sequence_encoder_reference.last_states(x, self.model.weights(), self.grid)

    def check(self) -> None:
        exact = self.run(True, torch.float64)
        for name, actual in self.run(False, torch.float64).items():
            torch.testing.assert_close(actual, exact[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        ours, theirs = (self.run(specification, torch.float32) for specification in (False, True))
        for name, truth in exact.items():
            error, other = ((results[name].double() - truth).norm().item() for results in (ours, theirs))
            assert error <= max(8 * other, 4e-6 * max(1, truth.norm().item())), name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_encoder(data):
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3, 8]), label="cores"))
    d, heads = data.draw(st.sampled_from([(16, 1), (16, 4), (32, 2), (48, 3), (64, 2)]))
    Case(
        data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=25)),
        d,
        heads,
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([0.0, 0.1, 0.5])),
        data.draw(st.integers(0, 3)),
    ).check()


@pytest.mark.parametrize("lengths", [[1], [40], [1] * 31, [1] * 33, [33, 1], [1, 33]])
def test_users_of_every_share_of_the_rows(lengths):
    Case(lengths).check()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=25), st.sampled_from([(16, 1), (32, 2), (64, 4)]))
def test_states_after_whole_histories(lengths, shape):
    case = Case(lengths, *shape, spare=2)
    with torch.inference_mode():
        exact = case.last(case.x.double())
        torch.testing.assert_close(case.model.last(case.x.double(), case.grid), exact, rtol=1e-10, atol=1e-11)
        states = case.model.float().last(case.x, case.grid)
    torch.testing.assert_close(states.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[7, 12] * 60, [600, 3], [511, 1, 1], [1] * 1025])
def test_states_of_more_rows_than_are_computed_at_a_time(lengths):
    case = Case(lengths, d=16)
    with torch.inference_mode():
        states, exact = case.model.last(case.x.double(), case.grid), case.last(case.x.double())
    torch.testing.assert_close(states, exact, rtol=1e-10, atol=1e-11)


def test_many_users_take_the_memory_of_few(monkeypatch):
    taken = []
    allocate = Memory.empty
    monkeypatch.setattr(Memory, "empty", lambda self, dtype, count: taken.append(count) or allocate(self, dtype, count))
    for users in (100, 400):
        case = Case([12] * users, d=16)
        with torch.inference_mode():
            case.model.last(case.x.double(), case.grid)
    assert len(taken) == 2 and taken[0] == taken[1]


def test_states_after_whole_histories_are_by_c_where_no_backward_follows(monkeypatch):
    case = Case([3, 5])
    calls = []
    last_states = sequence_encoder_cpu.last_states
    monkeypatch.delenv(kernels.FORM_VARIABLE)
    monkeypatch.setattr(
        sequence_encoder_cpu, "last_states", lambda *args: calls.append(len(args[0])) or last_states(*args)
    )
    assert case.model.last(case.x.double(), case.grid).requires_grad and not calls
    with torch.no_grad():
        case.model.last(case.x.double(), case.grid)
    assert calls == [8]


def test_rows_that_share_a_slot_disturb_nobody_else():
    """Padding rows of a batch share a slot of one extra user; their gradients are 0."""
    case = Case([3, 5, 4])
    padding = 50
    expected = case.run(True, torch.float64)
    count = len(case.x)
    last = torch.full((padding,), 4 * case.grid.length - 1)
    case.grid = SequenceGrid(torch.cat([case.grid.slots, last]), 4, case.grid.length)
    users = torch.cat([case.dropout.users, torch.zeros(1, dtype=torch.int64)])
    case.dropout = case.dropout._replace(users=users)
    case.x = torch.cat([case.x, torch.ones(padding, case.x.shape[1])])
    case.upstream = torch.cat([case.upstream, torch.zeros(padding, case.x.shape[1])])
    results = case.run(False, torch.float64)
    for name, value in expected.items():
        actual = results[name][:count] if name in ("states", "x") else results[name]
        torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-11)
    assert not results["x"][count:].any()


def test_it_repeats_to_the_last_bit_and_hardly_depends_on_threads():
    case = Case([4, 9, 2, 7] * 6)
    first, second = (case.run(False, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.set_num_threads(1)
    for name, value in case.run(False, torch.float32).items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{"d": 24, "heads": 2}, {"d": 8, "heads": 2}])
def test_other_widths_go_through_pytorch(changed, monkeypatch):
    case = Case([3, 4], **changed)
    reason = f"it needs widths that are multiples of 16, found {changed['d']}"
    with pytest.raises(ValueError, match=f"{kernels.FORM_VARIABLE}: cpu cannot run sequence_encoder: {reason}"):
        case.run(False, torch.float64)
    monkeypatch.delenv(kernels.FORM_VARIABLE)
    monkeypatch.setattr(sequence_encoder_cpu, "sequence_encoder", lambda *_: pytest.fail("C++ ran"))
    case.check()


@pytest.mark.parametrize("quietly", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_states_are_the_same(quietly):
    case = Case([3, 4])
    x = case.x.double()
    with quietly():
        states = case.model(x, case.grid, case.dropout)
    assert not states.requires_grad and torch.equal(states, case.model(x, case.grid, case.dropout))


def test_last_states_have_no_gradients():
    case = Case([3, 4])
    message = f"{kernels.FORM_VARIABLE}: cpu cannot run last_states: it has no gradients; use reference"
    with pytest.raises(ValueError, match=message):
        case.model.last(case.x.double(), case.grid)


@pytest.mark.parametrize("step", [1, 2])
def test_the_backward_has_all_that_it_reads_whoever_lets_go_of_it(step):
    case = Case([3, 7, 1, 5] * 8)
    expected = case.run(False, torch.float64)
    model = case.model
    slots = case.grid.slots.repeat_interleave(step)[::step]
    states = model(case.x.double(), SequenceGrid(slots, case.grid.users, case.grid.length), case.dropout)
    case.grid = case.dropout = slots = None
    others = [torch.full((len(case.x),), 1 << 40) for _ in range(64)]  # fill the slots' memory anew
    gradients = torch.autograd.grad(states, list(model.parameters()), case.upstream.double())
    assert len(others) == 64
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert torch.equal(gradient, expected[name]), name


def test_weights_changed_before_the_backward_are_refused():
    case = Case([3, 4])
    states = case.model(case.x.double(), case.grid)
    with torch.no_grad():
        case.model.blocks[0].query.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.sum().backward()


def test_a_value_that_is_not_finite_is_not_lost():
    case = Case([3, 4])
    case.x[2] = float("nan")
    states = case.run(False, torch.float32)["states"]
    assert states[2].isnan().all() and states[3:].isfinite().all()


@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (2, 1)])
def test_threads_may_change_before_a_backward_that_runs_twice(forward, backward):
    case = Case([4, 9, 2, 7] * 6)
    expected = case.run(False, torch.float64)
    x = case.x.double().requires_grad_()
    torch.set_num_threads(forward)
    states = case.model(x, case.grid, case.dropout)
    torch.set_num_threads(backward)
    for last in (False, True):
        (gradient,) = torch.autograd.grad(states, x, case.upstream.double(), retain_graph=not last)
        torch.testing.assert_close(gradient, expected["x"], rtol=1e-10, atol=1e-11)


def test_arguments_that_do_not_fit_are_refused():
    case = Case([3, 4])
    weights = case.model.weights()
    grid = case.grid
    dropout = case.dropout
    x = case.x.double()
    for changed, message in (
        ({"x": x[:-1]}, r"x: expected \[7, 32\], found \[6, 32\]"),
        ({"x": x.float()}, "weights: expected float32 like x, found float64"),
        ({"grid": grid._replace(length=9)}, "grid.length: expected 1 to 4, found 9"),
        ({"weights": weights._replace(heads=3)}, "weights.heads: expected a divisor of 32, found 3"),
        (
            {"weights": weights._replace(tensors=weights.tensors[:-1])},
            "weights.tensors: expected 3 tensors and 12 more a block, found 26",
        ),
        (
            {"weights": weights._replace(tensors=[tensor.to("meta") for tensor in weights.tensors])},
            r"weights.tensors\[0\]: expected device cpu, found meta",
        ),
        ({"grid": grid._replace(slots=grid.slots.int())}, "grid.slots: expected int64, found int32"),
        ({"grid": grid._replace(slots=grid.slots + 1)}, "grid.slots: expected indices from 0 to 7, found 8"),
        ({"dropout": dropout._replace(users=dropout.users[:1])}, r"dropout.users: expected \[2\], found \[1\]"),
        ({"dropout": dropout._replace(users=dropout.users.int())}, "dropout.users: expected int64, found int32"),
    ):
        arguments = {"x": x, "weights": weights, "grid": grid, "dropout": dropout} | changed
        with pytest.raises(ValueError, match=message):
            kernels.sequence_encoder(**arguments)
