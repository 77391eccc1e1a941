"""Compare the losses of training with products in bfloat16 to those in float32, step by step.

    python -m iisan_fast.benchmarks.loss_in_bfloat16 DATASET --work FOLDER [--out FILE]

Three models train side by side on a CPU, from the same weights, on the same batches of 64 users with the same dropout,
over one view: the titles through the pretrained MiniLM, masked mean. Their matrix products differ, backward included:
in float32; in bf16 except the loss's; all in bf16. A product in bf16 is one of operands rounded to bf16, added up in
float32, as matrix instructions of a GPU do it. In the loss's backward the operands are the probabilities.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import kernels
from ..config import RunConfig, TrainConfig, ViewConfig
from ..data import Batch, Dataset, epoch_batches, load_dataset
from ..models import Recommender, build_recommender
from ..precision import resolve_precision
from ..states import ItemSource
from ..training import open_source
from .harness import folder_argument, run_script, script_parser, write_result
from .machine import origin
from .scientific import CPU, LAYERS, PROTOCOL, encode, minilm

COMMAND = "python -m iisan_fast.benchmarks.loss_in_bfloat16"
VIEW = "title-mean"
LIMIT = 0.01  # of the float32 run's loss at the same step
FLOAT32, EXCEPT_LOSS, BFLOAT16 = "float32", "bfloat16 except the loss", "bfloat16"
PRODUCTS = {  # the place of their first factor; the second follows
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}


def main() -> None:
    """Compare the losses and print the largest difference of each form."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("dataset", type=folder_argument, help="a dataset folder")
    parser.add_argument("--work", type=Path, help="keeps the states here; a repeated call reads them again")
    parser.add_argument("--steps", type=int, default=300, help="of every seed (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each (default: 0 1 2)")
    arguments = parser.parse_args()
    os.environ[kernels.FORM_VARIABLE] = "reference"  # its products are PyTorch's, which can be rounded
    torch.set_num_threads(1)  # its operators are small
    work = arguments.work or Path(tempfile.mkdtemp(prefix="iisan-fast-"))
    view = ViewConfig(VIEW, source="title", encoder=minilm(), pooling="mean", layers=LAYERS)
    encode(arguments.dataset, [view], work / "states")
    options = ["--steps", arguments.steps, "--seeds", *arguments.seeds]
    result = {
        "command": " ".join(map(str, [COMMAND, "DATASET", *options])),
        **origin(arguments.dataset.resolve().name, CPU),
        "limit": LIMIT,
        **compare(arguments.dataset, work / "states", arguments.seeds, arguments.steps),
    }
    if arguments.out is not None:
        write_result(arguments.out, result)
    print(json.dumps(result["largest_difference"], indent=1))


def compare(folder: Path, cache: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    """Return each seed's figures, and the largest difference of each form from float32 over all seeds."""
    dataset = load_dataset(folder, PROTOCOL)
    seeds_figures = []
    for seed in seeds:
        train = TrainConfig(seed=seed, precision="float32")
        config = RunConfig(str(folder), cache=str(cache), views=(VIEW,), protocol=PROTOCOL, train=train)
        with open_source(config, dataset, CPU, "auto", resolve_precision(config, CPU)) as (source, _):
            losses = train_side_by_side(config, dataset, source, steps)
        figures = differences(losses)
        seeds_figures.append({"seed": seed, "float32_losses": losses[FLOAT32], "differences": figures})
        print(f"seed {seed}:", {name: of_form["largest"] for name, of_form in figures.items()}, flush=True)
    largest = {
        name: max(figures["differences"][name]["largest"] for figures in seeds_figures)
        for name in (EXCEPT_LOSS, BFLOAT16)
    }
    return {"steps": steps, "largest_difference": largest, "seeds": seeds_figures}


def train_side_by_side(config: RunConfig, dataset: Dataset, source: ItemSource, steps: int) -> dict[str, list[float]]:
    """Return the losses of all steps by form."""
    precision = resolve_precision(config, CPU)
    popularity = dataset.sequences.popularity
    forms = (FLOAT32, EXCEPT_LOSS, BFLOAT16)
    takers = {name: step_of(name, build_recommender(source, config, popularity, precision), config) for name in forms}
    losses: dict[str, list[float]] = {name: [] for name in forms}
    for _, batch in zip(range(steps), batches(dataset, config.train)):
        for name, take in takers.items():
            losses[name].append(take(batch, source))
    return losses


def batches(dataset: Dataset, config: TrainConfig) -> Iterator[Batch]:
    """Yield the batches of all epochs, in the order that training takes them."""
    for epoch in range(config.max_epochs):
        yield from epoch_batches(dataset.sequences, config.batch_users, config.seed, epoch)


def step_of(form: str, model: Recommender, config: RunConfig) -> Callable[[Batch, ItemSource], float]:
    """Return the function that takes a training step of a form and returns the loss before it."""
    groups = model.train().parameter_groups()
    rates = config.train.learning_rates
    optimizer = torch.optim.Adam([{"params": group, "lr": rates[name]} for name, group in groups.items() if group])

    def take(batch: Batch, source: ItemSource) -> float:
        optimizer.zero_grad()
        with products_of(form):
            loss = model.loss(batch, source.read(batch.distinct))
            loss.backward()
        optimizer.step()
        return loss.item()

    return take


def products_of(form: str) -> AbstractContextManager[Any]:
    """Return the context in which matrix products are those of a form."""
    if form == FLOAT32:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(RoundedProducts())
    if form == EXCEPT_LOSS:
        loss = kernels.inbatch_cross_entropy
        loss_in_double = partial(in_double, loss)
        stack.enter_context(mock.patch.object(kernels, "inbatch_cross_entropy", loss_in_double))
    return stack


class RoundedProducts(TorchDispatchMode):
    """Round float32 factors of matrix products to bf16, in forward and backward; products add up in float32."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator in PRODUCTS:
            place = PRODUCTS[operator]
            factors = map(rounded, arguments[place : place + 2])
            arguments = (*arguments[:place], *factors, *arguments[place + 2 :])
        return operator(*arguments, **(keywords or {}))


def rounded(factor: Tensor) -> Tensor:
    """Return a float32 factor rounded to bf16; doubles stay as they are."""
    return factor.bfloat16().float() if factor.dtype == torch.float32 else factor


def in_double(loss: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
    """Return the loss in double precision, whose products are not rounded."""
    return loss(*map(_as_double, arguments), **{name: _as_double(value) for name, value in named.items()})


def _as_double(value: Any) -> Any:
    """Return a floating tensor in double precision, and any other value as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differences(losses: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return each form's relative differences from the float32 loss at the same step."""
    expected = np.array(losses[FLOAT32])
    figures = {}
    for name in (EXCEPT_LOSS, BFLOAT16):
        relative = np.abs(np.array(losses[name]) - expected) / expected
        figures[name] = {
            "largest": float(relative.max()),
            "at_step": int(relative.argmax()) + 1,
            "median": float(np.median(relative)),
            "steps_within_the_limit": int((relative <= LIMIT).sum()),
            "by_step": [float(f"{value:.2e}") for value in relative],
        }
    return figures


if __name__ == "__main__":
    run_script(main)
