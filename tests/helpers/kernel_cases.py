"""Random operands of the ops, and the limits of a form's difference from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import Phase
from torch import Tensor

from iisan_fast import kernels
from iisan_fast.kernels import AddedScores, States, Tower
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference
from iisan_fast.kernels.reference import side_towers as towers_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTRA_AND_INTER = ((0,), (1,), (0, 1))
UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # the interpreter is too slow to shrink an example in


class SideCase:
    """Towers over random states, and the output gradients to pull back through them."""

    def __init__(
        self,
        items: int = 21,
        layers: int = 3,
        width: int = 48,
        bottleneck: int = 16,
        kinds: Sequence[tuple[int, ...]] = INTRA_AND_INTER,
        gated: bool = True,
        activation: str = "relu",
        dense: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dense: views that are read in order and take a gradient; the others are rows of a table."""
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

        self.activation = activation
        self.dtype = dtype
        rows = torch.randint(0, items + 3, (items,), generator=generator).to(DEVICE)
        self.states = [
            States(random(items, layers, width)) if view in dense else States(random(items + 3, layers, width), rows)
            for view in range(1 + max(map(max, kinds)))
        ]
        self.dense = dense
        self.towers = [
            Tower(
                kind,
                random(layers, std=0.1) if gated else None,
                random(layers, bottleneck, width, std=width**-0.5),
                random(layers, bottleneck, std=0.3),
                random(layers, width, bottleneck, std=bottleneck**-0.5),
                random(layers, width, std=0.3),
            )
            for kind in kinds
        ]
        self.gradients = [random(items, width) for _ in kinds]

    def run(self, op: Callable, dtype: torch.dtype | None = None, wanted: Sequence[int] | None = None) -> list[Tensor]:
        """Return outputs, then gradients of all parameters and dense views, or of those numbered in `wanted`."""
        dtype = dtype or self.dtype

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).clone()

        towers = [Tower(t.views, *(None if p is None else leaf(p) for p in t[1:])) for t in self.towers]
        states = [States(leaf(view.table), view.rows) for view in self.states]
        leaves = [p for tower in towers for p in tower[1:] if p is not None] + [states[v].table for v in self.dense]
        chosen = [leaves[i] for i in (range(len(leaves)) if wanted is None else wanted)]
        for tensor in chosen:
            tensor.requires_grad_()
        outputs = op(states, towers, self.activation)
        gradients = [gradient.to(dtype) for gradient in self.gradients]
        return [*outputs, *torch.autograd.grad(outputs, chosen, gradients)]

    def check(self, wanted: Sequence[int] | None = None) -> None:
        """Compare Triton with the reference in the case's precision and in fp64."""
        self.assert_like_reference(self.run(by_gpu, wanted=wanted), wanted)

    def assert_like_reference(self, ours: list[Tensor], wanted: Sequence[int] | None = None) -> None:
        theirs, exact = (
            self.run(towers_reference.side_towers, dtype=dtype, wanted=wanted) for dtype in (None, torch.float64)
        )
        assert_as_good(theirs, ours, exact, self.dtype)


