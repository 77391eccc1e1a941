"""What the kernels cost beside their references and other libraries: time, launches, memory, gradient error, floor.

Every form of an op runs on the same batch of a dataset, its distinct items once, in one process. What could not be
measured says why in its row; no figure is made up.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import ModelConfig
from ..data import Batch, Sequences, epoch_batches
from ..errors import InputError
from ..kernels import States, Tower
from ..models import SideNetwork
from ..progress import progress_bar
from .floors import Cost, device_rates, loss_costs, rank_costs, side_network_costs
from .gpu_timing import WALL_CLOCK, Timing, device_timing, on_capture_stream
from .machine import NOT_INSTALLED, QUANTILES, count_launches, on, origin
from .settings import USERS, KernelSettings

NOTES = {
    "side-network": "bf16: the reference under autocast, with the products in bf16 that triton has; otherwise in fp32",
    "loss-unmasked": "neither masked nor debiased, which is all that liger-kernel (whose forward already makes the "
    "gradients) and cut-cross-entropy (exact: filter_eps=None) can do",
    "target-rank-float32": "as evaluation ranks; no floor, since those of the others count bf16 products",
}
MEASURED, NEEDS_CUDA = "measured", "not measured (needs CUDA)"
WARM_UP_CALLS = 3
CPU_SECONDS = 0.2  # of a row, and at least three calls
MOST_CPU_USERS = 512  # of a batch, where none was asked for
EXACT_ITEMS = 2048  # items whose towers are computed in fp64 at a time
EXACT_LOGITS = 1 << 26  # logits held in fp64 at a time
REASON_LENGTH = 200  # characters of why a form failed

Run = Callable[[], Sequence[Tensor]]

side_towers_reference = functools.partial(kernels.side_towers, form="reference")
target_rank_reference = functools.partial(kernels.target_rank, form="reference")
row_losses_reference = functools.partial(kernels.inbatch_cross_entropy, reduction="none", form="reference")


@dataclass(frozen=True)
class Form:
    """One way to run an op. `make` imports what it needs and returns the forward pass."""

    make: Callable[[], Run]
    module: str = ""  # that has to be installed
    needs_cuda: bool = True
    compiled: bool = False  # by torch.compile

    def unable(self, device: torch.device) -> str:
        """Why the form cannot run here, or nothing."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return NOT_INSTALLED
        return NEEDS_CUDA if self.needs_cuda and device.type != "cuda" else ""


@dataclass(frozen=True)
class Work:
    """One op on one batch, and the forms that run it on the very same tensors."""

    op: str
    dtype: torch.dtype
    sizes: dict[str, int]  # users, and what the op makes of them
    forms: dict[str, Form]
    costs: dict[str, Cost]  # by pass: the passes that the op has
    leaves: tuple[Tensor, ...] = ()  # what has gradients
    upstream: tuple[Tensor, ...] | None = None  # the outputs' gradients; None for a scalar
    exact: Callable[[], list[Tensor]] | None = None  # the leaves' gradients in fp64


def benchmark(sequences: Sequences, name: str, settings: KernelSettings, device: torch.device) -> dict[str, Any]:
    """Rows for every op, batch, form and pass, with the machine and the versions that made them."""
    users, left_out = batch_sizes(sequences, name, settings, device)
    measured = []
    with progress_bar("benchmark", len(users) * len(settings.ops), "ops") as advance, on(device):
        tables = random_tables(sequences, settings, device)
        for count in users:
            for work in make_works(sequences, count, tables, settings, device):
                measured += measure_work(chosen_forms(work, settings), device, exact=count <= settings.exact_users)
                advance(1, f"{work.op}, {count:,} users")
    return {
        **origin(name, device),
        "shapes": {"width": settings.width, "layers": settings.layers, "bottleneck": settings.bottleneck}
        | {"embedding_dim": settings.embedding_dim, "catalogue": len(sequences.item_ids), "seed": settings.seed},
        "rates_of_the_floors": (rates := device_rates(device)) and asdict(rates),
        "notes": {op: NOTES[op] for op in settings.ops if op in NOTES},
        "not_measured": left_out,
        "rows": measured,
    }


