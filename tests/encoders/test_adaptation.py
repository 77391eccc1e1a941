"""Check each fine-tuning method on tiny encoders of every family: what it trains, where, and how many parameters."""

from __future__ import annotations

import math
import sys
from itertools import chain

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from helpers.datasets import DATA
from helpers.encoders import BERT, IMAGE, LLM, SHAPE, TEXT, VISION
from iisan_fast.config import ModelConfig
from iisan_fast.encoders.adaptation import Adapter, adapt, checkpoint_blocks
from iisan_fast.encoders.block_layers import transformer_blocks
from iisan_fast.errors import InputError
from iisan_fast.models.item_encoders import FinalHeads
from iisan_fast.models.sasrec import SASRec
from iisan_fast.models.side_network import SideItemEncoder

BLOCKS, WIDTH, FEED_FORWARD = SHAPE["num_hidden_layers"], SHAPE["hidden_size"], SHAPE["intermediate_size"]
KEY_VALUE_WIDTH = LLM["num_key_value_heads"] * LLM["head_dim"]
TRAINING = ("full", "adapter", "lora", "bitfit")


def build(kind: str, family: str) -> hf.PreTrainedModel:
    """Build a family's tiny encoder; of a model with two towers, return the one that reads `kind`."""
    model = (TEXT if kind == "text" else IMAGE)[family][0]()
    with torch.no_grad():  # far from the initial 0.02, so that every part of a block has an effect
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.use_cache = False
    return getattr(model, {"text": "text_model", "image": "vision_model"}[kind], model).eval()


