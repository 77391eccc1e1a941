"""Find an encoder's transformer blocks, and the linear layers of a block by their role, from its structure.

Names of modules differ between model families and versions of transformers. What is read here is alike in all of them:
blocks stand in lists of one class, attention is a module with "Attention" in its class, and a part of a block ends with
the linear layer that is called last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..errors import InputError

LINEAR = (nn.Linear, Conv1D)  # GPT-2 has Conv1D, a linear layer whose weight is transposed
ATTENTION = re.compile("attention|attn", re.IGNORECASE)  # in the class or the name of a block's attention
QUERY = re.compile(r"w?(q|query)(_(proj|lin|head))?", re.IGNORECASE)
VALUE = re.compile(r"w?(v|value)(_(proj|lin|head))?", re.IGNORECASE)


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return an encoder's blocks by module name, in order; an encoder that shares one block over its depth has one.

    A block is a layer that transformers marks for gradient checkpointing, or an element of a list of modules of one
    class. Blocks with attention are taken if there are any, and the innermost of nested ones.
    """
    candidates = dict(_repeated_modules(model))
    with_attention = {name: module for name, module in candidates.items() if attention_parts(module)}
    blocks = with_attention or candidates
    outer = {name for name in blocks for inner in blocks if inner.startswith(f"{name}.")}
    return {name: block for name, block in blocks.items() if name not in outer}


def count_block_calls(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return how often `run` calls the model's blocks; 1 if there are none."""
    calls = []
    blocks = transformer_blocks(model).values()
    hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, len(calls))


def attention_parts(block: nn.Module) -> list[str]:
    """Return the names, within a block, of its outermost modules of attention that hold parameters."""
    names: list[str] = []
    for name, module in block.named_modules():
        is_attention = ATTENTION.search(type(module).__name__) or ATTENTION.fullmatch(name.rpartition(".")[2])
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and is_attention and not inside and next(module.parameters(), None) is not None:
            names.append(name)
    return names


class BlockLayers:
    """The linear layers of one block, by role. The names are those within the model."""

    def __init__(self, path: str, block: nn.Module, calls: list[str]) -> None:
        """Take a block, its name within the model, and the model's linear layers in the order of their first call."""
        attention = [f"{path}.{name}." for name in attention_parts(block)]
        inside = [name for name in calls if name.startswith(f"{path}.")]
        self.block = block
        self.attention = [name for name in inside if name.startswith(tuple(attention))]
        self.feed_forward = [name for name in inside if name not in self.attention]

    def ends(self, model: nn.Module) -> list[str]:
        """Return the last linear layers of the attention and of the feed-forward, whose results are the block's width.

        Raises InputError if one of them is missing.
        """
        parts = {"attention": self.attention, "feed-forward": self.feed_forward}
        for part, names in parts.items():
            if not names:
                raise InputError(f"{type(self.block).__name__} has no linear layer in its {part}")
        widths = {output_width(model.get_submodule(names[-1])) for names in parts.values()}
        if len(widths) > 1:
            raise InputError(f"{type(self.block).__name__} ends in linear layers of other widths")
        return [self.attention[-1], self.feed_forward[-1]]

    def query_and_value(self, family: list[str]) -> list[str]:
        """Return the layers of the attention's queries and values, or the one fused layer that computes both.

        family: the names that peft lists for the model's family. Raises InputError if they are not found.
        """
        *projections, _ = self.attention or [""]
        if len(projections) == 1:
            return projections
        chosen = []
        for role in (QUERY, VALUE):
            chosen.append([name for name in projections if role.fullmatch(_last(name))])
        if not any(chosen):
            chosen = [[name for name in projections if _last(name) in family]]
        if any(len(names) != 1 for names in chosen):
            raise InputError(f"{type(self.block).__name__} has no linear layers for queries and values, or several")
        return [names[0] for names in chosen]


def block_layers(model: PreTrainedModel, run: Callable[[], Any]) -> list[BlockLayers]:
    """Return the linear layers of each block. run: calls the model. Raises InputError if it has no blocks."""
    blocks = transformer_blocks(model)
    if not blocks:
        raise InputError("it has no transformer blocks")
    calls: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    in_order = list(dict.fromkeys(calls))
    return [BlockLayers(path, block, in_order) for path, block in blocks.items()]


def output_width(linear: nn.Module) -> int:
    """Return the width of a linear layer's result."""
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


def _repeated_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that transformers marks, and the modules of each list whose modules are all of one class."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module
        elif isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            for index, child in enumerate(module):
                if not isinstance(child, nn.ModuleList) and next(child.children(), None) is not None:
                    yield f"{name}.{index}", child


def _last(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]
