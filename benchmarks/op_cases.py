"""The cases of the kernels' benchmark: an op on a batch of a dataset, and forms that run it on the same tensors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import ModelConfig
from ..data import Batch, Sequences, epoch_batches
from ..kernels import States
from ..models import SideNetwork
from .exact_gradients import exact_loss, exact_side_network, row_losses_reference, side_towers_reference
from .floors import Cost, loss_costs, rank_costs, side_network_costs
from .machine import NOT_INSTALLED
from .settings import KernelSettings

NEEDS_CUDA = "not measured (needs CUDA)"

Run = Callable[[], Sequence[Tensor]]

target_rank_reference = functools.partial(kernels.target_rank, form="reference")


@dataclass(frozen=True)
class OpForm:
    """One way to run an op. `make` imports what the form needs and returns its forward pass."""

    make: Callable[[], Run]
    module: str = ""  # that has to be installed
    needs_cuda: bool = True
    compiled: bool = False  # by torch.compile

    def unable(self, device: torch.device) -> str:
        """Return the reason why the form cannot run on the device, or ""."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return NOT_INSTALLED
        return NEEDS_CUDA if self.needs_cuda and device.type != "cuda" else ""


@dataclass(frozen=True)
class OpCase:
    """One op on one batch, and the forms that run it on the same tensors."""

    op: str
    dtype: torch.dtype
    sizes: dict[str, int]  # users, and what the op makes of them
    forms: dict[str, OpForm]
    costs: dict[str, Cost]  # by pass: the passes that the op has
    leaves: tuple[Tensor, ...] = ()  # what has gradients
    upstream: tuple[Tensor, ...] | None = None  # the outputs' gradients; None for a scalar
    exact: Callable[[], list[Tensor]] | None = None  # the leaves' gradients in fp64


def random_tables(sequences: Sequences, settings: KernelSettings, device: torch.device) -> list[Tensor]:
    """Draw two views' states of the catalogue: bf16 [items + 1, layers, width]; none if no op reads them."""
    if "side-network" not in settings.op_names:
        return []
    generator = torch.Generator(device).manual_seed(settings.seed)
    shape = (len(sequences.item_ids) + 1, settings.layers, settings.width)
    return [torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2)]


def make_cases(
    sequences: Sequences, users: int, tables: list[Tensor], settings: KernelSettings, device: torch.device
) -> Iterator[OpCase]:
    """Yield the ops' cases on one batch, the first of an epoch of that many users a batch.

    Tensors of a case are made when it is yielded.
    """
    batch = next(epoch_batches(sequences, users, settings.seed, epoch=0)).to(device)
    for op in settings.op_names:
        if op == "side-network":
            yield side_network_case(batch, tables, settings)
        elif op.startswith("loss"):
            yield loss_case(op, batch, sequences, settings)
        else:
            yield rank_case(op, batch, sequences, settings)


def side_network_case(batch: Batch, tables: list[Tensor], settings: KernelSettings) -> OpCase:
    """Return the case of IISAN's three towers, at their first weights, over the batch's distinct items."""
    states = [States(table, batch.distinct) for table in tables]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        shape = (settings.layers, settings.width)
        network = SideNetwork([shape, shape], ModelConfig(bottleneck=settings.bottleneck)).to(tables[0].device)
    towers = [network.first.reading(0), network.second.reading(1), network.inter.reading(0, 1)]
    items = len(batch.distinct)
    upstream = random_tensors(tables[0].device, torch.float32, settings.seed, *[(items, settings.width)] * 3)

    def eager() -> list[Tensor]:
        return side_towers_reference(states, towers)

    def compiled() -> Run:
        function = torch.compile(side_towers_reference, dynamic=False)
        return lambda: function(states, towers)

    return OpCase(
        op="side-network",
        dtype=torch.bfloat16,
        sizes={"users": len(batch.users), "items": items},
        forms={
            "eager": OpForm(lambda: eager, needs_cuda=False),
            "eager, bf16": OpForm(lambda: _autocast(eager)),
            "torch.compile": OpForm(compiled, compiled=True),
            "torch.compile, bf16": OpForm(lambda: _autocast(compiled()), compiled=True),
            "triton": OpForm(lambda: functools.partial(kernels.side_towers, states, towers, form="gpu")),
        },
        costs=side_network_costs(items, settings.layers, settings.width, settings.bottleneck),
        leaves=tuple(parameter for tower in towers for parameter in tower[1:]),
        upstream=upstream,
        exact=lambda: exact_side_network(states, towers, upstream),
    )


