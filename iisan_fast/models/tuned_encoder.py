"""Define the item encoder that trains pretrained encoders: they run in every step, with heads on their final states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ViewConfig
from ..encoders import ModelInputs, adapt, checkpoint_blocks, count_block_calls
from ..states import Chunks
from .activation_memory import EncodingPlan, Footprint, activation_bytes, plan_parts
from .item_encoders import FinalHeads

OPTIMIZER_COPIES = 3  # of each trained parameter: its gradient, and Adam's two moments
WORKING_BLOCKS = 2  # with checkpointing, the backward pass also holds one block's activations and their gradients


class Encoder(Protocol):
    """The part of `encoders.Backbone` that is used here."""

    model: nn.Module
    width: int
    view: ViewConfig

    def final(self, inputs: ModelInputs) -> Tensor:
        """Return the pooled final states [N, width], with gradients."""

    def example(self) -> ModelInputs:
        """Return a small invented batch of inputs."""


class TunedItemEncoder(nn.Module):
    """Item vectors by encoders that run in every step, adapted by a method, with heads on their final states.

    If `recompute` is True, the items are encoded in parts. The backward pass encodes each part again, so that memory
    holds the activations of one part at a time. The gradients are the same as without parts.
    """

    small_operators = False

    def __init__(
        self,
        encoders: list[Encoder],
        method: str,
        embedding_dim: int,
        bottleneck: int = 64,
        activation: str = "relu",
        checkpointing: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        """Adapt the encoders in place, and make the heads.

        encoders: one for each view. method, bottleneck, activation: as `encoders.adapt` takes them. checkpointing:
        whether each transformer block stores only its input. products: the dtype of the encoders' matrix products:
        bfloat16 by autocast, or float32 for the weights' dtype. Raises InputError as `encoders.adapt` does.
        """
        super().__init__()
        self.encoders = encoders
        self.checkpointing = checkpointing
        self.products = products
        self.recompute = False
        self.models = nn.ModuleList(encoder.model for encoder in encoders)
        self.tuned: dict[str, list[nn.Parameter]] = {}
        for encoder, model in zip(encoders, self.models):
            adapted = adapt(model, method, bottleneck, activation, encoder.example(), encoder.view.encoder)
            for group, parameters in adapted.items():
                self.tuned.setdefault(group, []).extend(parameters)
            checkpoint_blocks(model, checkpointing)
        self.heads = FinalHeads([encoder.width for encoder in encoders], embedding_dim)

    def forward(self, inputs: list[Chunks]) -> Tensor:
        """Return the item vectors [N, d] for each view's encoder inputs of N items."""
        with self._products():
            states = [self._states(encoder, view) for encoder, view in zip(self.encoders, inputs)]
        return self.heads(states)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by the name of their learning rate, each parameter once."""
        return {**self.tuned, "heads": list(self.heads.parameters())}

    def train(self, mode: bool = True) -> TunedItemEncoder:
        """Set the heads' training mode. The encoders stay in evaluation mode, because they compute without dropout."""
        super().train(mode)
        self.models.eval()
        return self

    def plan(
        self, largest: Callable[[int], list[ModelInputs]], items: int, free: int, items_at_once: int | None = None
    ) -> EncodingPlan:
        """Choose how many items are encoded at a time, set `recompute`, and return the plan.

        largest: a function from n to each view's inputs of n items of the largest size. items: the most items of a
        batch. free: bytes for activations, gradients and Adam's moments. items_at_once: the size of the parts, without
        regard to `free`; None to choose it. Raises InputError if it is None and one item does not fit.
        """
        footprints = [
            self._footprint(encoder, one_item, two_items)
            for encoder, one_item, two_items in zip(self.encoders, largest(1), largest(2))
        ]
        trained = [parameter for group in self.parameter_groups().values() for parameter in group]
        for_activations = free - OPTIMIZER_COPIES * sum(parameter.nbytes for parameter in trained)
        plan = plan_parts(footprints, items, for_activations, items_at_once)
        self.recompute = plan.recompute
        return plan

    def _states(self, encoder: Encoder, chunks: Chunks) -> Tensor:
        """Return one view's final states [N, D] in the order of the items."""
        states = torch.cat([self._part(encoder, part) for part in chunks.parts])
        return states if chunks.order is None else states.index_select(0, chunks.order)

    def _part(self, encoder: Encoder, inputs: ModelInputs) -> Tensor:
        """Return the final states of one part. With `recompute` its activations are not stored."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(encoder.final, inputs, use_reentrant=False, preserve_rng_state=False)
        return encoder.final(inputs)

    def _products(self) -> torch.autocast:
        """Return the autocast context of the products.

        It surrounds all parts, so that they share the copies of the weights in the products' dtype.
        """
        device = self.heads.fusion.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.products == torch.bfloat16)

    def _footprint(self, encoder: Encoder, one_item: ModelInputs, two_items: ModelInputs) -> Footprint:
        """Return the bytes of activations, measured with one and two items.

        The bytes that do not grow with the items, such as weights in another dtype, count once.
        """
        model = encoder.model

        def stored_bytes(inputs: ModelInputs) -> int:
            with self._products():
                return activation_bytes(lambda: encoder.final(inputs), model.parameters())

        checkpoint_blocks(model, False)
        with torch.no_grad():
            calls = count_block_calls(model, lambda: encoder.final(one_item))
        in_one_block = (stored_bytes(two_items) - stored_bytes(one_item)) // calls
        checkpoint_blocks(model, self.checkpointing)
        first, second = stored_bytes(one_item), stored_bytes(two_items)
        return Footprint(2 * first - second, second - first + WORKING_BLOCKS * in_one_block)