class LossCase:
    """Queries, items and everything the loss takes, drawn at random with targets among the users' own items."""

    def __init__(
        self,
        rows: int,
        columns: int,
        d: int = 32,
        users: int = 3,
        masked: bool = True,
        counted: bool = True,
        debiased: bool = True,
        dtype: torch.dtype = torch.float32,
        has_item: Tensor | None = None,
    ) -> None:
        """has_item: bool [users, columns] that replaces the random mask; the targets are added to it."""
        generator = torch.Generator().manual_seed(7)
        self.dtype = dtype
        self.queries, self.items = (
            torch.randn(n, d, generator=generator).to(dtype).to(DEVICE) for n in (rows, columns)
        )
        self.targets = torch.randint(0, max(columns, 1), (rows,), generator=generator)
        row_users = torch.randint(0, users, (rows,), generator=generator)
        has_item = torch.rand(users, columns, generator=generator) < 0.1 if has_item is None else has_item.clone()
        has_item[row_users, self.targets] = True
        self.keywords = {
            "targets": self.targets.to(DEVICE),
            "row_users": row_users.to(DEVICE) if masked else None,
            "history_bits": pack(has_item).to(DEVICE) if masked else None,
            "log_multiplicity": torch.randint(1, 6, (columns,), generator=generator).log().to(DEVICE)
            if counted
            else None,
            "log_popularity": torch.rand(columns, generator=generator).log().to(DEVICE) if debiased else None,
        }
        self.gradient = torch.randn(rows, generator=generator).to(DEVICE)

    def run(self, op: Callable, dtype: torch.dtype | None = None, wanted: Sequence[int] = (0, 1)) -> list[Tensor]:
        """Return row losses, then the gradients of queries and items, or of those in `wanted`."""
        dtype = dtype or self.dtype
        leaves = [tensor.detach().to(dtype).clone() for tensor in (self.queries, self.items)]
        chosen = [leaves[i].requires_grad_() for i in wanted]
        keywords = {
            name: value.to(dtype)
            if value is not None and value.is_floating_point() and dtype == torch.float64
            else value
            for name, value in self.keywords.items()
        }
        losses = op(*leaves, **keywords)
        return [losses, *torch.autograd.grad(losses, chosen, self.gradient.to(losses.dtype))]

    def check(self, wanted: Sequence[int] = (0, 1)) -> None:
        ours = self.run(loss_by_gpu, wanted=wanted)
        theirs, exact = (
            self.run(loss_reference.inbatch_cross_entropy, dtype, wanted) for dtype in (None, torch.float64)
        )
        assert_as_good(theirs, ours, exact, self.dtype)


def rank_case(users: int, catalogue: int, d: int, excluded: int) -> tuple[Tensor, ...]:
    """Return operands of small integers: every dtype and order of sums gives the same scores, with many ties."""
    generator = torch.Generator().manual_seed(users + catalogue)
    queries, items = (torch.randint(-2, 3, (n, d), generator=generator).float() for n in (users, catalogue))
    targets = torch.randint(0, catalogue, (users,), generator=generator)
    history = torch.randint(-1, catalogue, (users, excluded), generator=generator)
    return tuple(tensor.to(DEVICE) for tensor in (queries, items, targets, history))


def added_case(targets: Tensor, excluded: Tensor, catalogue: int, dtype: torch.dtype, entries: int = 7) -> AddedScores:
    """Return small integers for `entries` random items of each user, none for every third one.

    For half of the users, the target and the excluded items come first among these items.
    """
    users = len(targets)
    generator = torch.Generator(targets.device).manual_seed(users + catalogue)
    order = torch.rand(users, catalogue, generator=generator, device=targets.device)
    preferred = torch.cat([targets[:, None], excluded.clamp(min=0)], dim=1)[::2]
    order[::2] = order[::2].scatter(1, preferred, 2)
    items, _ = order.topk(min(entries, catalogue)).indices.sort(dim=1)
    has_entries = torch.arange(users, device=targets.device) % 3 != 1
    offsets = (has_entries * items.shape[1]).cumsum(0)
    items = items[has_entries].flatten()
    values = torch.randint(-3, 4, items.shape, generator=generator, device=targets.device).to(dtype)
    return AddedScores(torch.cat([offsets.new_zeros(1), offsets]), items, values)


def tied_case(users: int, catalogue: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor | AddedScores, ...]:
    """Return arguments of the rank in which every item stands twice in the catalogue, with equal added scores.

    So each target ties with its copy. A third of the items has an added score; no item is excluded.
    """
    generator = torch.Generator(device).manual_seed(3)
    order = torch.randperm(2 * catalogue, generator=generator, device=device)
    vectors = torch.randn(catalogue, 64, generator=generator, device=device).to(dtype)
    queries = torch.randn(users, 64, generator=generator, device=device).to(dtype)
    values = torch.randn(users, catalogue, generator=generator, device=device)
    touched = (torch.rand(users, catalogue, generator=generator, device=device) < 1 / 3).repeat(1, 2)[:, order]
    targets = torch.randint(0, 2 * catalogue, (users,), generator=generator, device=device)
    offsets = torch.cat([targets.new_zeros(1), touched.sum(1).cumsum(0)])
    added = AddedScores(offsets, touched.nonzero()[:, 1], values.repeat(1, 2)[:, order][touched].to(dtype))
    return queries, vectors.repeat(2, 1)[order], targets, targets.new_full((users, 1), -1), added


