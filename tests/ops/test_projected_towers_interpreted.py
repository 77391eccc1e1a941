"""The towers' pair on a GPU against a plain form in fp64: in the interpreter, from states to vectors and back.

All memory starts as NaN. A kernel that reads unwritten memory, or leaves a result unwritten, gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from helpers.flat_weights import flat_size, in_buffer, side_weights
from helpers.kernel_cases import DEVICE, INTRA_AND_INTER, relative_error
from helpers.towers_on_meta import towers_on_meta
from iisan_fast.kernels import Launch, States
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.gpu.fold_heads import FoldHeads
from iisan_fast.kernels.gpu.projected_towers import ProjectedTowers, refusal
from iisan_fast.kernels.reference.side_towers import side_towers
from iisan_fast.kernels.types import HEADER_WORDS

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

ACTIVATIONS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}
FOLDED = ("coefficients", "bias", "composites", "projected_up", "projection_operands", "vector_bias")
FORWARD = ("side_project", "side_recur", "side_join")
BACKWARD = ("side_recur_backward", "side_weight_gradients", "side_hidden_gradients", "side_mix_gradients")
BACKWARD = (*BACKWARD, "side_sum_gradients")


class Case:
    """Random folded operands and tables, and the gradient of the vectors."""

    def __init__(
        self,
        items: int = 20,
        room: int = 32,
        layers: int = 3,
        width: int = 48,
        bottleneck: int = 16,
        dim: int = 32,
        views: Sequence[tuple[int, ...]] = INTRA_AND_INTER,
        gated: bool = True,
        activation: str = "relu",
        dtype: torch.dtype = torch.float32,
        device: str = DEVICE,
    ) -> None:
        """items: the true count; room: the number of items that the buffers can hold."""
        self.views = views
        self.gated = gated
        self.activation = activation
        self.dtype = dtype
        towers = len(views)
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).to(device)

        self.items = items
        hidden = (towers, layers, bottleneck)
        below = torch.ones(layers, layers).tril(-1)[:, None, :, None].to(device)
        self.gates = random(towers, layers).sigmoid()
        self.folded = {
            "coefficients": self.coefficients(self.gates),
            "bias": random(*hidden, std=0.3),
            "composites": (random(*hidden, layers, bottleneck, std=bottleneck**-0.5) * below).to(dtype),
            "projected_up": random(*hidden, dim, std=bottleneck**-0.5).to(dtype),
            "projection_operands": random(towers, dim, width, std=width**-0.5).to(dtype),
            "vector_bias": random(dim),
        }
        buffer = random(towers * (layers * bottleneck * width + 32), std=width**-0.5).to(dtype)
        self.down = [part[32:].view(layers, bottleneck, width) for part in buffer.chunk(towers)]
        count = 1 + max(map(max, views))
        self.tables = [random(items + 5, layers + 1, width).to(dtype)[:, 1:] for _ in range(count)]
        self.rows = torch.randint(0, items + 5, (room,), generator=generator).int().to(device)
        self.header = torch.tensor([items, *(999,) * 7], dtype=torch.int32, device=device)
        self.of_vectors = random(room, dim)
        self.of_vectors[items:] = 0

    def coefficients(self, gates: Tensor) -> Tensor:
        """Return coefficients [T, K, 3] from the gates [T, K], or for towers without gates."""
        g = gates if self.gated else torch.ones_like(gates)
        other = 1 - g if self.gated else g
        zero = torch.zeros_like(g)
        one = torch.ones_like(g)
        kinds = {(0,): (other, g, zero), (1,): (other, zero, g), (0, 1): (one, g, other)}
        rows = [[part[i] for part in kinds[reads]] for i, reads in enumerate(self.views)]
        return torch.stack([torch.stack(parts, dim=1) for parts in rows])

    def pair(self) -> ProjectedTowers:
        pair = ProjectedTowers(
            SimpleNamespace(**self.folded),
            self.down,
            self.tables,
            self.rows,
            self.header,
            self.views,
            self.gated,
            self.activation,
            self.dtype,
        )
        pair.connect(self.of_vectors)
        return pair

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the vectors of the items and the gradients, with the gates' in place of the coefficients', in fp64."""
        gates, down = self.gates.double().requires_grad_(), torch.stack(self.down).double().requires_grad_()
        names = FOLDED[1:]
        bias, composites, up, projections, vector_bias = leaves = [
            self.folded[name].double().requires_grad_() for name in names
        ]
        rows = self.rows[: self.items].long()
        first, second = (self.tables[view][rows].double() for view in (0, -1))
        coefficients = self.coefficients(gates)
        state = 0.0
        activated = []
        for k in range(down.shape[1]):
            carry, of_first, of_second = coefficients[:, k, :, None, None].unbind(1)
            state = carry * state + of_first * first[:, k] + of_second * second[:, k]  # [T, N, D]
            z = state @ down[:, k].mT + bias[:, k, None]
            for j, a in enumerate(activated):
                z = z + a @ composites[:, k, :, j].mT
            activated.append(ACTIVATIONS[self.activation](z))
        vectors = state @ projections.mT + sum(a @ up[:, k] for k, a in enumerate(activated))
        vectors = vectors.sum(0) + vector_bias
        wanted = [down, *leaves, *([gates] if self.gated else [])]
        gradients = torch.autograd.grad(vectors, wanted, self.of_vectors[: self.items].double(), allow_unused=True)
        named = dict(zip(("down", *names, "gates"), gradients))
        return vectors.detach(), {n: torch.zeros_like(composites) if g is None else g for n, g in named.items()}

    def gate_gradients(self, of_coefficients: Tensor) -> Tensor:
        """Return the gates' gradients from those of the coefficients."""
        gates = self.gates.double().requires_grad_()
        return torch.autograd.grad(self.coefficients(gates), gates, of_coefficients.double())[0]

    def check(self) -> None:
        """Compare vectors and all gradients; rows beyond the true count must be 0."""
        pair = self.pair()
        pair.forward()
        pair.backward()
        vectors, expected = self.expected()
        assert not pair.vectors[self.items :].any()
        assert relative_error(pair.vectors[: self.items], vectors) < 1e-5
        gradients = {name.removeprefix("of_"): value for name, value in pair.gradients._asdict().items()}
        gradients["projection_operands"] = gradients.pop("projections")
        coefficients = gradients.pop("coefficients")
        if self.gated:
            gradients["gates"] = self.gate_gradients(coefficients)
        else:
            assert not coefficients.any()
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(gradients[name], value) < 2e-5, name


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"items": 1, "room": 1, "layers": 1, "views": [(0,)], "dim": 16},
        {"items": 17, "layers": 5, "bottleneck": 8, "views": [(0, 1)], "activation": "gelu", "dim": 16},
        {"items": 5, "width": 80, "bottleneck": 70, "layers": 2, "views": [(1,)], "dim": 64},
        {"items": 18, "views": [(0,)], "layers": 3, "gated": False, "width": 16},
        {"items": 6, "layers": 2, "views": [(0, 1), (0,)], "gated": False, "activation": "gelu"},
        pytest.param({"items": 33, "layers": 9, "room": 64, "views": [(0, 1), (1,)]}, marks=pytest.mark.slow),
        pytest.param({"items": 18, "layers": 13, "width": 80, "bottleneck": 24, "dim": 128}, marks=pytest.mark.long),
        pytest.param({"layers": 2, "width": 48, "bottleneck": 512, "views": [(0,)]}, marks=pytest.mark.long),
        pytest.param({"layers": 7, "width": 768, "bottleneck": 64, "dim": 64}, marks=pytest.mark.long),
    ],
)
def test_vectors_and_gradients(case):
    Case(**case).check()


