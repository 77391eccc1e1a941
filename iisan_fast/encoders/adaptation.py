"""Prepare a pretrained encoder for training: all of it, its biases, adapters, LoRA, or nothing.

Encoders always compute without dropout. So a batch gives the same gradients if it is encoded in parts, or if its
forward is computed a second time in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import InputError

LORA_RANK = 8
ADAPTER_STD = 0.01  # of an adapter's first weights, as of a SANB's: small, so that it starts near the identity

# The names of a block's linear layers, by their role. They differ between model families and versions of transformers.
ROLES = {
    "end of attention": (
        "attention.output.dense",  # BERT, DeBERTa; DINOv2 in older versions
        "attention.o_proj",  # ViT, DINOv2
        "self_attn.out_proj",  # CLIP, SigLIP
        "self_attn.o_proj",  # language models
    ),
    "end of feed-forward": (
        "output.dense",  # BERT, DeBERTa
        "mlp.fc2",  # ViT, DINOv2, CLIP, SigLIP
        "mlp.weights_out",  # the largest DINOv2
        "mlp.down_proj",  # language models
    ),
    "query": (
        "attention.self.query",
        "attention.self.query_proj",  # DeBERTa
        "attention.attention.query",  # DINOv2 in older versions
        "attention.q_proj",
        "self_attn.q_proj",
    ),
    "value": (
        "attention.self.value",
        "attention.self.value_proj",
        "attention.attention.value",
        "attention.v_proj",
        "self_attn.v_proj",
    ),
}


def adapt(
    model: PreTrainedModel,
    method: str,
    bottleneck: int = 64,
    activation: str = "relu",
    example: dict[str, Tensor] | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Prepare an encoder in place for a method, and return its trained parameters by group of one learning rate.

    method: `full` trains every parameter that the last hidden state depends on, except for position embeddings that are
    resized to the images; `bitfit` trains only the biases among them (group "encoders" for both). `adapter` and `lora`
    add parameters and train those alone (group "adapters"). `frozen` trains nothing and returns an empty dict. All
    other parameters require no gradient, and dropout is off. bottleneck, activation ("relu" or "gelu"): of the method
    `adapter`. example: a batch of the model's inputs, for `full` and `bitfit`; None makes one up. The model may be on
    any device, also "meta".

    Raises InputError if the encoder has nothing that the method can train, or if `lora` does not find the library peft.
    """
    model.requires_grad_(False)
    if method == "full":
        _free(model, model.parameters(), example)
    elif method == "bitfit":
        _free(model, _biases(model), example)
    elif method == "adapter":
        _add_adapters(model, bottleneck, activation)
    elif method == "lora":
        _add_lora(model)
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = "encoders" if method in ("full", "bitfit") else "adapters"
    return {group: trained} if trained else {}


def checkpoint_blocks(model: PreTrainedModel, on: bool = True) -> None:
    """Switch gradient checkpointing of every transformer block on or off.

    With checkpointing a block stores only its input, and computes its activations again in the backward pass. Raises
    InputError if the model has no transformer blocks.
    """
    for block in transformer_blocks(model).values():
        vars(block).pop("forward", None)
        if on:  # Hugging Face's own switch works only in training mode, which has dropout
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def transformer_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return an encoder's transformer blocks by module name, in order. Raises InputError if it has none."""
    named_blocks = {
        name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    }
    if not named_blocks:
        raise InputError(f"{type(model).__name__}: no transformer blocks found in it")
    return named_blocks


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


def _add_adapters(model: PreTrainedModel, bottleneck: int, activation: str) -> None:
    """Put an adapter after the attention and the feed-forward of every block, before the residual is added."""
    for block in transformer_blocks(model).values():
        for role in ("end of attention", "end of feed-forward"):
            name = _linear(model, block, role)
            linear = block.get_submodule(name)
            where = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            adapter = Adapter(linear.out_features, bottleneck, activation, **where)
            block.set_submodule(name, nn.Sequential(linear, adapter))


def _add_lora(model: PreTrainedModel) -> None:
    """Add low-rank updates, zero at the start, to the query and value projections (Hu et al. 2022).

    Raises InputError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("method: lora needs peft; pip install 'iisan-fast[lora]'") from None
    targets = [
        f"{path}.{_linear(model, block, role)}"
        for path, block in transformer_blocks(model).items()
        for role in ("query", "value")
    ]
    # With alpha equal to the rank the update is B A itself, and the learning rate alone scales it.
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, lora_dropout=0.0, bias="none", target_modules=targets)
    inject_adapter_in_model(config, model)


def _linear(model: PreTrainedModel, block: nn.Module, role: str) -> str:
    """Return the name, within the block, of its one linear layer with this role.

    Raises InputError if there is none, or more than one.
    """
    modules = dict(block.named_modules())
    names = [name for name in ROLES[role] if isinstance(modules.get(name), nn.Linear)]
    if len(names) != 1:
        raise InputError(
            f"{type(model).__name__}: expected one of {', '.join(ROLES[role])} as the {role} of a "
            f"{type(block).__name__}, found {' and '.join(names) or 'none'}"
        )
    return names[0]


def _biases(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the biases of all modules. Raises InputError if there are none."""
    biases = [module.bias for module in model.modules() if isinstance(getattr(module, "bias", None), nn.Parameter)]
    if not biases:
        raise InputError(f"method: bitfit trains biases, {type(model).__name__} has none; choose lora or adapter")
    return biases


def _free(model: PreTrainedModel, parameters: Iterable[nn.Parameter], example: dict[str, Tensor] | None) -> None:
    """Let the parameters be trained that the last hidden state depends on, given a batch or one made up.

    Poolers and mask tokens, for example, never get a gradient, so the optimizer should keep no state for them. Position
    embeddings that are resized to the images are left out too: their gradient on CUDA is not deterministic.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        state = model.eval()(**(example or _made_up_inputs(model))).last_hidden_state
    resized = _resized(state)
    gradients = torch.autograd.grad(state.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None and id(parameter) not in resized)


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
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        return {"pixel_values": torch.zeros(1, config.num_channels, *size, device=model.device, dtype=model.dtype)}
    return {"input_ids": torch.tensor([[1, 2, 3, 4]], device=model.device)}