def chosen_forms(work: Work, settings: KernelSettings) -> Work:
    """Return the work with the forms that were asked for. Raises InputError where it has none of that name."""
    if unknown := [name for name in settings.forms if name not in work.forms]:
        raise InputError(f"--form {unknown[0]!r}: expected one of {'; '.join(work.forms)}, the forms of {work.op}")
    chosen = {name: form for name, form in work.forms.items() if not settings.forms or name in settings.forms}
    return replace(work, forms=chosen)


def batch_sizes(
    sequences: Sequences, name: str, settings: KernelSettings, device: torch.device
) -> tuple[list[int], dict[str, str]]:
    """Users a batch, and why others are left out that nobody asked for. Raises InputError for more than there are."""
    most = len(sequences.user_ids)
    for count in settings.users:
        if not 1 <= count <= most:
            raise InputError(f"--users {count}: expected 1 to {most}, the users of {name}")
    if settings.users:
        return list(dict.fromkeys(settings.users)), {}
    left_out = {count: f"{name} has {most:,} users" for count in USERS if count > most}
    if device.type != "cuda":
        left_out |= {count: "needs CUDA, or --users" for count in USERS if count > MOST_CPU_USERS}
    chosen = [count for count in USERS if count not in left_out] or [most]
    return chosen, {f"{count:,} users": reason for count, reason in left_out.items()}


def random_tables(sequences: Sequences, settings: KernelSettings, device: torch.device) -> list[Tensor]:
    """Two views' hidden states of the whole catalogue: bf16 [items + 1, layers, width]; none without the op."""
    if "side-network" not in settings.ops:
        return []
    generator = torch.Generator(device).manual_seed(settings.seed)
    shape = (len(sequences.item_ids) + 1, settings.layers, settings.width)
    return [torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2)]


def make_works(
    sequences: Sequences, users: int, tables: list[Tensor], settings: KernelSettings, device: torch.device
) -> Iterator[Work]:
    """The ops on one batch, the first of an epoch of that many users a step; tensors are made as each is asked for."""
    batch = next(epoch_batches(sequences, users, settings.seed, epoch=0)).to(device)
    for op in settings.ops:
        if op == "side-network":
            yield side_network_work(batch, tables, settings)
        elif op.startswith("loss"):
            yield loss_work(op, batch, sequences, settings)
        else:
            yield rank_work(op, batch, sequences, settings)


def side_network_work(batch: Batch, tables: list[Tensor], settings: KernelSettings) -> Work:
    """IISAN's three towers at their first weights, over the batch's distinct items."""
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

    return Work(
        op="side-network",
        dtype=torch.bfloat16,
        sizes={"users": len(batch.users), "items": items},
        forms={
            "eager": Form(lambda: eager, needs_cuda=False),
            "eager, bf16": Form(lambda: _autocast(eager)),
            "torch.compile": Form(compiled, compiled=True),
            "torch.compile, bf16": Form(lambda: _autocast(compiled()), compiled=True),
            "triton": Form(lambda: functools.partial(kernels.side_towers, states, towers, form="gpu")),
        },
        costs=side_network_costs(items, settings.layers, settings.width, settings.bottleneck),
        leaves=tuple(parameter for tower in towers for parameter in tower[1:]),
        upstream=upstream,
        exact=lambda: exact_side_network(states, towers, upstream),
    )


def loss_work(op: str, batch: Batch, sequences: Sequences, settings: KernelSettings) -> Work:
    """The loss over the batch's rows and distinct items, bf16: as trained, or without mask, counts and popularity."""
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
        "eager": Form(lambda: functools.partial(_mean_loss, *arguments, **corrections), needs_cuda=False),
        "torch.compile": Form(compiled, compiled=True),
        "triton": Form(lambda: lambda: [kernels.inbatch_cross_entropy(*arguments, **corrections, form="gpu")]),
    }
    if op == "loss-unmasked":
        forms["liger-kernel"] = Form(lambda: _liger(*arguments), "liger_kernel")
        forms["cut-cross-entropy"] = Form(lambda: _cut_cross_entropy(*arguments), "cut_cross_entropy")
    return Work(
        op=op,
        dtype=queries.dtype,
        sizes={"users": len(batch.users), "rows": rows, "items": items},
        forms=forms,
        costs=loss_costs(rows, items, settings.embedding_dim),
        leaves=leaves,
        exact=lambda: exact_loss(*arguments, **corrections),
    )


