"""Check the encoders that people use most, as tiny models: what each trained method changes, and which it refuses."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
import transformers as hf
from torch import nn

from helpers.common_encoders import BLOCKS, COMMON, common_inputs, common_model
from helpers.documents import ROOT
from iisan_fast.config import TUNING_METHODS
from iisan_fast.encoders.adaptation import adapt, checkpoint_blocks
from iisan_fast.encoders.block_layers import count_block_calls, transformer_blocks
from iisan_fast.errors import InputError

FUSED = {"ModernBERT": "Wqkv", "GPT-2": "c_attn", "DeBERTa": "in_proj"}
REPEATED = ("XLM-R", "mT5", "UMT5", "LongT5", "Qwen3", "Gemma", "DeiT", "Swin v2", "DeBERTa-v3", "Longformer")
FAMILIES = [pytest.param(name, marks=pytest.mark.long) if name in REPEATED else name for name in COMMON]

built = functools.cache(common_model)


def model_of(family: str) -> hf.PreTrainedModel:
    return copy.deepcopy(built(family))


@functools.cache
def documented_methods() -> dict[str, dict[str, str]]:
    """Return the table of docs/methods.md: the cell of each method, for each family."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    header, _, *rows = re.search(r"^\| family \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0].splitlines()
    methods = [cell.strip(" `") for cell in header.split("|")[2:-1]]
    cells_by_family = {}
    for row in rows:
        families, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
        for family in families.split(", "):
            cells_by_family[family] = dict(zip(methods, cells, strict=True))
    return cells_by_family


def can(family: str) -> list[str]:
    return [method for method in TUNING_METHODS if not documented_methods()[family][method].startswith("no")]


def test_the_documents_have_all_families():
    assert documented_methods().keys() == COMMON.keys()


def two_steps(model: hf.PreTrainedModel, trained: list[nn.Parameter], inputs: dict) -> list[float]:
    losses = []
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    torch.manual_seed(2)
    target = torch.randn_like(model(**inputs).last_hidden_state)
    for _ in range(3):
        loss = (model(**inputs).last_hidden_state - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) < 3:
            optimizer.step()
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", TUNING_METHODS)
def test_a_method_trains_what_it_says_or_names_those_that_do(family, method):
    """Two steps: every trained weight gets a gradient and the loss falls; all other weights stay, bit for bit."""
    model = model_of(family)
    if method not in can(family):
        others = can(family)
        with pytest.raises(InputError, match=rf"^e: method: {method}: .*; choose {', '.join(others[:-1])} or .*$"):
            adapt(model, method, name="e")
        return
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    inputs = common_inputs(family)
    pretrained = model(**inputs).last_hidden_state.detach()
    ((group, trained),) = adapt(model, method, bottleneck=3).items()
    assert group == ("adapters" if method in ("adapter", "lora") else "encoders")
    if method == "lora":
        torch.testing.assert_close(model(**inputs).last_hidden_state, pretrained)
    losses = two_steps(model, trained, inputs)
    assert losses[0] > losses[1] > losses[2]
    assert all(parameter.grad is not None for parameter in trained)
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter, old in before.items():
        assert parameter.requires_grad or torch.equal(parameter, old)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if method == "bitfit":
        assert all(name.endswith("bias") for name in names)
    if method in ("adapter", "lora"):
        assert set(trained).isdisjoint(before)
        each_block = (8 if method == "adapter" else 2 * lora_layers(family)) * len(transformer_blocks(model))
        assert len(names) == each_block and len(transformer_blocks(model)) == blocks_of(family)


def lora_layers(family: str) -> int:
    return 1 if documented_methods()[family]["lora"] == "fused" else 2


def blocks_of(family: str) -> int:
    return 1 if family == "ALBERT" else 3 if family.startswith("Swin") else BLOCKS


@pytest.mark.parametrize("family", FUSED)
def test_lora_updates_the_layer_that_computes_queries_keys_and_values(family):
    model = model_of(family)
    adapt(model, "lora")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(f".{FUSED[family]}.lora_" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_give_the_same_gradients_and_run_twice(family):
    model = model_of(family)
    method = "lora" if "lora" in can(family) else "full"
    parameters = [p for group in adapt(model, method).values() for p in group]
    inputs = common_inputs(family)
    calls = []
    block = next(iter(transformer_blocks(model).values()))
    norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
    norm.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[torch.Tensor, ...]:
        calls.clear()
        return torch.autograd.grad(model(**inputs).last_hidden_state.square().sum(), parameters)

    whole = gradients()
    once = len(calls)
    checkpoint_blocks(model)
    for gradient, expected in zip(gradients(), whole):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 + 1e-4 * float(expected.abs().max()))
    assert len(calls) == 2 * once > 0


def test_a_block_that_all_depths_share_counts_as_often_as_it_runs():
    model = model_of("ALBERT")
    assert len(transformer_blocks(model)) == 1
    assert count_block_calls(model, lambda: model(**common_inputs("ALBERT"))) == BLOCKS
