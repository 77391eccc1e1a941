"""The equality harness: every form of the training step must give the reference's loss and gradients.

A form is a function from a `Step` to a `Result` and how close it comes; list it in FORMS and the tests compare it with
the independently written reference (padded, one user at a time) for every case, dropout on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.recommenders import side_recommender
from helpers.reference_step import ReferenceSettings, reference_loss
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import kernels
from iisan_fast.benchmarks.dense import DenseTrainer
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.data.epoch_plan import Window
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels.cpu import library
from iisan_fast.models.recommender import Recommender
from iisan_fast.states.feature_table import FeatureTable, PinnedTable, load_table
from iisan_fast.states.item_source import ItemSource
from iisan_fast.states.loader import PlannedBatch, prepared_batches
from iisan_fast.training.fused_step import CpuFusedStep, GpuFusedStep, fused_step_refusal
from iisan_fast.training.training_step import CapturedStep, TrainingStep


@dataclass(frozen=True)
class Step:
    """One training step: the model's shape, the data, and who is in the batch."""

    model: ModelConfig
    table: FeatureTable
    sequences: Sequences
    users: np.ndarray
    step: int
    seed: int = 3

    def recommender(self) -> Recommender:
        """Return the model in fp64 and training mode; its gates and biases are not 0, so that errors in them show."""
        model = side_recommender(
            self.table.shapes, self.model, self.sequences.max_inputs, self.sequences.popularity, self.seed
        ).double()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model.train()


@dataclass(frozen=True)
class Result:
    """The loss and, by parameter name, its gradient."""

    loss: Tensor
    gradients: dict[str, Tensor]


def from_reference(step: Step) -> Result:
    """Run the specification, helpers/reference_step.py, on plain lists and tensors."""
    parameters = first_parameters(step)
    loss = reference_loss_of(step, parameters)
    loss.backward()
    return Result(loss.detach(), {name: parameter.grad for name, parameter in parameters.items()})


def first_parameters(step: Step) -> dict[str, Tensor]:
    """Return copies of a step's weights, to be trained, under the reference's names."""
    return {
        name: parameter.detach().clone().requires_grad_() for name, parameter in named_by_reference(step.recommender())
    }


def reference_loss_of(step: Step, parameters: dict[str, Tensor]) -> Tensor:
    """Return the loss of a step by the specification, of these parameters."""
    offsets, items = step.sequences.training
    model = step.model
    settings = ReferenceSettings(
        embedding_dim=model.embedding_dim,
        max_inputs=step.sequences.max_inputs,
        blocks=model.blocks,
        heads=model.attention_heads,
        dropout=model.dropout,
        seed=step.seed,
        method=model.method,
        activation=model.activation,
        gates=model.gates,
        intra=model.intra,
        inter=model.inter is not False,
    )
    views = step.table.views
    return reference_loss(
        parameters,
        settings,
        views[0],
        views[1] if len(views) == 2 else None,
        [items[offsets[user] : offsets[user + 1]].tolist() for user in step.users],
        step.users.tolist(),
        torch.from_numpy(step.sequences.popularity),
        step.step,
    )


