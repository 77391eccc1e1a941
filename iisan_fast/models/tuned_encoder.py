"""The item encoder that trains pretrained encoders: they run in every step, adapted, with plain heads on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..encoders import ModelInputs, adapt, checkpoint_blocks, transformer_blocks
from ..states import Chunks
from .activation_memory import EncodingPlan, Footprint, activation_bytes, plan_parts
from .item_encoders import FinalHeads

OPTIMIZER_COPIES = 3  # of what is trained: the gradient, and Adam's two moments
WORKING_BLOCKS = 2  # whose insides the backward pass holds beside what was kept: one computed again, and its gradients


class Encoder(Protocol):
    """What `encoders.Backbone` offers here."""

    model: nn.Module
    width: int

    def final(self, inputs: ModelInputs) -> Tensor: ...  # [N, width], differentiable

    def example(self) -> ModelInputs: ...  # of made-up items


class TunedItemEncoder(nn.Module):
    """Item vectors by encoders that run in every step, adapted by a method, with heads on their final states.

    With `recompute`, encoding a part of the items keeps nothing and is done again in the backward pass, so that one
    part's activations live at a time. The gradients are those of all items together.
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
        """method, bottleneck, activation: as `adapt` takes them. checkpointing: of every block.

        products: of the encoders. bfloat16 by autocast; float32 leaves them in the weights' dtype.
        """
        super().__init__()
        self.encoders, self.checkpointing, self.products = encoders, checkpointing, products
        self.recompute = False
        self.models = nn.ModuleList(encoder.model for encoder in encoders)
        self.tuned: dict[str, list[nn.Parameter]] = {}
        for encoder, model in zip(encoders, self.models):
            adapted = adapt(model, method, bottleneck, activation, encoder.example())
            for group, parameters in adapted.items():
                self.tuned.setdefault(group, []).extend(parameters)
            checkpoint_blocks(model, checkpointing)
        self.heads = FinalHeads([encoder.width for encoder in encoders], embedding_dim)

    def forward(self, inputs: list[Chunks]) -> Tensor:
        """Each view's inputs for N items -> [N, d]."""
        with self._products():
            states = [self._states(encoder, view) for encoder, view in zip(self.encoders, inputs)]
        return self.heads(states)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter under the name of its learning rate, once."""
        return {**self.tuned, "heads": list(self.heads.parameters())}

    def train(self, mode: bool = True) -> TunedItemEncoder:
        """The encoders stay as `adapt` left them: without dropout."""
        super().train(mode)
        self.models.eval()
        return self

    def plan(
        self, largest: Callable[[int], list[ModelInputs]], items: int, free: int, items_at_once: int | None = None
    ) -> EncodingPlan:
        """How to encode `items` items a batch in `free` bytes, of which gradients and Adam's moments take their share;
        or `items_at_once` at a time, whatever is free. From here on the encoders do so.

        largest(n) makes up n items of the largest size, for each view. Raises InputError where not even one fits.
        """
        one, two = largest(1), largest(2)
        footprints = [self._footprint(*each) for each in zip(self.encoders, one, two)]
        trained = [parameter for group in self.parameter_groups().values() for parameter in group]
        left = free - OPTIMIZER_COPIES * sum(parameter.nbytes for parameter in trained)
        plan = plan_parts(footprints, items, left, items_at_once)
        self.recompute = plan.recompute
        return plan

    def _states(self, encoder: Encoder, chunks: Chunks) -> Tensor:
        """Final states [N, D] in the items' order."""
        states = torch.cat([self._part(encoder, part) for part in chunks.parts])
        return states if chunks.order is None else states.index_select(0, chunks.order)

    def _part(self, encoder: Encoder, inputs: ModelInputs) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(encoder.final, inputs, use_reentrant=False, preserve_rng_state=False)
        return encoder.final(inputs)

    def _products(self) -> torch.autocast:
        """Set the products' dtype. Once around all parts, so that they share the weights' copies in it."""
        device = self.heads.fusion.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.products == torch.bfloat16)

    def _footprint(self, encoder: Encoder, one: ModelInputs, two: ModelInputs) -> Footprint:
        """From one and two items: what does not grow with them, such as weights in another dtype, counts once."""
        model = encoder.model

        def kept(inputs: ModelInputs) -> int:
            with self._products():
                return activation_bytes(lambda: encoder.final(inputs), model.parameters())

        checkpoint_blocks(model, False)
        inside = (kept(two) - kept(one)) // len(transformer_blocks(model))
        checkpoint_blocks(model, self.checkpointing)
        first, second = kept(one), kept(two)
        return Footprint(2 * first - second, second - first + WORKING_BLOCKS * inside)
