"""Check the encoders that people use most, as tiny models: what each trained method changes, and which it refuses."""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.common_encoders import BART, BLOCKS, COMMON, COMMON_IMAGE, T5, common_inputs, common_model
from helpers.documents import ROOT
from helpers.encoders import TITLES, WORDS, pictures, refusal, save, view
from iisan_fast.config import TUNING_METHODS
from iisan_fast.encoders.adaptation import adapt, checkpoint_blocks
from iisan_fast.encoders.block_layers import count_block_calls, transformer_blocks
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError

LED = {**BART, "max_encoder_position_embeddings": 64, "attention_window": 8}
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a family's tiny model with its tokenizer or processor once, and gives the folder."""
    root = tmp_path_factory.mktemp("common")

    @functools.cache
    def folder(family: str) -> Path:
        common = COMMON[family]
        torch.manual_seed(0)
        processors = (common.processor, None) if family in COMMON_IMAGE else (None, common.processor)
        return save(common.build(), root / family, *processors)

    return folder


@torch.no_grad()
def one_by_one(family: str, folder: Path, pooling: str, layers: Sequence[int]) -> torch.Tensor:
    """Return the states by the plain way: an item at a time, without padding, all hidden states together."""
    model = COMMON[family].model_class.from_pretrained(folder).eval()
    model = model.get_encoder() if family == "BART" else model
    tokenise = None if family in COMMON_IMAGE else hf.AutoTokenizer.from_pretrained(folder)
    place = {"cls": -1 if family == "XLNet" else 0, "last": -1}
    rows = []
    for content in pictures() if tokenise is None else TITLES:
        if tokenise is None:
            inputs = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")(content, return_tensors="pt")
        else:
            inputs = {"input_ids": torch.tensor([tokenise(content, truncation=True, max_length=12).input_ids])}
        states = model(**inputs, output_hidden_states=True).hidden_states
        rows.append(torch.stack([s[0].mean(dim=0) if pooling == "mean" else s[0, place[pooling]] for s in states[-2:]]))
    assert len(states) - 2 == layers[0]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_a_loop_over_single_items(saved, family):
    source = "image" if family in COMMON_IMAGE else "title"
    layers = (1, 2)
    backbone = load_backbone(view(saved(family), source, max_tokens=12, layers=layers))
    contents = pictures() if source == "image" else TITLES
    inputs = backbone.prepare(contents)
    expected = one_by_one(family, saved(family), backbone.pooling, layers)
    for states in (backbone.encode(inputs), backbone.encode_whole(inputs)):
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=2e-5)
    if source == "title":
        short = backbone.encode(backbone.prepare([TITLES[1]]))
        torch.testing.assert_close(short, expected[1:2], rtol=1e-4, atol=2e-5)


def test_default_poolings(saved):
    """XLNet's class token stands after the text; T5 and GPT-2 have none."""
    loaded = {family: load_backbone(view(saved(family))) for family in ("XLNet", "T5", "GPT-2")}
    assert {family: backbone.pooling for family, backbone in loaded.items()} == {
        "XLNet": "cls",
        "T5": "mean",
        "GPT-2": "mean",
    }
    xlnet = load_backbone(view(saved("XLNet"), max_tokens=12, pooling="last"))
    inputs = xlnet.prepare(TITLES)
    assert inputs["input_ids"][0, 2] == WORDS.index("[CLS]")
    assert torch.equal(xlnet.encode(inputs), loaded["XLNet"].encode(inputs))


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "T5EncoderModel"),
        (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "BartEncoder"),
        pytest.param(lambda: hf.MarianMTModel(hf.MarianConfig(**BART)), "MarianEncoder", marks=pytest.mark.long),
        pytest.param(lambda: hf.LEDForConditionalGeneration(hf.LEDConfig(**LED)), "LEDEncoder", marks=pytest.mark.long),
    ],
)
def test_an_encoder_decoder_is_read_by_its_encoder(tmp_path, whole, part):
    torch.manual_seed(0)
    folder = save(whole(), tmp_path / "whole", None, "cls")
    model = type(whole()).from_pretrained(folder).eval()
    backbone = load_backbone(view(folder, max_tokens=12, pooling="mean", layers=(0, 1, 2)))
    assert type(backbone.model).__name__ == part
    states = backbone.encode(backbone.prepare(TITLES))
    for title, encoded in zip(TITLES, states):
        with torch.no_grad():
            expected = model.get_encoder()(backbone.prepare([title])["input_ids"], output_hidden_states=True)
        pooled = torch.stack([state[0].mean(dim=0) for state in expected.hidden_states])
        torch.testing.assert_close(encoded, pooled, rtol=1e-4, atol=2e-5)


def test_an_encoder_decoder_that_lacks_an_encoders_weight_is_refused(tmp_path):
    folder = save(COMMON["BART"].build(), tmp_path / "bart", None, "cls")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layers.1.fc2.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its checkpoint lacks 1 weights, encoder.layers.1.fc2.weight first" in refusal(folder)


def with_more_tokens(folder: Path, target: Path, **tokens) -> Path:
    shutil.copytree(folder, target)
    longer = hf.AutoTokenizer.from_pretrained(target)
    longer.add_special_tokens(tokens) if tokens else longer.add_tokens(["w99"])
    longer.save_pretrained(target)
    return target


@pytest.mark.parametrize("family", ["MPNet", "GPT-2", "T5"])
def test_a_token_beyond_the_embeddings_is_named(saved, tmp_path, family):
    backbone = load_backbone(view(with_more_tokens(saved(family), tmp_path / "more"), max_tokens=12))
    assert backbone.prepare(TITLES)
    message = r"the text 'w1 w99' has the token 'w99' with id 40, but the model has 40 embeddings, the first with id 0"
    with pytest.raises(InputError, match=message):
        backbone.prepare(["w2", "w1 w99"])


def test_a_padding_token_beyond_the_embeddings_is_not_used(saved, tmp_path):
    """Language models often have no token for padding, and get one that the weights do not know."""
    more = load_backbone(view(with_more_tokens(saved("GPT-2"), tmp_path / "more", pad_token="<pad>"), max_tokens=12))
    assert (more.processor.pad_token_id, more.padding_token) == (40, 0)
    plain = load_backbone(view(saved("GPT-2"), max_tokens=12))
    assert torch.equal(more.encode(more.prepare(TITLES)), plain.encode(plain.prepare(TITLES)))


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