def test_fold_and_towers_together_are_the_reference():
    """Check both pairs together, from flat weights to vectors and back to the gradients of all weights."""
    case = Case(layers=2, width=32)
    shapes = side_weights(INTRA_AND_INTER, layers=2, width=32)
    generator = torch.Generator().manual_seed(4)
    buffer = (0.3 * torch.randn(flat_size(shapes), generator=generator)).to(DEVICE)
    weights, gradients = in_buffer(shapes, buffer), in_buffer(shapes, torch.full_like(buffer, torch.nan))
    fold = FoldHeads(weights, weights, gradients, torch.float32)
    case.folded = {name: getattr(fold, name) for name in FOLDED}
    case.down = [tower.down_weight for tower in weights.towers]
    pair = case.pair()
    fold.connect(pair.gradients)
    for run in (fold.forward, pair.forward, pair.backward, fold.backward):
        run()
    exact = weights.mapped(lambda weight: weight.double().requires_grad_())
    states = [States(table.double(), case.rows[: case.items].long()) for table in case.tables]
    vectors = exact.fusion_bias
    for output, head, outer in zip(side_towers(states, exact.towers), exact.heads, exact.fusion.chunk(3, dim=1)):
        middle, middle_bias, inner, inner_bias = head
        vectors = vectors + linear(linear(linear(output, inner, inner_bias), middle, middle_bias), outer)
    assert relative_error(pair.vectors[: case.items], vectors.detach()) < 1e-5
    expected = torch.autograd.grad(vectors, exact.tensors(), case.of_vectors[: case.items].double())
    for gradient, truth in zip(gradients.tensors(), expected, strict=True):
        assert relative_error(gradient, truth) < 2e-5


