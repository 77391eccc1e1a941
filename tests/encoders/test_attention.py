"""Check the attention of encoders: xformers by a stand-in on the CPU, xformers itself on a GPU, and the choice."""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from helpers import encoders as tiny
from helpers.command_line import iisan_fast
from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.encoders import attention
from iisan_fast.encoders.attention import DroppedArgumentError, choose_attention, xformers_attention
from iisan_fast.encoders.base import Backbone
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = [("title", name) for name in tiny.TEXT if name != "deberta-v3"] + [("image", name) for name in tiny.IMAGE]


class Xformers(types.ModuleType):
    """Stand in for xformers.ops: check the arguments as the kernel does, and compute the documented result."""

    def __init__(self) -> None:
        super().__init__("xformers.ops")
        self.calls: list[dict[str, Any]] = []

    def memory_efficient_attention(
        self,
        query: Tensor,  # [batch, queries, heads, width]
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        batch, queries, heads, width = query.shape
        assert key.shape == value.shape == (batch, key.shape[1], heads, width)  # nothing is broadcast
        assert query.dtype == key.dtype == value.dtype
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (width**-0.5 if scale is None else scale)
        if attn_bias is not None:
            assert attn_bias.shape == scores.shape and attn_bias.dtype == query.dtype
            assert attn_bias.stride(-1) == 1 and not any(stride % 8 for stride in attn_bias.stride()[:-1])
            assert attn_bias.isfinite().all()  # the kernel gives NaN for a row of -inf
            scores = scores + attn_bias
        self.calls.append({"bias": attn_bias is not None, "p": p, "scale": scale})
        return torch.einsum("bhqk,bkhd->bqhd", F.dropout(scores.softmax(dim=-1), p), value)


@pytest.fixture(autouse=True)
def nothing_said_or_tried() -> None:
    attention._say_once.cache_clear()
    attention.xformers_problem.cache_clear()


@pytest.fixture
def xformers(monkeypatch) -> Xformers:
    """Install the stand-in, so that it can be used on the CPU."""
    module = Xformers()
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(attention, "xformers_problem", lambda device, dtype: None)
    return module


def loaded(folder: Path, source: str, name: str, device: torch.device = CPU, **changes) -> Backbone:
    return load_backbone(tiny.view(folder, source, max_tokens=12, **changes), device, name)


def states_and_gradients(backbone: Backbone, contents: list) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pooled states as `encode` computes them, and the gradients of a weighted sum of them."""
    inputs = backbone.prepare(contents)
    pooled = backbone.encode(inputs).clone()
    backbone.model.requires_grad_(True)
    inputs = {name: tensor.to(backbone.device) for name, tensor in inputs.items()}
    states = backbone._hidden_states(inputs)
    trained = torch.stack([backbone._pool(states[layer], inputs) for layer in backbone.layers], dim=1)
    torch.testing.assert_close(trained, pooled)
    weights = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
    (trained * weights.to(trained)).sum().backward()
    return pooled, {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_states_and_gradients_are_those_of_eager_attention(built, xformers, source, family):
    """Batches are padded and unpadded, models bidirectional and causal, with fewer key heads than query heads."""
    folder = built(source, family)
    contents = tiny.TITLES if source == "title" else tiny.pictures()
    backbone = loaded(folder, source, "xformers")
    assert backbone.attention == "xformers" and len(xformers.calls) > 0
    xformers.calls.clear()
    states, gradients = states_and_gradients(backbone, contents)
    assert len(xformers.calls) >= 2 * (backbone.depth - 1)
    assert {call["bias"] for call in xformers.calls} == {source == "title"}
    eager = loaded(folder, source, "eager")
    expected_states, expected_gradients = states_and_gradients(eager, contents)
    torch.testing.assert_close(states, expected_states, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        atol = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=atol, msg=lambda text, n=name: n + text)
    assert backbone.describe() == eager.describe()


@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_under_autocast_the_kernel_gets_one_dtype(built, xformers, source, family):
    """Rotary embeddings leave queries and keys in float32 under autocast; the stand-in refuses mixed dtypes."""
    backbone = loaded(built(source, family), source, "xformers")
    xformers.calls.clear()
    inputs = backbone.prepare(tiny.TITLES if source == "title" else tiny.pictures())
    with torch.autocast("cpu", torch.bfloat16):
        states = backbone.final(inputs)
    assert states.isfinite().all() and len(xformers.calls) >= backbone.depth - 1


def test_causal_attention_does_not_look_ahead_where_nothing_is_padded(built, xformers):
    """Without padding, Hugging Face would leave out the causal mask and rely on a flag."""
    folder = built("title", "llama")
    titles = ["w1 w2 w3 w4", "w5 w6 w7 w8"]
    states = [loaded(folder, "title", name) for name in ("xformers", "eager")]
    first, second = (backbone.encode(backbone.prepare(titles)) for backbone in states)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert all(call["bias"] for call in xformers.calls)


def both(config: hf.PreTrainedConfig) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """Return one random model twice, with xformers' and with eager attention."""
    torch.manual_seed(0)
    eager = hf.AutoModel.from_config(config, attn_implementation="eager").eval()
    with_xformers = hf.AutoModel.from_config(type(config)(**config.to_dict()), attn_implementation="xformers").eval()
    with_xformers.load_state_dict(eager.state_dict())
    return with_xformers, eager


def test_padding_that_sees_no_key_gives_no_nan(xformers):
    """A padding token that is far from the text sees only padding within its sliding window."""
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 3:] = 0
    results = []
    for model in both(hf.MistralConfig(**tiny.LLM, sliding_window=3)):
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert states.isfinite().all()
        states[mask > 0].square().sum().backward()
        results.append((states[mask > 0], [parameter.grad for parameter in model.parameters()]))
    for result, expected in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)