def loss_case(op: str, batch: Batch, sequences: Sequences, settings: KernelSettings) -> OpCase:
    """Return the case of the loss over the batch's rows and distinct items, in bf16.

    The op "loss" is as trained; "loss-unmasked" has no mask, counts and popularity.
    """
    rows, items = len(batch.targets), len(batch.distinct)
    shapes = (rows, settings.embedding_dim), (items, settings.embedding_dim)
    queries, vectors = random_tensors(batch.targets.device, torch.bfloat16, settings.seed, *shapes)
    vectors *= settings.embedding_dim**-0.5  # logits of variance 1
    leaves = (queries.requires_grad_(), vectors.requires_grad_())
    corrections = {}
    if op == "loss":
        popularity = torch.from_numpy(sequences.popularity).to(batch.distinct.device)
        corrections = {
            "row_users": batch.row_users,
            "history_bits": batch.history_bits,
            "log_multiplicity": batch.multiplicity.log().to(queries.dtype),
            "log_popularity": popularity[batch.distinct].log().to(queries.dtype),
        }
    arguments = (*leaves, batch.targets)

    def compiled() -> Run:
        function = torch.compile(_mean_loss, dynamic=False)
        return lambda: function(*arguments, **corrections)

    forms = {
        "eager": OpForm(lambda: functools.partial(_mean_loss, *arguments, **corrections), needs_cuda=False),
        "torch.compile": OpForm(compiled, compiled=True),
        "triton": OpForm(lambda: lambda: [kernels.inbatch_cross_entropy(*arguments, **corrections, form="gpu")]),
    }
    if op == "loss-unmasked":
        forms["liger-kernel"] = OpForm(lambda: _liger(*arguments), "liger_kernel")
        forms["cut-cross-entropy"] = OpForm(lambda: _cut_cross_entropy(*arguments), "cut_cross_entropy")
    return OpCase(
        op=op,
        dtype=queries.dtype,
        sizes={"users": len(batch.users), "rows": rows, "items": items},
        forms=forms,
        costs=loss_costs(rows, items, settings.embedding_dim),
        leaves=leaves,
        exact=lambda: exact_loss(*arguments, **corrections),
    )


def rank_case(op: str, batch: Batch, sequences: Sequences, settings: KernelSettings) -> OpCase:
    """Return the case of the rank of each user's test target in the whole catalogue, the history excluded."""
    dtype = torch.float32 if op == "target-rank-float32" else torch.bfloat16
    device = batch.users.device
    split = sequences.split("test")
    users = batch.users.cpu().numpy()
    catalogue = len(sequences.item_ids)
    shapes = (len(users), settings.embedding_dim), (catalogue, settings.embedding_dim)
    queries, vectors = random_tensors(device, dtype, settings.seed, *shapes)
    targets, history = (torch.from_numpy(values[users] - 1).to(device) for values in (split.targets, split.history))
    arguments = (queries, vectors, targets, history)

    def compiled() -> Run:
        function = torch.compile(target_rank_reference, dynamic=False)
        return lambda: function(*arguments)

    return OpCase(
        op=op,
        dtype=dtype,
        sizes={"users": len(users), "items": catalogue},
        forms={
            "eager": OpForm(lambda: functools.partial(target_rank_reference, *arguments), needs_cuda=False),
            "torch.compile": OpForm(compiled, compiled=True),
            "triton": OpForm(lambda: functools.partial(kernels.target_rank, *arguments, form="gpu")),
        },
        costs=rank_costs(len(users), catalogue, settings.embedding_dim),
    )


def random_tensors(device: torch.device, dtype: torch.dtype, seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Draw tensors of normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)


def _mean_loss(queries: Tensor, items: Tensor, targets: Tensor, **corrections: Tensor) -> list[Tensor]:
    """Return the mean of the reference's loss over the rows, in a list."""
    return [row_losses_reference(queries, items, targets, **corrections).mean()]


def _liger(queries: Tensor, items: Tensor, targets: Tensor) -> Run:
    """Return a call of Liger-Kernel's fused linear cross-entropy on these tensors."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: [loss(items, queries, targets)]


def _cut_cross_entropy(queries: Tensor, items: Tensor, targets: Tensor) -> Run:
    """Return a call of cut-cross-entropy on these tensors, without its gradient filter."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda: [linear_cross_entropy(queries, items, targets, filter_eps=None)]


def _autocast(run: Run) -> Run:
    """Return a function that makes the call under CUDA autocast to bfloat16."""

    def inside() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return run()

    return inside
