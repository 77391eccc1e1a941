"""Take one optimizer step without autograd: forwards and backwards of the ops, then Adam, over flat storage.

Both devices run the same stages. On a CPU, Python prepares the calls of a stage while the stage before runs. On CUDA,
all stages are captured once, before the first step, and replayed. Several ranks exchange data between two stages:
after the item vectors, after their gradients, and after the gradients of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .. import kernels
from ..data import IN_BATCH, Batch, Negatives, RunPlan
from ..kernels import StepOps, StepTensors, WindowedStep
from ..models import Recommender
from ..ranks import ALONE, Ranks
from ..states import FeatureTable, ItemInputs, ItemSource, PlannedBatch
from .captured_exchanges import CapturedExchanges
from .cuda_graphs import capture_in_a_graph
from .flat_storage import FlatStorage
from .step_exchanges import StepExchanges
from .training_step import Reading
from .update_options import PLAIN_ADAM, UpdateOptions

Method = Callable[[], None]


class StepStage(NamedTuple):
    """Methods of a step's ops that run one after the other."""

    phase: str  # "forward", "backward" or "update", for profiles
    methods: tuple[Method, ...]
    exchange: Method | None = None  # between the ranks, when the methods' work has ended


def step_stages(ops: StepOps, exchanges: StepExchanges | CapturedExchanges | None = None) -> tuple[StepStage, ...]:
    """Return the stages of a step, in order, from the step's ops. exchanges: between several ranks; None for one."""
    to_vectors = (ops.loss.backward, ops.sequence.backward, ops.collect.backward)
    to_weights = (ops.towers.backward, ops.fold.backward)
    forward = (ops.sequence.forward, ops.loss.forward, ops.record.forward)
    if exchanges is None:
        return (
            StepStage("forward", (ops.batch.forward, ops.fold.forward)),
            StepStage("forward", (ops.towers.forward,)),
            StepStage("forward", forward),
            StepStage("backward", (*to_vectors, *to_weights)),
            StepStage("update", (ops.adam.update,)),
        )
    return (
        StepStage("forward", (ops.batch.forward, ops.fold.forward)),
        StepStage("forward", (ops.towers.forward,), exchanges.gather_vectors),
        StepStage("forward", forward),
        StepStage("backward", to_vectors, exchanges.add_vector_gradients),
        StepStage("backward", to_weights, exchanges.add_gradients),
        StepStage("update", (ops.adam.update,)),
    )


def run_stages(stages: Iterable[StepStage]) -> None:
    """Call the methods of all stages, and the exchanges after them, in order."""
    for stage in stages:
        for method in stage.methods:
            method()
        if stage.exchange is not None:
            stage.exchange()


def fused_step_refusal(
    model: Recommender, device: torch.device, products: torch.dtype, negatives: Negatives = IN_BATCH
) -> str:
    """Return why a fused step cannot train the model on a device, in one line; "" if it can.

    products: the dtype of the step's matrix products. negatives: of the loss.
    """
    if reason := model.step_refusal():
        return reason
    if device.type == "cpu":
        return kernels.step_refusal(model.step_weights())
    if not negatives.in_batch:
        return "the loss takes negatives from outside the batch, which a fused step takes on a CPU alone"
    return kernels.gpu_step_refusal(model.step_weights(), products)


class FusedStep:
    """The common part of both devices' steps: the model, its parameters in flat storage, and a record of its steps.

    If a loss is not finite, the record stores the number of that step, and no later step updates anything.
    """

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        device: torch.device,
        operand_dtype: torch.dtype | None = None,
        options: UpdateOptions = PLAIN_ADAM,
        ranks: Ranks = ALONE,
    ) -> None:
        """Move the parameters of a model, which is on the device, into flat storage.

        rates, operand_dtype, options: as `FlatStorage` takes them. ranks: the processes that take each step together.
        """
        self.model = model
        self.ranks = ranks
        self.storage = FlatStorage(model, rates, operand_dtype, options)
        # Sum of losses, rows, first failed step (0: none), its loss.
        self.record = torch.zeros(4, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=self.storage.parameters.dtype, device=device)

    @property
    def optimizer(self) -> FlatStorage:
        """Return the object that holds Adam's state."""
        return self.storage

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Return the average of each parameter; empty without averages."""
        return self.storage.averages()

    def scale_rates(self, factor: float) -> None:
        """Set all learning rates to a factor of those of the settings, for the next steps."""
        self.storage.scale_rates(factor)

    def tensors(self) -> StepTensors:
        """Return the tensors that the step's ops read and write."""
        storage = self.storage
        roles = storage.weights(), storage.operands(), storage.gradients()
        share = storage.loss_share if self.ranks.several else None
        return StepTensors(*roles, storage.adam(), storage.operand, self.record, self.loss, share)

    def read(self) -> Reading:
        """Return the losses since the last call, and the first failed step if there is one. Waits for the device."""
        return Reading.of(self.record)