def test_a_models_own_bias_is_used_and_learns(xformers):
    """BEiT passes relative positions as a mask of 17 keys, one for each head, the same for all items."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for model in both(hf.BeitConfig(**tiny.VISION, use_relative_position_bias=True)):
        tables = [p for name, p in model.named_parameters() if "relative_position_bias_table" in name]
        with torch.no_grad():
            for table in tables:
                table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
        model(pixel_values=pixels).last_hidden_state.square().sum().backward()
        results.append([table.grad for table in tables])
    assert len(results[0]) == 4 and all(call["bias"] for call in xformers.calls)
    for result, expected in zip(*results):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 7, 8, 13])
def test_any_mask_scale_and_dropout_reach_the_kernel(xformers, dtype, keys):
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(3, 4, 5, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, 2, keys, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(3, 1, 5, keys, generator=generator) > 0.4
    mask[..., 0] = True
    additive = torch.where(mask, 0.0, attention.MASKED)  # in float32, whatever the query is
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    for passed_mask in (mask, additive):
        mixed, weights = xformers_attention(
            torch.nn.Module(), query, key, value, passed_mask, scaling=0.3, is_causal=True
        )
        assert weights is None and mixed.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=tolerance, atol=tolerance)
    xformers_attention(torch.nn.Module(), query, key, value, None, dropout=0.25)
    assert xformers.calls[-2:] == [
        {"bias": True, "p": 0.0, "scale": 0.3},
        {"bias": False, "p": 0.25, "scale": None},
    ]


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA2 = {**tiny.LLM, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}
# Text encoders whose scores are capped or have sinks: the class of the configuration, and its settings.
CAPPED = {
    "Gemma2Config": {**GEMMA2, "sliding_window": 3},
    "VaultGemmaConfig": {**GEMMA2, "sliding_window": 3},
    "GptOssConfig": {**tiny.LLM, **EXPERTS, "sliding_window": 3},
    "GraniteSWAConfig": tiny.LLM,
    "GraniteMoeSWAConfig": {**tiny.LLM, **EXPERTS},
    "FlintConfig": tiny.LLM,
    "OpenAIPrivacyFilterConfig": {**tiny.LLM, **EXPERTS, "pad_token_id": 0},
    "PaliGemmaConfig": {
        "text_config": {**GEMMA2, "model_type": "gemma2"},
        "vision_config": {**tiny.VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
    },
}


@pytest.fixture(scope="module")
def built_capped(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model of a family in CAPPED, built once."""

    @functools.cache
    def build(name: str) -> Path:
        torch.manual_seed(0)
        model = hf.AutoModel.from_config(getattr(hf, name)(**CAPPED[name]))
        return tiny.save(model, tmp_path_factory.mktemp(name), None, "bos")

    return build