def inputs_for(model: hf.PreTrainedModel, items: int = 3) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(items, 3, 32, 32, dtype=model.dtype)}
    ids = torch.randint(4, 40, (items, 7))
    mask = torch.arange(7) < torch.tensor([7, 4, 6])[torch.arange(items) % 3, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


FAMILIES = [("text", family) for family in TEXT] + [("image", family) for family in IMAGE]


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
@pytest.mark.parametrize("method", TRAINING)
def test_a_method_trains_what_it_says_and_nothing_else(kind, family, method):
    """Every trained weight gets a gradient and the loss falls; all other weights stay equal, bit for bit."""
    model = build(kind, family)
    if method == "bitfit" and family in ("llama", "mistral", "gemma"):
        with pytest.raises(
            InputError, match="bitfit: it trains biases, and .*Model has none; choose full, adapter or lora$"
        ):
            adapt(model, method)
        return
    pretrained = {parameter: parameter.clone() for parameter in model.parameters()}
    groups = adapt(model, method, bottleneck=5)
    (trained,) = groups.values()
    assert list(groups) == ["adapters" if method in ("adapter", "lora") else "encoders"]
    assert {id(parameter) for parameter in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(trained).isdisjoint(pretrained) == (method in ("adapter", "lora"))
    inputs = inputs_for(model)
    target = torch.randn(3, WIDTH)
    losses = []
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    for _ in range(5):
        loss = (model(**inputs).last_hidden_state[:, -1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(optimizer.state) == set(trained)  # so that a checkpoint finds a state for each
    for parameter, old in pretrained.items():
        assert parameter.requires_grad or torch.equal(parameter, old)


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_a_frozen_encoder_has_nothing_to_train(kind, family):
    model = build(kind, family)
    assert adapt(model, "frozen") == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", [*TRAINING, "frozen"])
def test_dropout_is_off(method):
    model = build("text", "bert").train()
    adapt(model, method)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_lora_starts_at_the_pretrained_encoder(kind, family):
    model = build(kind, family)
    inputs = inputs_for(model)
    with torch.no_grad():
        pretrained = model(**inputs).last_hidden_state
        adapt(model, "lora")
        assert torch.equal(model(**inputs).last_hidden_state, pretrained)


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_every_block_holds_the_same(kind, family, method):
    model = build(kind, family)
    adapt(model, method, bottleneck=5)
    added = [
        {n for n, p in block.named_parameters() if p.requires_grad} for block in transformer_blocks(model).values()
    ]
    assert len(added) == BLOCKS and all(names == added[0] for names in added)
    assert len(added[0]) == (8 if method == "adapter" else 4)
    assert sum(p.requires_grad for p in model.parameters()) == BLOCKS * len(added[0])


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def trained_count(kind: str, family: str, method: str, **settings) -> int:
    return count(p for group in adapt(build(kind, family), method, **settings).values() for p in group)


@pytest.mark.parametrize(
    ("kind", "family", "value_width"),
    [
        ("text", "bert", WIDTH),
        ("text", "deberta-v3", WIDTH),
        ("text", "llama", KEY_VALUE_WIDTH),
        ("image", "vit", WIDTH),
        ("image", "siglip", WIDTH),
    ],
)
def test_counts_of_what_is_added(kind, family, value_width):
    adapters = BLOCKS * 2 * (5 * WIDTH + 5 + WIDTH * 5 + WIDTH)
    assert trained_count(kind, family, "adapter", bottleneck=5) == adapters
    assert trained_count(kind, family, "lora") == BLOCKS * 8 * ((WIDTH + WIDTH) + (WIDTH + value_width))


def test_counts_of_what_is_freed():
    attention, feed_forward = 4 * (WIDTH * WIDTH + WIDTH), 2 * WIDTH * FEED_FORWARD + FEED_FORWARD + WIDTH
    block = attention + feed_forward + 4 * WIDTH
    block_biases = 4 * WIDTH + FEED_FORWARD + WIDTH + 2 * WIDTH
    embeddings = (BERT["vocab_size"] + BERT["max_position_embeddings"] + 2) * WIDTH + 2 * WIDTH
    assert trained_count("text", "bert", "full") == BLOCKS * block + embeddings
    assert trained_count("text", "bert", "bitfit") == BLOCKS * block_biases + WIDTH
    patches = (32 // 8) ** 2
    embeddings = 3 * 8 * 8 * WIDTH + WIDTH + (patches + 1) * WIDTH + WIDTH  # patches, positions, class token
    assert trained_count("image", "vit", "full") == BLOCKS * block + embeddings + 2 * WIDTH
    assert trained_count("image", "vit", "bitfit") == BLOCKS * block_biases + WIDTH + WIDTH


@pytest.mark.parametrize(
    ("kind", "family", "unused"),
    [
        ("text", "bert", {"pooler"}),
        ("image", "vit", {"pooler"}),
        ("image", "dinov2", {"mask_token"}),
        ("image", "clip vision tower", {"post_layernorm"}),
        ("image", "siglip", {"head"}),
        ("text", "siglip", {"head"}),
        ("text", "llama", set()),
    ],
)
def test_what_the_final_state_does_not_depend_on_is_left_out(kind, family, unused):
    model = build(kind, family)
    adapt(model, "full")
    untrained = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert {part for name in untrained for part in name.split(".")} >= unused
    assert all(unused & set(name.split(".")) for name in untrained)


@pytest.mark.parametrize(("size", "trained"), [(32, True), (16, False)])
def test_positions_that_are_resized_to_the_images_stay_as_they_are(size, trained):
    """On CUDA their gradient is not deterministic, and torch refuses to compute it."""
    model = build("image", "dinov2")
    adapt(model, "full", example={"pixel_values": torch.randn(1, 3, size, size)})
    freed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert freed.pop("embeddings.position_embeddings") == trained
    assert [name for name, free in freed.items() if not free] == ["embeddings.mask_token"]


def heads_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by hand; query, key, value and the result are [N, T, D]."""
    heads = SHAPE["num_attention_heads"]
    width = WIDTH // SHAPE["num_attention_heads"]
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def adapted(linear: nn.Module, x: Tensor) -> Tensor:
    """Apply an adapted linear layer by hand: the layer, then x + up(relu(down(x)))."""
    base, (down, _, up) = linear[0], linear[1]
    assert isinstance(linear[1], Adapter)
    y = x @ base.weight.T + base.bias
    return y + (y @ down.weight.T + down.bias).relu() @ up.weight.T + up.bias


def adapters_far_from_the_identity(model: hf.PreTrainedModel) -> nn.Module:
    for parameter in adapt(model, "adapter", bottleneck=5)["adapters"]:
        nn.init.normal_(parameter, std=0.3)
    return next(iter(transformer_blocks(model).values())).double()


def test_adapters_stand_before_the_residual_in_a_block_of_bert():
    block = adapters_far_from_the_identity(build("text", "bert"))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    attention = block.attention
    self_attention = attention.self
    ended = adapted(
        attention.output.dense, heads_attention(self_attention.query(x), self_attention.key(x), self_attention.value(x))
    )
    middle = attention.output.LayerNorm(x + ended)
    fed = adapted(block.output.dense, nn.functional.gelu(block.intermediate.dense(middle)))
    torch.testing.assert_close(first(block(x)), block.output.LayerNorm(middle + fed))


def test_adapters_stand_before_the_residual_in_a_block_of_vit():
    block = adapters_far_from_the_identity(build("image", "vit"))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    attention = block.attention
    normed = block.layernorm_before(x)
    projections = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    middle = x + adapted(attention.o_proj, heads_attention(*projections))
    fed = adapted(block.mlp.fc2, nn.functional.gelu(block.mlp.fc1(block.layernorm_after(middle))))
    torch.testing.assert_close(first(block(x)), middle + fed)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_an_adapter_starts_near_the_identity():
    adapter = Adapter(WIDTH, 64, "gelu")
    x = torch.randn(100, WIDTH)
    assert 0 < (adapter(x) - x).abs().max() < 0.01
    assert not adapter[0].bias.any() and not adapter[2].bias.any()


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_blocks_give_the_same_gradients(kind, family, method):
    """Blocks may also be above frozen embeddings, and may be switched several times."""
    model = build(kind, family).double()
    parameters = [p for group in adapt(model, method).values() for p in group]
    inputs = inputs_for(model)
    calls = []
    for block in transformer_blocks(model).values():
        named_children = [child for child in block.modules() if isinstance(child, nn.Linear)]
        named_children[0].register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[Tensor, ...]:
        calls.clear()
        return torch.autograd.grad(model(**inputs).last_hidden_state.square().sum(), parameters)

    whole = gradients()
    once = len(calls)
    for on in (True, False, True):
        checkpoint_blocks(model, on)
        for gradient, expected in zip(gradients(), whole):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
        assert len(calls) == once * (1 + on)


def test_encoders_that_a_method_cannot_take_are_named_with_the_methods_that_can():
    convolutional = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    refused = "^ResNetModel: method: adapter: ResNetStage has no linear layer in its attention; choose full or bitfit$"
    with pytest.raises(InputError, match=refused):
        adapt(convolutional, "adapter")
    with pytest.raises(InputError, match="^some/name: method: lora: .*; choose full or bitfit$"):
        adapt(convolutional, "lora", name="some/name")


def test_lora_finds_queries_and_values_in_capital_letters():
    model = hf.CTRLModel(hf.CTRLConfig(vocab_size=40, n_embd=8, n_layer=1, n_head=2, dff=8, n_positions=16))
    trained = {id(parameter) for parameter in adapt(model, "lora")["adapters"]}
    layers = {name.split(".lora")[0] for name, parameter in model.named_parameters() if id(parameter) in trained}
    assert layers == {"h.0.multi_head_attention.Wq", "h.0.multi_head_attention.Wv"}


def test_a_block_with_two_candidates_is_named():
    model = build("text", "bert")
    for block in transformer_blocks(model).values():
        attention = block.attention.self
        attention.q_proj = attention.query
        attention.query = nn.Sequential(attention.key, attention.q_proj)
    with pytest.raises(InputError, match="BertLayer has no linear layers for queries and values, or several"):
        adapt(model, "lora")


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"^method: lora needs peft; pip install 'iisan-fast\[lora\]'$"):
        adapt(build("text", "bert"), "lora")


def test_images_that_are_not_square():
    model = hf.ViTModel(hf.ViTConfig(**{**VISION, "image_size": (32, 16)}))
    assert adapt(model, "full")["encoders"]


# By hand, for 12 blocks of width D = 768 and a feed-forward of F = 3,072 in each of two encoders.
D, F = 768, 3072
BLOCK = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
BERT_BASE = 12 * BLOCK + (30_522 + 512 + 2) * D + 2 * D  # words, positions, segments, and their norm
VIT_BASE = (
    12 * BLOCK + (3 * 16 * 16 * D + D) + (14 * 14 + 1) * D + D + 2 * D
)  # patches, positions, class token, last norm
HEADS = 2 * (D * 64 + 64) + (128 * 64 + 64)
SEQUENCE_ENCODER = 10 * 64 + 2 * 64 + 2 * (4 * 64 * 64 + (64 * 256 + 256) + (256 * 64 + 64) + 4 * 64)
TRAINED = {
    "full": BERT_BASE + VIT_BASE,
    "adapter": 24 * 2 * (D * 64 + 64 + 64 * D + D),
    "lora": 24 * 2 * 8 * (D + D),
    "bitfit": 24 * (6 * D + F + D) + 3 * D,  # of the blocks; of BERT's first norm, ViT's patches and its last norm
}
PAPER = {"full": 195, "adapter": 5, "lora": 0.8, "bitfit": 0.4}  # millions of trained parameters in the IISAN paper


@pytest.mark.parametrize("method", PAPER)
def test_counts_of_the_papers_encoders(method):
    """The counts are of BERT-base, ViT-base, their heads and the sequence encoder."""
    if not (DATA / "configs").is_dir():
        pytest.skip(f"needs the configurations of BERT-base and ViT-base in {DATA / 'configs'}")
    config = ModelConfig()
    with torch.device("meta"):
        text = hf.BertModel(hf.BertConfig.from_pretrained(DATA / "configs" / "bert-base-uncased"))
        image = hf.ViTModel(hf.ViTConfig.from_pretrained(DATA / "configs" / "vit-base-patch16-224"))
        groups = [adapt(model, method, config.bottleneck) for model in (image, text)]
        rest = nn.ModuleList([FinalHeads([768, 768], config.embedding_dim), SASRec(config, 10)])
    trained = []
    for trained_groups in groups:
        trained += chain.from_iterable(trained_groups.values())
    assert all(p.is_meta for p in trained)
    trained_count = count(trained) + count(rest.parameters())
    assert trained_count == TRAINED[method] + HEADS + SEQUENCE_ENCODER
    assert round(trained_count / 1e6, 1 if PAPER[method] < 1 else 0) == PAPER[method]


def test_count_of_iisan():
    config = ModelConfig()
    with torch.device("meta"):
        parameter_count = count(SideItemEncoder([(7, 768), (7, 768)], config).parameters()) + count(
            SASRec(config, 10).parameters()
        )
    assert parameter_count == 4_113_877 and round(parameter_count / 1e6) == 4
