"""One optimizer step without autograd: the ops' forwards and backwards put together, and Adam, over flat storage.

The composition is one for both devices. On a CPU each stage's calls are laid out by Python while the stage before runs;
on CUDA all stages are captured once, before the first step, and replayed. Between two stages there is a place for what
several processes exchange: after the item vectors, and after the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import kernels
from ..data import Batch, RunPlan
from ..kernels import StepOps, StepTensors, WindowedStep
from ..models import Recommender
from ..states import FeatureTable, ItemInputs, ItemSource, PlannedBatch
from .cuda_graphs import capture_in_a_graph
from .flat_storage import FlatStorage
from .training_step import Reading

Method = Callable[[], None]


class StepStage(NamedTuple):
    """Methods of a step's ops that run one after the other."""

    phase: str  # of the step, as profiles name it
    methods: tuple[Method, ...]


def step_stages(ops: StepOps) -> tuple[StepStage, ...]:
    """Put a step's ops together."""
    return (
        StepStage("forward", (ops.batch.forward, ops.fold.forward)),
        StepStage("forward", (ops.towers.forward,)),  # leaves the item vectors
        StepStage("forward", (ops.sequence.forward, ops.loss.forward, ops.record.forward)),
        StepStage(
            "backward",
            (
                ops.loss.backward,
                ops.sequence.backward,
                ops.collect.backward,
                ops.towers.backward,
                ops.fold.backward,
            ),
        ),  # leaves the gradients
        StepStage("update", (ops.adam.update,)),
    )


def run_stages(stages: Iterable[StepStage]) -> None:
    """Call all methods in order, as they are captured on a GPU."""
    for stage in stages:
        for method in stage.methods:
            method()


def fused_step_refusal(model: Recommender, device: torch.device, products: torch.dtype) -> str:
    """Return why a model is not trained by a fused step on a device, in a line, or ""; products: of its matrices."""
    if reason := model.step_refusal():
        return reason
    if device.type == "cpu":
        return kernels.step_refusal(model.step_weights())
    return kernels.gpu_step_refusal(model.step_weights(), products)


class FusedStep:
    """The model, its parameters in flat storage, and the record of its steps: what both devices' steps have in common.

    A loss that is not finite sets a flag in the record, with its step, and from then on no update takes place.
    """

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        device: torch.device,
        operand_dtype: torch.dtype | None = None,
    ) -> None:
        """rates, operand_dtype: as `FlatStorage` takes them; the model stands on the device."""
        self.model = model
        self.storage = FlatStorage(model, rates, operand_dtype)
        # Sum of losses, rows, first failed step (0: none), its loss.
        self.record = torch.zeros(4, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=self.storage.parameters.dtype, device=device)

    @property
    def optimizer(self) -> FlatStorage:
        """Return what keeps Adam's state."""
        return self.storage

    def tensors(self) -> StepTensors:
        """Return what the step's ops read and write."""
        storage = self.storage
        roles = storage.weights(), storage.operands(), storage.gradients()
        return StepTensors(*roles, storage.adam(), storage.operand, self.record, self.loss)

    def read(self) -> Reading:
        """Return the outcome since the last reading. Waits for the device."""
        return Reading.of(self.record)


class CpuFusedStep(FusedStep):
    """The step on a CPU, by C++."""

    def __init__(self, model: Recommender, rates: Mapping[str, float]) -> None:
        """model: one that `fused_step_refusal` does not refuse."""
        super().__init__(model, rates, torch.device("cpu"))
        self._tensors, self._parameters = self.tensors(), list(model.parameters())
        self._step: kernels.CpuStep | None = None  # its memory
        self._stages: tuple[StepStage, ...] = ()

    def __call__(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Take one step and return the loss before it, a scalar that the next step overwrites.

        `mark` is called as each phase ends. Raises ValueError for a batch that does not fit the model, RuntimeError for
        a model that was moved.
        """
        self.storage.check()
        operands = self.model.step_operands(batch, inputs)
        step = self._step_for(operands)
        phases = [*(stage.phase for stage in self._stages), ""]

        def on_end(number: int) -> None:
            if phases[number] != phases[number + 1]:
                mark(phases[number])

        step.run(operands, [stage.methods for stage in self._stages], on_end)
        increment_version(self._parameters)  # so that a graph that saved one of them refuses to go back
        return self.loss

    def release(self) -> None:
        """Give memory back; the next step takes it anew."""
        self._step, self._stages = None, ()

    def _step_for(self, batch: kernels.RecommenderBatch) -> kernels.CpuStep:
        """Return a step that has memory for a batch: the last one, if it has."""
        step, least = self._step, (0, 0)
        if step is not None and step.takes(batch):
            kernels.check_step_batch(batch, self._tensors.weights)
            return step
        if step is not None:
            least = step.room
        del step
        self.release()  # memory goes before there is more
        self._step = kernels.cpu_step(self._tensors, batch, least)
        self._stages = step_stages(self._step.ops)
        return self._step


class GpuFusedStep(FusedStep):
    """The step on a GPU, by Triton: captured once, before the first step, and replayed for batches of one shape."""

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        source: ItemSource,
        plan: RunPlan,
        products: torch.dtype,
        capture: Callable[[Method], Method] | None = None,
    ) -> None:
        """Args: model: one that `fused_step_refusal` does not refuse; products: the dtype of its matrix products and of
        the source's states; capture: turns a function into one that is called at every step; None: a CUDA graph.
        """
        device = model.log_popularity.device
        super().__init__(model, rates, device, products)
        self._shapes, self._products = source.shapes, products
        self._table = source.views if isinstance(source, FeatureTable) else None
        self._plan = plan
        self._capture = capture or functools.partial(capture_in_a_graph, record=self.record)
        self._captured: _CapturedStep | None = None

    def __call__(self, planned: PlannedBatch) -> Tensor:
        """Take one step and return the loss before it, a scalar on the device that the next step overwrites.

        The batches of a window are taken in their order. Raises RuntimeError for a model that was moved.
        """
        self.prepare()
        if planned.window is not None:
            self.storage.check()
            self.storage.refresh_operands()  # a checkpoint may have been loaded
            self._captured.set_window(planned.window)
        if planned.item_inputs is not None:
            self._captured.set_items(planned.item_inputs)
        self._captured.replay()
        return self.loss

    def prepare(self) -> None:
        """Allocate the step's memory and capture the step, unless that is done. Nothing is trained."""
        if self._captured is not None:
            return
        step = self.new_ops()
        replay = self._capture(functools.partial(run_stages, step_stages(step.ops)))
        self._captured = _CapturedStep(step.set_window, step.set_items, replay)

    def new_ops(self) -> WindowedStep:
        """Allocate the step's ops, with all their memory and the window of batches that they read."""
        plan, device = self._plan, self.record.device
        tables = self._table or [
            torch.zeros(plan.shape.distinct, *shape, dtype=self._products, device=device) for shape in self._shapes
        ]
        return kernels.gpu_step(
            self.tensors(),
            plan.shape,
            tables,
            self.model.log_popularity,
            plan.window_batches,
            self.model.config.dropout,
            reads_by_number=self._table is not None,
        )


class _CapturedStep(NamedTuple):
    set_window: Callable[[Tensor], None]
    set_items: Callable[[ItemInputs], None]
    replay: Method