@pytest.mark.parametrize("wanted", ["xformers", "sdpa"])
@pytest.mark.parametrize("name", CAPPED)
def test_capped_scores_and_sinks_are_kept(built_capped, xformers, caplog, name, wanted):
    """The flags of transformers depend on its version: 5.17 says that Gemma 2 works with PyTorch's attention."""
    if not hasattr(hf, name):
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    caplog.set_level(logging.WARNING, "iisan_fast")
    backbone, eager = (loaded(built_capped(name), "title", attention) for attention in (wanted, "eager"))
    states, expected = (encoder.encode(encoder.prepare(tiny.TITLES)) for encoder in (backbone, eager))
    assert backbone.attention == backbone.model.config._attn_implementation == "eager" and not xformers.calls
    assert torch.equal(states, expected)
    (notice,) = [record.message for record in caplog.records if record.name.startswith("iisan_fast")]
    assert "keeps its own attention" in notice


@pytest.mark.parametrize("name", ["Gemma2Config", "PaliGemmaConfig"])
def test_the_cap_changes_the_states(built_capped, name):
    """The test above would fail if the cap were dropped."""
    backbone = loaded(built_capped(name), "title", "eager")
    capped = backbone.encode(backbone.prepare(tiny.TITLES))
    for module in backbone.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert (backbone.encode(backbone.prepare(tiny.TITLES)) - capped).abs().max() > 0.1


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "sinks", "indices", "anything_new"])
def test_xformers_attention_refuses_an_argument_that_it_would_drop(xformers, argument):
    tensors = [torch.zeros(1, 2, 3, 8)] * 3
    module = torch.nn.Module()
    xformers_attention(module, *tensors, None, sliding_window=3, position_ids=torch.zeros(1, 3), **{argument: None})
    with pytest.raises(DroppedArgumentError, match=f"xformers attention would drop its argument {argument}$"):
        xformers_attention(module, *tensors, None, **{argument: 30.0})


def test_looking_at_arguments_leaves_no_trace(built):
    interface = attention.ALL_ATTENTION_FUNCTIONS
    before = {name: interface[name] for name in ("sdpa", "xformers")}
    loaded(built("title", "bert"), "title", "sdpa")
    assert before == {name: interface[name] for name in before}


@pytest.mark.parametrize(
    ("asked", "device", "model_class", "expected"),
    [
        ("auto", CUDA, hf.BertModel, "xformers"),
        ("auto", CPU, hf.BertModel, "sdpa"),
        ("xformers", CUDA, hf.CLIPModel, "xformers"),
        ("sdpa", CUDA, hf.BertModel, "sdpa"),
        ("eager", CUDA, hf.BertModel, "eager"),
        ("auto", CUDA, hf.Data2VecVisionModel, "sdpa"),  # takes no part in the attention interface
        ("auto", CUDA, hf.DebertaV2Model, "eager"),
        ("xformers", CUDA, hf.GptOssModel, "eager"),  # takes part in it, but has attention sinks
        ("sdpa", CPU, hf.DebertaV2Model, "eager"),
    ],
)
def test_what_is_asked_for_is_chosen_where_it_can_be_had(xformers, asked, device, model_class, expected, caplog):
    assert choose_attention(asked, [model_class], device, torch.float32) == expected
    keeps_its_own = expected == "eager" and asked != "eager"
    assert caplog.messages == ([f"{model_class.__name__} keeps its own attention"] if keeps_its_own else [])


def test_other_names_are_refused():
    with pytest.raises(InputError, match="attention: expected one of auto, xformers, sdpa, eager, found 'flash'"):
        choose_attention("flash", [hf.BertModel], CPU, torch.float32)


# Files of an installed xformers that cannot be used, and the reason in the warning.
LOGGED = 'import logging; logging.getLogger("xformers").warning("WARNING[XFORMERS]: built for\\nPyTorch 2.9.0+cu128")\n'
WARNED = 'import warnings; warnings.warn("built for another PyTorch")\n'
NO_OPERATOR = 'raise NotImplementedError("No operator found for\\n `memory_efficient_attention_forward`")'
UNUSABLE = {
    "no operator in use": (
        LOGGED + f"def memory_efficient_attention(*_, **__): {NO_OPERATOR}\n",
        "NotImplementedError: No operator found for `memory_efficient_attention_forward`; "
        "WARNING[XFORMERS]: built for PyTorch 2.9.0+cu128",
    ),
    "a library is missing": (
        'raise OSError("libcudart.so.12:\\nno such file")\n',
        "OSError: libcudart.so.12: no such file",
    ),
    "a module is missing": ("import xformers.missing\n", "ModuleNotFoundError: No module named 'xformers.missing'"),
    "an operator is missing": (
        WARNED + "import torch; torch.ops.xformers_of_a_test.efficient_attention\n",
        "AttributeError: '_OpNamespace' 'xformers_of_a_test' object has no attribute 'efficient_attention'; "
        "built for another PyTorch",
    ),
    "no attention": ("", "ImportError: cannot import name 'memory_efficient_attention' from 'xformers.ops'"),
    "an extension cannot be loaded": (
        LOGGED + 'raise RuntimeError("undefined symbol: _ZN3c10")\n',
        "RuntimeError: undefined symbol: _ZN3c10; WARNING[XFORMERS]: built for PyTorch 2.9.0+cu128",
    ),
}