def rates_by_name(step: Step, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rate of each parameter, under the reference's names."""
    model = step.recommender()
    rate_of = {id(weight): rates[group] for group, weights in model.parameter_groups().items() for weight in weights}
    return {name: rate_of[id(parameter)] for name, parameter in named_by_reference(model)}


def from_recommender(step: Step) -> Result:
    """Run the recommender op by op, and differentiate by autograd."""
    model = step.recommender()
    batch = make_batch(step.sequences, step.users, step.step)
    return _differentiated(model, model.loss(batch, step.table.read(batch.distinct)))


def from_autograd(step: Step) -> Result:
    """Run the trainer's step by autograd, with learning rates of 0."""
    model = step.recommender()
    batch = make_batch(step.sequences, step.users, step.step)
    taken = TrainingStep(model, dict.fromkeys(model.parameter_groups(), 0.0), torch.device("cpu"))
    return _result(model, taken(batch, step.table.read(batch.distinct)))


def from_fused_step(step: Step, table: ItemSource | None = None) -> Result:
    """Run the fused step after a step of other users, so that memory is reused; table: None for the step's."""
    model = step.recommender()
    cpu = torch.device("cpu")
    source = step.table if table is None else table
    taken = CpuFusedStep(model, dict.fromkeys(model.parameter_groups(), 0.0))
    batches = [make_batch(step.sequences, users, number) for users, number in _two_batches(step)]
    for prepared in prepared_batches(iter(batches), source, cpu):
        loss = taken(prepared.batch, prepared.item_inputs)
    return _result(model, loss.clone())


def from_fused_pinned(step: Step) -> Result:
    """Run the fused step with the table in host memory; its rows are gathered ahead."""
    return from_fused_step(step, PinnedTable(step.table.views, torch.device("cpu")))


def from_fused_mapped(step: Step) -> Result:
    """Run the fused step with the table in the store's file."""
    with mapped_table(step) as table:
        return from_fused_step(step, table)


def from_padded(step: Step) -> Result:
    """Run the step on a batch padded to the shape of larger batches, as it is captured in a CUDA graph."""
    model = step.recommender()
    batch = make_batch(step.sequences, step.users, step.step)
    padded = batch.padded(padded_shape(step.sequences, len(step.users) + 3))
    return _differentiated(model, model.loss(padded, step.table.read(padded.distinct)))


def from_packed(step: Step) -> Result:
    """Run the step on a padded batch read from one buffer, its step number a tensor, as a CUDA graph reads it."""
    model = step.recommender()
    batch = make_batch(step.sequences, step.users, step.step)
    padded = batch.padded(padded_shape(step.sequences, len(step.users)))
    static = Batch.unpacked(padded.packed(), padded.shape)
    return _differentiated(model, model.loss(static, step.table.read(static.distinct)))


def from_pinned(step: Step) -> Result:
    """Run the step with the table in host memory; its rows are gathered ahead."""
    model = step.recommender()
    table = PinnedTable(step.table.views, torch.device("cpu"))
    (prepared,) = prepared_batches(
        iter([make_batch(step.sequences, step.users, step.step)]), table, torch.device("cpu")
    )
    return _differentiated(model, model.loss(prepared.batch, prepared.item_inputs))


def from_mapped(step: Step) -> Result:
    """Run the step with the table in the store's file."""
    with mapped_table(step) as table:
        model = step.recommender()
        cpu = torch.device("cpu")
        (prepared,) = prepared_batches(iter([make_batch(step.sequences, step.users, step.step)]), table, cpu)
        return _differentiated(model, model.loss(prepared.batch, prepared.item_inputs))


@contextmanager
def mapped_table(step: Step) -> Iterator[ItemSource]:
    """Write a step's table into a store, which holds fp32 at most, and map it."""
    with TemporaryDirectory() as folder:
        names = ["one", "two"][: len(step.table.views)]
        cache = fill_store(Path(folder) / "cache", step.sequences.item_ids, step.table, tuple(names))
        item_ids = step.sequences.item_ids
        cpu = torch.device("cpu")
        with closing(load_table(cache, names, item_ids, cpu, "mapped", torch.float64)) as table:
            yield table


def by_form(name: str) -> Callable[[Step], Result]:
    """Return the step with every op by a named form."""

    def run(step: Step) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(kernels.FORM_VARIABLE, name)
            return from_recommender(step)

    return run


def from_dense(step: Step) -> Result:
    """Run the benchmark's version of the released code's step."""
    model = step.recommender()
    rates = dict.fromkeys(model.parameter_groups(), 0.0)
    dense = DenseTrainer(model, list(step.table.views), step.sequences, rates, step.seed)
    return _differentiated(model, dense.loss(step.users, step.step))


def from_gpu(step: Step) -> Result:
    """Run the step in fp32 by Triton's kernels, which have no fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = step.recommender().float().to(device)
    table = FeatureTable(tuple(view.float().to(device) for view in step.table.views))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.FORM_VARIABLE, "gpu")
        batch = make_batch(step.sequences, step.users, step.step).to(torch.device(device))
        return _differentiated(model, model.loss(batch, table.read(batch.distinct)))


def from_fused_gpu(step: Step, pinned: bool = False) -> Result:
    """Run the fused step in fp32 by Triton's kernels, after a step of other users in an earlier window."""
    plan = RunPlan.of(step.sequences, len(step.users), step.seed)
    taken, source = fused_gpu_step(step, plan, pinned=pinned)
    for users, number in _two_batches(step):
        packed = plan.pack(Window(users, number))
        inputs = source.read(packed.items[0]) if pinned else None
        loss = taken(PlannedBatch(packed.words.to(taken.record.device), inputs, *packed.sizes[0]))
    return _result(taken.model, loss)


def fused_gpu_step(
    step: Step, plan: RunPlan, rates: Mapping[str, float] | None = None, pinned: bool = False
) -> tuple[GpuFusedStep, ItemSource]:
    """Return the fused step in fp32 by Triton's kernels, and its table; without rates nothing is trained."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = step.recommender().float().to(device)
    views = tuple(view.float() for view in step.table.views)
    source = PinnedTable(views, device) if pinned else FeatureTable(tuple(view.to(device) for view in views))
    capture = None if torch.cuda.is_available() else lambda run: run
    rates = dict.fromkeys(model.parameter_groups(), 0.0) if rates is None else rates
    return GpuFusedStep(model, rates, source, plan, torch.float32, capture), source


def from_fused_gpu_pinned(step: Step) -> Result:
    """Run the fused step by Triton with the table in host memory; its rows are copied to the step's memory first."""
    return from_fused_gpu(step, pinned=True)


def from_captured(step: Step) -> Result:
    """Return loss and gradients of a CUDA graph that was captured on another batch, in fp32."""
    return _captured(step, torch.device("cuda"), torch.float32)


def from_stand_in(step: Step) -> Result:
    """Run the fused step by Triton with a function that is called again in place of the CUDA graph."""
    return _captured(step, torch.device("cpu"), torch.float64, capture=lambda run: run)


def _captured(
    step: Step,
    device: torch.device,
    dtype: torch.dtype,
    capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None,
) -> Result:
    model = step.recommender().to(device, dtype)
    table = FeatureTable(tuple(view.to(device, dtype) for view in step.table.views))
    taken = TrainingStep(model, dict.fromkeys(model.parameter_groups(), 0.0), device)
    captured = CapturedStep(taken, capture)
    others, batch = (make_batch(step.sequences, users, number) for users, number in _two_batches(step))
    shape = padded_shape(step.sequences, len(step.users))
    for one_batch in (others, batch):
        moved = one_batch.padded(shape).to(device)
        loss = captured(moved, table.read(moved.distinct))
    return _result(model, loss)


def _two_batches(step: Step) -> list[tuple[np.ndarray, int]]:
    """Return users and number of a step before a step, of other users if there are, and of the step itself."""
    strangers = np.setdiff1d(np.arange(len(step.sequences.user_ids)), step.users)[: len(step.users)]
    return [(strangers if len(strangers) else step.users[:1], step.step + 1), (step.users, step.step)]


def named_by_reference(model: Recommender) -> list[tuple[str, Tensor]]:
    """Return the parameters by the reference's names."""
    return [(name.removeprefix("item_encoder."), parameter) for name, parameter in model.named_parameters()]


def _differentiated(model: Recommender, loss: Tensor) -> Result:
    loss.backward()
    return _result(model, loss)


def _result(model: Recommender, loss: Tensor) -> Result:
    """Return a loss and the gradients that it left in the model."""
    gradients = {name: parameter.grad.double().cpu() for name, parameter in named_by_reference(model)}
    return Result(loss.detach().double().cpu(), gradients)


@dataclass(frozen=True)
class Form:
    """A form of the step, the relative difference that its precision leaves, and the users of a real batch for it."""

    run: Callable[[Step], Result]
    rtol: float = 1e-9
    users: int = 64
    takes: Callable[[Step], bool] = lambda step: True  # if the form can run the step's model
    needs_cuda: bool = False
    by_triton: bool = False  # runs in Triton's interpreter if there is no GPU
    cases: tuple[str, ...] | None = None  # the tests' cases that every run takes in place of the usual ones

    def check(self, step: Step, expected: Result) -> None:
        if self.needs_cuda and not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        if not self.takes(step):
            pytest.skip("not a form of this model")
        assert_equal(self.run(step), expected, self.rtol)


def _has_all_towers_of_one_shape(step: Step) -> bool:
    return (
        step.model.intra
        and step.model.inter is not False
        and len(step.table.views) == 2
        and len(set(step.table.shapes)) == 1
    )


def _is_fused(step: Step) -> bool:
    return not fused_step_refusal(step.recommender(), torch.device("cpu"), torch.float64)


def _is_fused_on_a_gpu(step: Step) -> bool:
    model = step.recommender().float()
    return not model.step_refusal() and not kernels.gpu_step_refusal(model.step_weights(), torch.float32)


def _has_whole_panels(step: Step) -> bool:
    return not library.why_no_library() and all(
        width % 16 == 0 for width in (step.model.embedding_dim, *(width for _, width in step.table.shapes))
    )


GPU_CASE = "one view of 32 dimensions, GELU, no gates"
USERS_BY_GPU = 64 if torch.cuda.is_available() else 3  # the interpreter is slow

FORMS: dict[str, Form] = {
    "jagged": Form(from_recommender),
    "by autograd": Form(from_autograd),
    "fused": Form(from_fused_step, takes=_is_fused),
    "fused, pinned": Form(from_fused_pinned, takes=_is_fused),
    "fused, mapped": Form(from_fused_mapped, rtol=1e-5, takes=_is_fused),
    "reference ops": Form(by_form("reference")),
    "cpu": Form(by_form("cpu"), takes=_has_whole_panels),
    "padded": Form(from_padded),
    "packed": Form(from_packed),
    "pinned": Form(from_pinned),
    "mapped": Form(from_mapped, rtol=1e-5),
    "dense": Form(from_dense, takes=_has_all_towers_of_one_shape),
    "gpu": Form(from_gpu, rtol=1e-4, users=USERS_BY_GPU, by_triton=True),
    "fused, gpu": Form(
        from_fused_gpu, rtol=1e-4, users=USERS_BY_GPU, takes=_is_fused_on_a_gpu, by_triton=True, cases=(GPU_CASE,)
    ),
    "fused, gpu, pinned": Form(
        from_fused_gpu_pinned, rtol=1e-4, users=USERS_BY_GPU, takes=_is_fused_on_a_gpu, by_triton=True, cases=()
    ),
    "captured": Form(from_captured, rtol=1e-4, needs_cuda=True),
    "captured, a stand-in for the graph": Form(from_stand_in),
}


def assert_equal(result: Result, expected: Result, rtol: float) -> None:
    """Check that losses, parameter names and gradients agree; a gradient's error is relative to its largest element."""
    torch.testing.assert_close(result.loss, expected.loss, rtol=rtol, atol=0)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert result.gradients[name] is not None and gradient is not None, name
        scale = gradient.abs().max().item()  # zero where every user has one input: attention then has no choice
        difference = (result.gradients[name] - gradient).abs().max().item()
        assert difference <= rtol * scale, f"{name}: gradients differ by {difference} of {scale}"


def scientific_step(sequences: Sequences, model: ModelConfig, shapes: list[tuple[int, int]], users: int) -> Step:
    """Return a step over real histories and random hidden states."""
    chosen = np.random.default_rng(11).permutation(len(sequences.user_ids))[:users]
    return Step(model, random_table(shapes, len(sequences.item_ids)), sequences, chosen, step=1234)