def rank_work(op: str, batch: Batch, sequences: Sequences, settings: KernelSettings) -> Work:
    """The rank of each user's test target in the full catalogue, the history excluded."""
    dtype = torch.float32 if op == "target-rank-float32" else torch.bfloat16
    device, split, users = batch.users.device, sequences.split("test"), batch.users.cpu().numpy()
    catalogue = len(sequences.item_ids)
    shapes = (len(users), settings.embedding_dim), (catalogue, settings.embedding_dim)
    queries, vectors = random_tensors(device, dtype, settings.seed, *shapes)
    targets, history = (torch.from_numpy(values[users] - 1).to(device) for values in (split.targets, split.history))
    arguments = (queries, vectors, targets, history)

    def compiled() -> Run:
        function = torch.compile(target_rank_reference, dynamic=False)
        return lambda: function(*arguments)

    return Work(
        op=op,
        dtype=dtype,
        sizes={"users": len(users), "items": catalogue},
        forms={
            "eager": Form(lambda: functools.partial(target_rank_reference, *arguments), needs_cuda=False),
            "torch.compile": Form(compiled, compiled=True),
            "triton": Form(lambda: functools.partial(kernels.target_rank, *arguments, form="gpu")),
        },
        costs=rank_costs(len(users), catalogue, settings.embedding_dim),
    )


def measure_work(work: Work, device: torch.device, exact: bool) -> list[dict[str, Any]]:
    """A row for every form and pass. `exact`: with the gradients' error against fp64."""
    truth = functools.cache(work.exact) if exact and work.exact else None
    measured = []
    for name, form in work.forms.items():
        unable = form.unable(device)
        for passes, graphs_kept in ((("forward", "both"), False), (("backward",), True)):
            make = functools.cache(form.make)
            with _fresh_compiler(graphs_kept) if form.compiled and not unable else nullcontext():
                for direction in passes:
                    if direction in work.costs:
                        row = blank_row(work, name, direction, device)
                        measured.append(fill(row, work, unable, make, device, truth))
    return measured


def blank_row(work: Work, form: str, direction: str, device: torch.device) -> dict[str, Any]:
    """A row without its figures; those that are not measured stay None."""
    rates = device_rates(device)
    has_floor = rates is not None and work.dtype == torch.bfloat16
    return {
        "op": work.op,
        "dtype": str(work.dtype).removeprefix("torch."),
        **work.sizes,
        "form": form,
        "pass": direction,
        "status": MEASURED,
        **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "timed", "launches", "peak_bytes", "gradient_error")),
        "floor_ms": work.costs[direction].floor_ms(rates) if has_floor else None,
        "floor_share": None,
    }


def fill(
    row: dict[str, Any],
    work: Work,
    unable: str,
    make: Callable[[], Run],
    device: torch.device,
    truth: Callable[[], list[Tensor]] | None,
) -> dict[str, Any]:
    """The row with its figures, or with what kept it from having any."""
    if unable:
        return row | {"status": unable}
    try:
        row |= measure(work, make(), row["pass"], device, truth)
        if row["floor_ms"]:
            row["floor_share"] = row["floor_ms"] / row["p50_ms"]
    except Exception as error:  # a failure is a result too, whatever another library raises
        row["status"] = f"failed: {_reason(error)}"
    if device.type == "cuda":  # the next row begins with as much memory
        gc.collect()
        torch.cuda.empty_cache()
    return row


def measure(
    work: Work, run: Run, direction: str, device: torch.device, truth: Callable[[], list[Tensor]] | None = None
) -> dict[str, Any]:
    """Times, launches, memory and gradient error of one pass of one form; on the CPU, no launches and no memory."""
    on_gpu, figures = device.type == "cuda", {}
    with on_capture_stream(device) if on_gpu else nullcontext():
        call = timed_call(work, run, direction)
        if on_gpu:
            for _ in range(WARM_UP_CALLS):
                call()
            figures["peak_bytes"] = peak_bytes(call, device)
            figures["launches"] = count_launches(call)
            timing = device_timing(call)
        else:
            timing = Timing(cpu_quantiles(call), WALL_CLOCK)
        figures |= {**dict(zip(("p20_ms", "p50_ms", "p80_ms"), timing.quantiles)), "timed": timing.timed}
        if direction == "both" and truth is not None:
            figures["gradient_error"] = gradient_error(call(), truth)
    return figures