@pytest.fixture(params=UNUSABLE)
def unusable(request, tmp_path, monkeypatch) -> str:
    """Put an xformers on the path that cannot be used, and return the reason. A CPU stands in for the GPU."""
    content, reason = UNUSABLE[request.param]
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    failure = functools.cache(lambda _, dtype: attention._failure_of_xformers(CPU, dtype))
    monkeypatch.setattr(attention, "xformers_problem", failure)
    yield reason
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.mark.parametrize("asked", ["auto", "xformers"])
def test_an_unusable_xformers_is_one_notice(unusable, caplog, capfd, recwarn, asked):
    for model_class in (hf.BertModel, hf.ViTModel):
        assert choose_attention(asked, [model_class], CUDA, torch.bfloat16) == "sdpa"
    (message,) = caplog.messages
    assert message.startswith(f"xformers' attention cannot be used ({unusable}")
    assert message.endswith("); PyTorch's takes its place") and "\n" not in message
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("asked", ["auto", "xformers"])
def test_a_missing_xformers_is_one_notice(monkeypatch, caplog, asked):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    for model_class in (hf.BertModel, hf.ViTModel):
        assert choose_attention(asked, [model_class], CUDA, torch.bfloat16) == "sdpa"
    (message,) = caplog.messages
    assert message.startswith("xformers' attention cannot be used (ModuleNotFoundError: ")


def test_xformers_on_a_cpu_is_one_notice_and_imports_nothing(built, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "iisan_fast")  # the program may have set another level in a test that ran before
    imported = []
    monkeypatch.setattr(attention, "_kernel", lambda: imported.append("xformers"))
    assert loaded(built("title", "bert"), "title", "xformers").attention == "sdpa"
    assert loaded(built("image", "vit"), "image", "xformers").attention == "sdpa"
    assert [record.message for record in caplog.records] == [
        "xformers' attention cannot be used (it needs CUDA, found cpu); PyTorch's takes its place"
    ]
    assert not imported


def test_deberta_keeps_its_own_and_says_so_once(built, caplog):
    caplog.set_level(logging.INFO, "iisan_fast")
    folder = built("title", "deberta-v3")
    for name in ("auto", "xformers", "sdpa", "eager"):
        assert loaded(folder, "title", name).attention == "eager"
    said = [record.message for record in caplog.records]
    assert said == ["DebertaV2Model keeps its own attention", *[f"{folder}: attention by eager"] * 4]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_towers_of_text_image_models_take_it_as_well(built, name):
    for source in ("title", "image"):
        backbone = loaded(built(source, "clip"), source, name)
        assert backbone.attention == backbone.model.config._attn_implementation == name


def test_extract_reports_the_choice(built, tmp_path, caplog):
    dataset = write_dataset_folder(tmp_path / "d", make_sequences([[1, 2, 3, 4, 5]]))
    folder = built("title", "bert")
    arguments = ("--cache", tmp_path / "c", "--text-encoder", folder, "--attention", "eager", "--device", "cpu")
    result = iisan_fast("extract", dataset, *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{folder}: attention by eager" in caplog.messages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_on_a_gpu_xformers_agrees_with_sdpa(built, source, family):
    """The tolerance is bfloat16's rounding over several blocks of random weights."""
    if problem := attention.xformers_problem(CUDA, torch.bfloat16):
        pytest.skip(f"xformers' attention cannot be used: {problem}")
    folder = built(source, family)
    contents = tiny.TITLES if source == "title" else tiny.pictures()
    results = []
    for name in ("xformers", "sdpa"):
        backbone = loaded(folder, source, name, CUDA, encoder_dtype="bfloat16")
        assert backbone.attention == name
        results.append(states_and_gradients(backbone, contents))
    (states, gradients), (expected_states, expected_gradients) = results
    assert (states - expected_states).abs().max() <= 5e-2 * max(1, expected_states.abs().max())
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 0.1 * max(1, expected.norm()), name