class CpuFusedStep(FusedStep):
    """The fused step on a CPU, with the ops' C++ forms."""

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        options: UpdateOptions = PLAIN_ADAM,
        ranks: Ranks = ALONE,
        item_ranks: Ranks | None = None,
    ) -> None:
        """Make a step for a model that `fused_step_refusal` accepts.

        rates: learning rates by group. ranks: the processes that take each step together, each with its share.
        item_ranks: those that share out a batch's items, by default all; ALONE with local negatives.
        """
        super().__init__(model, rates, torch.device("cpu"), options=options, ranks=ranks)
        self._item_ranks = ranks if item_ranks is None else item_ranks
        self._tensors = self.tensors()
        self._parameters = list(model.parameters())
        self._step: kernels.CpuStep | None = None  # the ops with their memory
        self._stages: tuple[StepStage, ...] = ()
        self._exchanges: StepExchanges | None = None  # on several ranks

    def __call__(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Take one step, and return the loss before its update, a scalar that the next step overwrites.

        inputs: the hidden states of batch.encoded. mark: called with the name of each phase when it ends. Raises
        ValueError if the batch does not fit the model, and RuntimeError if the model has moved.
        """
        self.storage.check()
        operands = self.model.step_operands(batch, inputs)
        if self.ranks.several and not self._item_ranks.several:
            operands = operands._replace(block=slice(0, len(batch.distinct)))  # a local batch is encoded as a whole
        step = self._step_for(operands)
        if self._exchanges is not None:
            self._exchanges.set_batch(len(batch.distinct), operands.encoded, operands.step)
        phases = [*(stage.phase for stage in self._stages), ""]

        def on_end(number: int) -> None:
            if (exchange := self._stages[number].exchange) is not None:
                exchange()
            if phases[number] != phases[number + 1]:
                mark(phases[number])

        step.run(operands, [stage.methods for stage in self._stages], on_end)
        increment_version(self._parameters)  # so that autograd refuses a backward through their old values
        return self.loss

    def release(self) -> None:
        """Free the step's memory. The next step allocates it again."""
        self._step = None
        self._stages = ()
        self._exchanges = None

    def _step_for(self, batch: kernels.RecommenderBatch) -> kernels.CpuStep:
        """Return ops with enough memory for a batch: those of the last step if they have it."""
        step = self._step
        least = (0, 0, 0)
        if step is not None and step.takes(batch):
            return step
        if step is not None:
            least = step.room
        del step
        self.release()  # free the old memory before more is allocated
        self._step = kernels.cpu_step(self._tensors, batch, least)
        if self.ranks.several:
            self._exchanges = StepExchanges(self.ranks, self._item_ranks, self._step.seam, self.storage, self._tensors)
        self._stages = step_stages(self._step.ops, self._exchanges)
        return self._step


class GpuFusedStep(FusedStep):
    """The fused step on a GPU, with the ops' Triton forms: captured once, then replayed for batches of one shape."""

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        source: ItemSource,
        plan: RunPlan,
        products: torch.dtype,
        capture: Callable[[Method], Method] | None = None,
        options: UpdateOptions = PLAIN_ADAM,
    ) -> None:
        """Make a step for a model that `fused_step_refusal` accepts, on the model's device.

        rates: learning rates by group. source: a table of hidden states. plan: of the run's batches, and the ranks that
        take each step together. products: the dtype of matrix products and of the source's states. capture: turns a
        function without arguments into the one that every step calls; None for a CUDA graph.
        """
        device = model.log_popularity.device
        super().__init__(model, rates, device, products, options, plan.ranks)
        self._shapes = source.shapes
        self._products = products
        self._table = source.views if isinstance(source, FeatureTable) else None
        self._plan = plan
        self._capture = capture or functools.partial(capture_in_a_graph, record=self.record)
        self._captured: _CapturedStep | None = None

    def __call__(self, planned: PlannedBatch) -> Tensor:
        """Take one step, and return the loss before its update, a scalar on the device that the next step overwrites.

        The batches of a window must be taken in their order. Raises RuntimeError if the model has moved.
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
        """Allocate the step's memory and capture the step, unless this is done already. Parameters do not change."""
        if self._captured is not None:
            return
        step = self.new_ops()
        replay = self._capture(functools.partial(run_stages, self.stages(step)))
        self._captured = _CapturedStep(step.set_window, step.set_items, replay)

    def stages(self, step: WindowedStep) -> tuple[StepStage, ...]:
        """Return the stages of a step on ops from `new_ops`, with the exchanges between the ranks."""
        exchanges = None
        if self.ranks.several:
            exchanges = CapturedExchanges(self.ranks, step.seam, self.storage.summed)
        return step_stages(step.ops, exchanges)

    def new_ops(self) -> WindowedStep:
        """Allocate the step's ops, with all their memory and the window of batches that they read."""
        plan = self._plan
        device = self.record.device
        tables = self._table or [
            torch.zeros(plan.shape.encoded, *shape, dtype=self._products, device=device) for shape in self._shapes
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
    """A captured step, and the functions that set its inputs."""

    set_window: Callable[[Tensor], None]
    set_items: Callable[[ItemInputs], None]
    replay: Method
