"""Prepare a pretrained encoder for training: all of it, its biases, adapters, LoRA, or nothing.

Encoders always compute without dropout. So a batch gives the same gradients if it is encoded in parts, or if its
forward is computed a second time in the backward pass.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import TUNING_METHODS
from ..errors import InputError
from .block_layers import block_layers, output_width, transformer_blocks

LORA_RANK = 8
ADAPTER_STD = 0.01  # of an adapter's first weights, as of a SANB's: small, so that it starts near the identity
EDGE = 64  # pixels of a blank image for an encoder that takes any size


def adapt(
    model: PreTrainedModel,
    method: str,
    bottleneck: int = 64,
    activation: str = "relu",
    example: dict[str, Tensor] | None = None,
    name: str = "",
) -> dict[str, list[nn.Parameter]]:
    """Prepare an encoder in place for a method, and return its trained parameters by group of one learning rate.

    method: `full` trains every parameter that the last hidden state depends on, except for position embeddings that are
    resized to the images; `bitfit` trains only the biases among them (group "encoders" for both). `adapter` and `lora`
    add parameters and train those alone (group "adapters"). `frozen` trains nothing and returns an empty dict. All
    other parameters require no gradient, and dropout is off. bottleneck, activation ("relu" or "gelu"): of the method
    `adapter`. example: a batch of the model's inputs; None makes one up. name: of the encoder, for messages; "" for the
    model's class. The model may be on any device, also "meta".

    Raises InputError if the method cannot train the encoder, with the methods that can, or if `lora` does not find the
    library peft. The encoder is not fit for use then.
    """
    model.requires_grad_(False).eval()
    inputs = example or _made_up_inputs(model)
    if method == "lora":
        refuse_missing_peft()
    try:
        trained = _prepared(model, method, bottleneck, activation, inputs)
    except InputError as error:
        able = [other for other in TUNING_METHODS if other != method and _can_train(model, other, inputs)]
        advice = f"choose {_alternatives(able)}" if able else "choose frozen, which trains no encoder"
        raise InputError(f"{name or type(model).__name__}: method: {method}: {error}; {advice}") from None
    group = "encoders" if method in ("full", "bitfit") else "adapters"
    return {group: trained} if trained else {}


def refuse_missing_peft() -> None:
    """Raise InputError if the library of the method `lora` is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("method: lora needs peft; pip install 'iisan-fast[lora]'") from None


def checkpoint_blocks(model: PreTrainedModel, on: bool = True) -> None:
    """Switch gradient checkpointing of every transformer block on or off.

    With checkpointing a block stores only its input, and computes its activations again in the backward pass. Raises
    InputError if checkpointing is switched on for a model without blocks.
    """
    blocks = transformer_blocks(model)
    if on and not blocks:
        raise InputError(f"checkpointing: {type(model).__name__} has no blocks to compute twice")
    for block in blocks.values():
        vars(block).pop("forward", None)
        if on:  # Hugging Face's own switch works only in training mode, which has dropout
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class Adapter(nn.Sequential):
    """A bottleneck with a residual, x + up(act(down(x))), over the last dimension (Houlsby et al. 2019).

    Its weights start small, so that it starts near the identity.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, **where: torch.device | torch.dtype) -> None:
        """Make an adapter of `bottleneck` units. activation: "relu" or "gelu"; where: device and dtype of nn.Linear."""
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]()
        super().__init__(nn.Linear(width, bottleneck, **where), act, nn.Linear(bottleneck, width, **where))
        for linear in (self[0], self[2]):
            nn.init.normal_(linear.weight, std=ADAPTER_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        return x + super().forward(x)


class Adapted(nn.Sequential):
    """A linear layer and the adapter after it, in the layer's place: some models ask a layer for its weight."""

    @property
    def weight(self) -> Tensor:
        """Return the linear layer's weight."""
        return self[0].weight

    @property
    def bias(self) -> Tensor | None:
        """Return the linear layer's bias."""
        return self[0].bias


