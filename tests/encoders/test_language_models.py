"""Check decoder-only language models as text encoders: pooling, padding, layers by list, and loading."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers import encoders as tiny
from helpers.encoders import LLM, TEXT, TITLES, refusal, save, texts_one_by_one, tokenizer, view
from iisan_fast.config import ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders import hugging_face
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError
from iisan_fast.states.extraction import extract
from iisan_fast.states.store import Store

WINDOW = {"sliding_window": 3}  # of some layers
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
MORE = {  # more families, and the styles of their tokenizers
    "mixtral": (lambda: hf.MixtralModel(hf.MixtralConfig(**LLM, num_local_experts=4)), "bos"),
    "gemma2": (lambda: hf.Gemma2Model(hf.Gemma2Config(**LLM, **WINDOW)), "bos"),
    "gemma3": (lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**LLM, **WINDOW)), "bos"),
    "qwen3": (lambda: hf.Qwen3Model(hf.Qwen3Config(**LLM)), "bytes"),
    "qwen3 of experts": (
        lambda: hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**LLM, **EXPERTS)),
        "bytes",
    ),
}
CHECKPOINTS = {  # how to build a checkpoint, and the attribute that is its language model
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLM)), "model"),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLM)), "model"),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLM, num_local_experts=4)), "model"),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLM, **WINDOW)), "model"),
    "qwen3, tied": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLM, tie_word_embeddings=True)), "model"),
    "gemma3 with images": (
        lambda: hf.Gemma3Model(
            hf.Gemma3Config(
                text_config=hf.Gemma3TextConfig(**LLM, **WINDOW),
                vision_config=hf.SiglipVisionConfig(**tiny.VISION),
                mm_tokens_per_image=4,
            )
        ),
        "language_model",
    ),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Return a function that gives the folder of a family's tiny model, built once."""
    root = tmp_path_factory.mktemp("language")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            torch.manual_seed(0)
            build, style = MORE[family]
            save(build(), root / family, None, style)
        return root / family

    return folder


@pytest.mark.parametrize("family", MORE)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_titles_equal_a_loop_over_single_unpadded_ones(families, family, pooling):
    """The order and the other titles of a batch have no effect."""
    backbone = load_backbone(view(families(family), pooling=pooling, max_tokens=12))
    expected = texts_one_by_one(families(family), TITLES, pooling, (0, 2, 4))
    together = backbone.encode(backbone.prepare(TITLES))
    backwards = backbone.encode(backbone.prepare(TITLES[::-1])).flip(0)
    alone = torch.cat([backbone.encode(backbone.prepare([title])) for title in TITLES])
    for states in (together, backwards, alone):
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=2e-5)
    assert (backbone.pooling, backbone.final_state) == (pooling, "normalised")
    assert load_backbone(view(families(family))).pooling == "mean"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_padding_of_the_tokenizer_does_not_count(built, tmp_path, family):
    """The states are the same for a tokenizer that pads left or right, or that has no padding token."""
    all_states = []
    for side, token in (("left", "[PAD]"), ("right", "[PAD]"), ("left", None)):
        raw = tokenizer(TEXT[family][1])
        raw.padding_side = side
        raw.pad_token = token
        folder = tmp_path / f"{side}-{token}"
        folder.mkdir()
        for file in built("title", family).iterdir():
            (folder / file.name).symlink_to(file)
        for file in folder.glob("token*"):
            file.unlink()
        raw.save_pretrained(folder)
        for pooling in ("mean", "last"):
            backbone = load_backbone(view(folder, pooling=pooling, max_tokens=12))
            assert (backbone.processor.padding_side, backbone.processor.pad_token) == (side, token)
            all_states.append(backbone.encode(backbone.prepare(TITLES)))
    for mean, last in zip(all_states[2::2], all_states[3::2]):
        torch.testing.assert_close(mean, all_states[0])
        torch.testing.assert_close(last, all_states[1])


def test_layers_by_list_where_no_even_groups_give_them(tmp_path):
    """The lists are those published for the 32 blocks of LLaMA-7B."""
    layers = (2, 8, 14, 20, 26, 32)
    folder = save(hf.LlamaModel(hf.LlamaConfig(**LLM | {"num_hidden_layers": 32})), tmp_path / "llama", None, "bare")
    whole = load_backbone(view(folder, layers=tuple(range(33))))
    partial = load_backbone(view(folder, layers=layers))
    assert partial.describe()["layers"] == list(layers) and partial.depth == 33
    inputs = whole.prepare(TITLES)
    assert torch.equal(partial.encode(inputs), whole.encode(inputs)[:, layers])
    for groups, expected_layers in ((4, (0, 8, 16, 24, 32)), (6, (0, 5, 10, 16, 21, 26, 32)), (32, tuple(range(33)))):
        assert load_backbone(view(folder, layer_groups=groups)).layers == expected_layers
    assert "layer_groups: expected 1 to 32, the encoder's blocks, found 33" in refusal(folder, layer_groups=33)
    assert "within 0..32, found 2,8,33" in refusal(folder, layers=(2, 8, 33))
    assert "within 0..32, found 8,2" in refusal(folder, layers=(8, 2))