def assert_copies_tie(arguments: tuple[Tensor | AddedScores, ...], form: str) -> None:
    """Check the ranks of a `tied_case`: two other scores in a million are equal by chance."""
    *tensors, added = arguments
    _, ranks = kernels.target_rank(*tensors, form=form, added=added)
    assert (ranks % 1 == 0.5).double().mean() > 0.998


class TopCase:
    """Arguments of `top_items`: small integers, so that every dtype and order of sums gives the same scores."""

    def __init__(self, users: int, catalogue: int, d: int, dtype: torch.dtype, device: str = "cpu") -> None:
        """Draw queries, items, excluded items with repeats, allowed items and added scores."""
        generator = torch.Generator().manual_seed(users + catalogue)

        def numbers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        self.queries, self.items = (numbers(-2, 3, count, d).to(dtype).to(device) for count in (users, catalogue))
        excluded = numbers(-1, catalogue, users, 6)
        excluded[:, 1] = -1
        excluded[:, 2] = excluded[:, 3]
        added = added_case(excluded[:, 4].clamp(min=0), excluded, catalogue, dtype)
        self.excluded = excluded.to(device)
        self.allowed = (numbers(0, 8, catalogue) > 0).to(device)
        self.added: AddedScores | None = AddedScores(*(part.to(device) for part in added))

    def tensors(self) -> list[Tensor]:
        """Return all arguments that are tensors."""
        return [self.queries, self.items, self.excluded, self.allowed, *(self.added or ())]

    def best(self, count: int, form: str, chunk_elements: int = 1 << 24) -> tuple[Tensor, Tensor]:
        """Return the best items and their scores in a form."""
        return kernels.top_items(
            self.queries, self.items, count, self.excluded, self.allowed, chunk_elements, form, self.added
        )

    def sorted(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the best items and their scores, float64, from a dense matrix of scores."""
        scores = self.queries.double() @ self.items.double().T
        if self.added is not None:
            scores[self.added.users(), self.added.items] += self.added.values.double()
        is_out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        is_out = is_out.scatter(1, self.excluded + 1, True)[:, 1:] | ~self.allowed
        values, rows = scores.masked_fill(is_out, -torch.inf).sort(dim=1, descending=True, stable=True)
        rows = rows.masked_fill(values == -torch.inf, -1)[:, :count]
        missing = count - rows.shape[1]
        pad = torch.nn.functional.pad
        return pad(rows, (0, missing), value=-1), pad(values[:, :count], (0, missing), value=-torch.inf)


def assert_best_items(case: TopCase, count: int, form: str, chunk_elements: int = 1 << 24) -> None:
    """Check a form against the dense sort: the same rows and the same scores, ties by row."""
    rows, values = case.best(count, form, chunk_elements)
    expected, exact = case.sorted(count)
    assert values.dtype == case.queries.dtype and rows.dtype == torch.int64
    assert torch.equal(rows, expected) and torch.equal(values.double(), exact)


def by_gpu(*arguments) -> list[Tensor]:
    return kernels.side_towers(*arguments, form="gpu")


def loss_by_gpu(*arguments, **keywords) -> Tensor:
    return kernels.inbatch_cross_entropy(*arguments, **keywords, reduction="none", form="gpu")


def assert_as_good(results: Sequence, ours: Sequence, exact: Sequence, dtype: torch.dtype, factor: float = 8) -> None:
    """Check that each tensor's error is at most `factor` times that of the reference in the same precision."""
    floor = 32 * torch.finfo(dtype).eps
    for i, (theirs, mine, truth) in enumerate(zip(results, ours, exact, strict=True)):
        assert mine.shape == truth.shape
        error = relative_error(mine, truth)
        allowed = max(factor * relative_error(theirs, truth), floor)
        assert error <= allowed, f"tensor {i}: error {error:.2e}, allowed {allowed:.2e}"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return ||result - exact|| / ||exact||; NaN if the result has one."""
    scale = exact.norm().item()
    return (result.detach().double() - exact).norm().item() / (scale or 1.0)


def pack(has_item: Tensor) -> Tensor:
    """Return int32 [users, ceil(columns / 32)]: bit v % 32 of word v // 32 is has_item[user, v]."""
    users, columns = has_item.shape
    padded = torch.zeros(users, -(-columns // 32) * 32, dtype=torch.int64)
    padded[:, :columns] = has_item
    words = (padded.view(users, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def strided(tensor: Tensor) -> Tensor:
    """Return an equal tensor, every dimension of which is strided."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]