def _prepared(
    model: PreTrainedModel, method: str, bottleneck: int, activation: str, inputs: dict[str, Tensor]
) -> list[nn.Parameter]:
    """Prepare an encoder without trained parameters for a method, and return what it trains.

    Raises InputError if the method finds nothing to train, or if no gradient reaches what it adds.
    """
    if method == "full":
        _free(model, model.parameters(), inputs)
    elif method == "bitfit":
        _free(model, _biases(model), inputs)
    elif method == "adapter":
        _add_adapters(model, bottleneck, activation, inputs)
    elif method == "lora":
        _add_lora(model, inputs)
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method != "frozen" and not trained:
        raise InputError("the last hidden state depends on nothing that it trains")
    if method in ("adapter", "lora"):
        unreached = sum(gradient is None for gradient in _gradients(model, trained, inputs)[1])
        if unreached:
            raise InputError(f"no gradient reaches {unreached} of {len(trained)} parameters that it adds")
    return trained


def _can_train(model: PreTrainedModel, method: str, inputs: dict[str, Tensor]) -> bool:
    """Return True if a method can train an encoder, by trying it on a copy that shares the weights."""
    tensors = chain(model.parameters(), model.buffers())
    trial = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        if method == "lora":
            refuse_missing_peft()
        trial.requires_grad_(False)
        _prepared(trial, method, 1, "relu", inputs)
    except InputError:
        return False
    finally:
        model.requires_grad_(False)
    return True


def _alternatives(methods: list[str]) -> str:
    """Return the names of one or more methods as text: "full, adapter or lora"."""
    *others, last = methods
    return f"{', '.join(others)} or {last}" if others else last


def _add_adapters(model: PreTrainedModel, bottleneck: int, activation: str, inputs: dict[str, Tensor]) -> None:
    """Put an adapter after the attention and the feed-forward of every block, before the residual is added.

    Raises InputError if a block has no linear layers there.
    """
    ends = [layers.ends(model) for layers in block_layers(model, lambda: model(**inputs))]
    for name in chain.from_iterable(ends):
        linear = model.get_submodule(name)
        where = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        adapter = Adapter(output_width(linear), bottleneck, activation, **where)
        model.set_submodule(name, Adapted(linear, adapter))


def _add_lora(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Add low-rank updates, zero at the start, to the query and value projections (Hu et al. 2022).

    Where one layer computes queries, keys and values together, its update is of all three. Raises InputError if a block
    has no such linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as FAMILIES

    family = FAMILIES.get(model.config.model_type, [])
    projections = [layers.query_and_value(family) for layers in block_layers(model, lambda: model(**inputs))]
    targets = list(chain.from_iterable(projections))
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    # With alpha equal to the rank the update is B A itself, and the learning rate alone scales it.
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model)


def _biases(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the biases of all modules. Raises InputError if there are none."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith((".bias", "_bias"))]
    if not biases:
        raise InputError(f"it trains biases, and {type(model).__name__} has none")
    return biases


def _free(model: PreTrainedModel, parameters: Iterable[nn.Parameter], inputs: dict[str, Tensor]) -> None:
    """Let the parameters be trained that the last hidden state of a batch depends on.

    Poolers and mask tokens, for example, never get a gradient, so the optimizer should keep no state for them. Position
    embeddings that are resized to the images are left out too: their gradient on CUDA is not deterministic.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    state, gradients = _gradients(model, parameters, inputs)
    resized = _resized(state)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None and id(parameter) not in resized)


def _gradients(
    model: PreTrainedModel, parameters: list[nn.Parameter], inputs: dict[str, Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the last hidden state of a batch, and the gradient of each parameter; None if it depends on it nowhere."""
    with torch.enable_grad():
        state = model.eval()(**inputs).last_hidden_state
        return state, torch.autograd.grad(state.sum(), parameters, allow_unused=True)


def _resized(output: Tensor) -> set[int]:
    """Return the ids of the parameters that an output depends on through a bicubic interpolation."""
    resized = set()
    visited = set()
    waiting = [(output.grad_fn, False)]
    while waiting:
        node, interpolated = waiting.pop()
        if node is None or (node, interpolated) in visited:
            continue
        visited.add((node, interpolated))
        interpolated = interpolated or node.name().startswith("UpsampleBicubic")
        if interpolated and hasattr(node, "variable"):
            resized.add(id(node.variable))
        waiting += [(parent, interpolated) for parent, _ in node.next_functions]
    return resized


def _made_up_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's inputs for one blank image or one short text."""
    if model.main_input_name == "pixel_values":
        config = model.config
        size = getattr(config, "image_size", None) or EDGE
        size = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, config.num_channels, *size, device=model.device, dtype=model.dtype)}
    ids = torch.arange(1, 5, device=model.device) % model.get_input_embeddings().num_embeddings
    return {"input_ids": ids[None]}