def timed_call(work: Work, run: Run, direction: str) -> Run:
    """What a pass is: the forward; gradients from the inputs on; or gradients of a forward that is kept."""
    if direction == "forward":
        return run
    if direction == "both":
        return lambda: torch.autograd.grad(run(), work.leaves, work.upstream)
    outputs = run()
    return lambda: torch.autograd.grad(outputs, work.leaves, work.upstream, retain_graph=True)


def cpu_quantiles(call: Run) -> list[float]:
    """The same by the wall clock, after one call to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < CPU_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return [1000 * float(value) for value in np.quantile(times, QUANTILES)]


def peak_bytes(call: Run, device: torch.device) -> int:
    """The most that a call allocates on the GPU beyond what is there before it, its results included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    del results
    return torch.cuda.max_memory_allocated(device) - before


def gradient_error(gradients: Sequence[Tensor], truth: Callable[[], list[Tensor]]) -> float | None:
    """||g - g64|| / ||g64|| over all gradients together; None where fp64 does not fit."""
    try:
        exact = truth()
    except torch.OutOfMemoryError:
        return None
    apart = sum(float((ours.double() - best).square().sum()) for ours, best in zip(gradients, exact))
    return math.sqrt(apart / sum(float(best.square().sum()) for best in exact))


def exact_side_network(states: list[States], towers: list[Tower], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the towers' parameters by the reference in fp64, some items at a time."""
    parameters = [[value.detach().double().requires_grad_() for value in tower[1:]] for tower in towers]
    doubles = [Tower(tower.views, *values) for tower, values in zip(towers, parameters)]
    leaves = [value for values in parameters for value in values]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for part in torch.arange(len(upstream[0]), device=upstream[0].device).split(EXACT_ITEMS):
        views = [States(view.table[view.rows[part]].double()) for view in states]
        outputs = side_towers_reference(views, doubles)
        for sum_, gradient in zip(total, torch.autograd.grad(outputs, leaves, [g[part].double() for g in upstream])):
            sum_ += gradient
    return total


def exact_loss(queries: Tensor, items: Tensor, targets: Tensor, **corrections: Tensor) -> list[Tensor]:
    """Gradients of queries and items of the mean loss by the reference in fp64, some rows at a time."""
    corrections = {name: value.double() if value.is_floating_point() else value for name, value in corrections.items()}
    row_users = corrections.pop("row_users", None)
    vectors = items.detach().double().requires_grad_()
    of_queries, of_items = [], torch.zeros_like(vectors)
    for part in torch.arange(len(queries), device=queries.device).split(max(1, EXACT_LOGITS // len(items))):
        some = queries.detach()[part].double().requires_grad_()
        users = None if row_users is None else row_users[part]
        loss = row_losses_reference(some, vectors, targets[part], users, **corrections).sum() / len(queries)
        gradients = torch.autograd.grad(loss, (some, vectors))
        of_queries.append(gradients[0])
        of_items += gradients[1]
    return [torch.cat(of_queries), of_items]


def random_tensors(device: torch.device, dtype: torch.dtype, seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors of normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)


def _mean_loss(queries: Tensor, items: Tensor, targets: Tensor, **corrections: Tensor) -> list[Tensor]:
    return [row_losses_reference(queries, items, targets, **corrections).mean()]


def _liger(queries: Tensor, items: Tensor, targets: Tensor) -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: [loss(items, queries, targets)]


def _cut_cross_entropy(queries: Tensor, items: Tensor, targets: Tensor) -> Run:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: [linear_cross_entropy(queries, items, targets, filter_eps=None)]


def _autocast(run: Run) -> Run:
    def inside() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return run()

    return inside


@contextmanager
def _fresh_compiler(graphs_kept: bool) -> Iterator[None]:
    """Forgets what was compiled. Graphs kept for a second backward must not lend their memory to the first."""
    from torch._functorch import config

    torch.compiler.reset()
    with config.patch(donated_buffer=config.donated_buffer and not graphs_kept):
        yield


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH]