@pytest.mark.parametrize("changes", [{"layers": (8, 2)}, {"layers": (2, 5)}, {"layers": (-1, 2)}, {"layer_groups": 5}])
def test_layers_that_are_not_there_are_refused_before_weights_are_read(built, tmp_path, changes):
    """Reading the weights of a large model takes minutes."""
    folder = shutil.copytree(built("title", "llama"), tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    assert "expected" in refusal(folder, **changes) and "within 0..4" in refusal(folder, layers=(2, 5))
    assert "no file named" in refusal(folder, layers=(2, 4))


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_checkpoint_with_a_head_or_a_vision_tower_gives_its_language_models_states(tmp_path, family):
    """Such checkpoints are published for generation: weights have other names, or an image encoder comes with them."""
    torch.manual_seed(0)
    build, part = CHECKPOINTS[family]
    model = build().eval()
    folder = save(model, tmp_path / "encoder", None, "bos")
    backbone = load_backbone(view(folder, layers=(0, 1, 2, 3, 4), max_tokens=12))
    assert backbone.final_state == "normalised" and backbone.pooling == "mean"
    language = getattr(model, part)
    encoded = backbone.encode(backbone.prepare(TITLES))
    for title, states in zip(TITLES, encoded):
        ids = backbone.prepare([title])["input_ids"]
        with torch.inference_mode():
            expected = language(input_ids=ids, output_hidden_states=True).hidden_states
        pooled = torch.stack([state[0].mean(dim=0) for state in expected])
        torch.testing.assert_close(states, pooled, rtol=1e-5, atol=2e-5)


def test_a_dtype_among_the_options_is_the_encoders():
    configured = ViewConfig("v", "title", "e", options={"dtype": "bfloat16", "max_memory": None})
    assert configured == ViewConfig("v", "title", "e", encoder_dtype="bfloat16", options={"max_memory": None})
    with pytest.raises(InputError, match="encoder_dtype, options.dtype: found float16 and bfloat16; give one of them"):
        ViewConfig("v", "title", "e", encoder_dtype="float16", options={"dtype": "bfloat16"})
    with pytest.raises(InputError, match="options.dtype: expected one of auto, float32"):
        ViewConfig("v", "title", "e", options={"dtype": "int3"})


def test_options_reach_hugging_face_and_count_as_settings(built, tmp_path, monkeypatch, catalogue):
    """An option that changes states, such as quantization, counts; a device map does not."""
    passed = []
    real = hugging_face.load_model

    def load(encoder, config, kind, options, revision):
        passed.append(options)
        return real(encoder, config, kind, {name: options[name] for name in ("dtype", "attn_implementation")})

    monkeypatch.setattr("iisan_fast.encoders.base.load_model", load)
    folder = built("title", "llama")
    bits = {"load_in_4bit": True}
    title = view(folder, options={"quantization_config": bits, "max_memory": {"cpu": "1GB"}, "device_map": "cpu"})
    described = load_backbone(title).describe()
    assert described["options"] == {"quantization_config": bits}
    assert passed[-1]["quantization_config"] == bits and passed[-1]["device_map"] == "cpu"
    assert passed[-1]["attn_implementation"] == "sdpa" and passed[-1]["dtype"] == torch.float32
    data = load_dataset(catalogue)
    cpu = torch.device("cpu")
    extract(data, [title], tmp_path / "cache", cpu)
    with Store(tmp_path / "cache") as store:
        assert store.view("v")["options"] == {"quantization_config": bits}
    with pytest.raises(InputError, match=r'view .v. was made with other settings: options \{"quantization_config"'):
        extract(data, [view(folder)], tmp_path / "cache", cpu)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="quantizes where it can")
def test_quantization_without_its_library_says_what_to_install(built):
    message = refusal(built("title", "llama"), options={"quantization_config": {"load_in_4bit": True}})
    assert "cannot be used as an encoder" in message and "requires bitsandbytes: `pip install" in message


def test_gpus_of_max_memory_have_their_numbers(built, monkeypatch):
    """JSON keys are text, which Hugging Face does not accept as the number of a GPU."""
    passed = {}
    real = hf.LlamaModel.from_pretrained

    def load(*arguments, **options):
        passed.update(options)
        return real(*arguments, **{name: value for name, value in options.items() if name != "max_memory"})

    monkeypatch.setattr(hf.LlamaModel, "from_pretrained", load)
    load_backbone(view(built("title", "llama"), options={"max_memory": {"0": "20GB", "1": "2GB", "cpu": "60GB"}}))
    assert passed["max_memory"] == {0: "20GB", 1: "2GB", "cpu": "60GB"}


def test_an_option_unknown_to_the_encoder_is_named(built):
    assert "unexpected keyword argument 'load_in_3bit'" in refusal(built("title", "llama"), options={"load_in_3bit": 1})


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_places_the_encoder(built, device_map, monkeypatch):
    pytest.importorskip("accelerate")
    folder = built("title", "llama")
    expected = load_backbone(view(folder))
    with monkeypatch.context() as patch:
        patch.setattr(hf.PreTrainedModel, "to", lambda *_: pytest.fail("moved"))
        backbone = load_backbone(view(folder, options={"device_map": device_map}), "meta")
    assert backbone.device == torch.device("cpu")
    assert torch.equal(backbone.encode(backbone.prepare(TITLES)), expected.encode(expected.prepare(TITLES)))
    assert backbone.describe() == expected.describe()


def test_an_encoder_partly_on_disk_gives_the_same_states(built, tmp_path):
    """Hugging Face loads the weights of a block when the block is called."""
    pytest.importorskip("accelerate")
    folder = built("title", "llama")
    names = ["embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "rotary_emb"]
    device_map = {name: "disk" if name == "layers.2" else "cpu" for name in names}
    options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    backbone, expected = load_backbone(view(folder, options=options)), load_backbone(view(folder))
    assert backbone.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(backbone.encode(backbone.prepare(TITLES)), expected.encode(expected.prepare(TITLES)))


@pytest.mark.parametrize("name", ["attn_implementation", "output_hidden_states", "trust_remote_code", "subfolder"])
def test_options_that_are_decided_here_are_refused(name):
    with pytest.raises(InputError, match=f"options.{name}: is decided here"):
        ViewConfig("v", "title", "e", options={name: True})