def test_nothing_is_there():
    case = Case(items=0, layers=2, width=16, views=[(0, 1)])
    pair = case.pair()
    pair.forward()
    pair.backward()
    assert not pair.vectors.any()
    assert all(not gradient.any() for gradient in pair.gradients)


def test_a_pair_runs_again_and_gives_equal_bits():
    """A batch gives equal bits before and after another batch in the same buffers."""
    case = Case(items=20, layers=2, width=16, views=[(1,)])
    pair = case.pair()
    results = []
    for items in (20, 7, 20):
        case.header[0] = items
        pair.forward()
        pair.backward()
        results.append([tensor.clone() for tensor in (pair.vectors, *pair.gradients)])
    assert all(torch.equal(*tensors) for tensors in zip(results[0], results[2]))
    assert not torch.equal(results[0][0], results[1][0])
    assert not results[1][0][7:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_eight_launches_that_need_no_values(dtype):
    recorded: list[Launch] = []
    rows, header = (torch.empty(size, dtype=torch.int32, device="meta") for size in (704, HEADER_WORDS))
    with launch.recording(recorded.append):
        pair = towers_on_meta(rows, header, dtype)
        pair.forward()
        assert tuple(one.name for one in recorded) == FORWARD
        pair.backward()
    assert tuple(one.name for one in recorded) == FORWARD + BACKWARD
    assert pair.vector_operands.dtype == dtype and pair.vectors.dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (([(0,)] * 4, 3, 16, 48, 64), "at most 3 towers, found 4"),
        (([(0,)], 14, 16, 48, 64), "1 to 13 layers, found 14"),
        (([(0,)], 3, 7, 48, 64), "bottlenecks of 8 to 512, found 7"),
        (([(0,)], 3, 16, 40, 64), "multiples of 16, found 40"),
        (([(0,)], 3, 16, 48, 48), "16, 32, 64, 128 dimensions, found 48"),
    ],
)
def test_other_sizes_are_refused(sizes, reason):
    assert reason in refusal(*sizes)
    assert not refusal(INTRA_AND_INTER, 7, 64, 768, 64)


def test_weights_of_several_buffers_are_refused():
    case = Case()
    case.down = [weight.clone() for weight in case.down]
    with pytest.raises(ValueError, match="contiguous views of one buffer"):
        case.pair()


def test_tables_of_another_dtype_are_refused():
    case = Case()
    case.tables = [table.bfloat16() for table in case.tables]
    with pytest.raises(ValueError, match=r"expected tables and down-projections of torch\.float32"):
        case.pair()
