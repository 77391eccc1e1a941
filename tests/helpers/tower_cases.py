"""Towers of the cpu form over random states, and the limits of its difference from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iisan_fast import kernels
from iisan_fast.kernels import States, Tower
from iisan_fast.kernels.reference.side_towers import side_towers as towers_reference

NAMES = ("gate", "down_weight", "down_bias", "up_weight", "up_bias")
INTRA_AND_INTER = ((0,), (1,), (0, 1))


def by_cpu(states, towers, activation, projections=None) -> list[Tensor]:
    """Run the cpu form. It needs projections, so None is replaced by identity matrices."""
    if projections is None:
        projections = [torch.eye(tower.down_weight.shape[2], dtype=tower.down_weight.dtype) for tower in towers]
    return kernels.side_towers(states, towers, activation, projections, form="cpu")


class Case:
    """Towers over random states, drawn in fp32, and the gradients of their outputs."""

    def __init__(
        self,
        items: int = 40,
        layers: int = 3,
        bottleneck: int = 5,
        width: int = 12,
        kinds: Sequence[tuple[int, ...]] = INTRA_AND_INTER,
        gated: bool = True,
        activation: str = "relu",
        in_order: Sequence[int] = (),
        projected: int | None = None,
        upstream: str = "plain",
        table_dtypes: Sequence[torch.dtype | None] = (None, None),
        seed: int = 0,
    ) -> None:
        """Draw tables, parameters and gradients.

        Args: in_order: views whose states are read in order and have a gradient; projected: width of the outputs, None
        for no projections; table_dtypes: dtype of each view, None for that of the weights.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self.kinds = list(kinds)
        self.activation = activation
        self.table_dtypes = table_dtypes
        self.rows = torch.randint(0, items // 2 + 1, (items,), generator=self.generator)  # some items repeat
        self.in_order = list(in_order)
        self.projected = projected
        self.tables = {
            f"view {view}": self.random(items if view in in_order else items // 2 + 1, layers, width)
            for view in range(1 + max(map(max, kinds)))
        }
        self.parameters: dict[str, Tensor] = {}
        for i in range(len(kinds)):
            values = (
                0.1 * self.random(layers),
                self.random(layers, bottleneck, width) / width**0.5,
                0.3 * self.random(layers, bottleneck),
                self.random(layers, width, bottleneck) / bottleneck**0.5,
                0.3 * self.random(layers, width),
            )
            self.parameters |= {f"{name} {i}": value for name, value in zip(NAMES, values) if gated or name != "gate"}
            if projected is not None:
                self.parameters[f"projection {i}"] = self.random(projected, width) / width**0.5
        self.upstream = [self.gradient(upstream, items, projected or width) for _ in kinds]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def gradient(self, kind: str, items: int, width: int) -> Tensor:
        """Return an output gradient [items, width] with the strides of the case."""
        if kind == "expanded":
            return torch.ones(()).expand(items, width)
        if kind == "transposed":
            return self.random(width, items).T
        return self.random(items, width, 2)[..., 0] if kind == "strided" else self.random(items, width)

    @property
    def leaves(self) -> list[str]:
        """Return the tensors that can have a gradient, by name."""
        return [*self.parameters, *(f"view {view}" for view in self.in_order)]

    def forward(
        self, op: Callable, dtype: torch.dtype = torch.float32, wanted: Sequence[str] | None = None, **keywords
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the outputs and the leaves whose gradients are wanted; None: all leaves."""
        parameters = {name: value.to(dtype, copy=True) for name, value in self.parameters.items()}
        tables = {
            name: value.to(table_dtype or dtype, copy=True)
            for (name, value), table_dtype in zip(self.tables.items(), self.table_dtypes)
        }
        chosen = {name: (parameters | tables)[name] for name in (self.leaves if wanted is None else wanted)}
        for leaf in chosen.values():
            leaf.requires_grad_()
        return op(*self.arguments(parameters, tables), **keywords), chosen

    def arguments(self, parameters: dict[str, Tensor], tables: dict[str, Tensor]) -> tuple:
        """Return the op's arguments."""
        states = [
            States(table, None if view in self.in_order else self.rows) for view, table in enumerate(tables.values())
        ]
        towers = [
            Tower(views, *(parameters.get(f"{name} {i}") for name in NAMES)) for i, views in enumerate(self.kinds)
        ]
        projections = None
        if self.projected is not None:
            projections = [parameters[f"projection {i}"] for i in range(len(self.kinds))]
        return states, towers, self.activation, projections

    def backward(self, outputs: list[Tensor], leaves: dict[str, Tensor], **keywords) -> dict[str, Tensor]:
        """Return outputs and gradients by name."""
        upstream = [gradient.to(output.dtype) for gradient, output in zip(self.upstream, outputs)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, **keywords)
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return results | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}

    def run(self, op: Callable, dtype: torch.dtype = torch.float32, wanted=None, **keywords) -> dict[str, Tensor]:
        return self.backward(*self.forward(op, dtype, wanted, **keywords))

    def check(self, in_fp32: bool = True) -> None:
        """Check the CPU form against the reference, in fp64 and in fp32."""
        exact = self.run(towers_reference, torch.float64)
        assert_equal(self.run(by_cpu, torch.float64), exact, rtol=1e-12)
        if in_fp32:
            assert_as_good(self.run(by_cpu), self.run(towers_reference), exact)


def error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).norm().item()


def scale(exact: dict[str, Tensor]) -> float:
    """Return the norm of all tensors together; errors of tensors whose numbers cancel are measured by it."""
    return torch.stack([value.double().norm() for value in exact.values()]).norm().item()


def assert_equal(ours: dict[str, Tensor], exact: dict[str, Tensor], rtol: float) -> None:
    """Check that each error is within rtol of the norm of all tensors, and of 1000 times the tensor's norm."""
    assert ours.keys() == exact.keys()
    whole = scale(exact)
    for name, truth in exact.items():
        difference = error(ours[name], truth)
        assert ours[name].shape == truth.shape and ours[name].dtype == truth.dtype, name
        assert difference <= rtol * min(whole, 1000 * truth.norm().item()), f"{name}: error {difference:.1e}"


def assert_as_good(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == exact.keys()
    eps = torch.finfo(torch.float32).eps
    for name, truth in exact.items():
        difference = error(ours[name], truth)
        allowed = max(8 * error(theirs[name], truth), 32 * eps * truth.norm().item(), 4 * eps * scale(exact))
        assert ours[name].dtype == theirs[name].dtype and difference <= allowed, (
            f"{name}: {difference:.1e} of {allowed:.1e}"
        )
