"""Check other vision encoders than the plain ViT: with gates, rotations or registers, and Swin by its last stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from helpers import encoders as tiny
from helpers.encoders import VISION, pictures, refusal, save, view
from iisan_fast.config import ExtractionConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError
from iisan_fast.states.extraction import extract
from iisan_fast.states.feature_table import load_table

SIZES = {"image_size": 32, "patch_size": 4, "embed_dim": 8}
STAGES = {**SIZES, "window_size": 2, "depths": [1, 1, 2], "num_heads": [2, 2, 2]}
REGISTERS = {"num_register_tokens": 3}
# Family: its tiny model, and the number of tokens before the patches.
PLAIN: dict[str, tuple[Callable[[], hf.PreTrainedModel], int]] = {
    "dinov2, gated": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION, use_swiglu_ffn=True)), 1),
    "dinov3, gated": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, **REGISTERS, use_gated_mlp=True)), 4),
    "mlcd": (lambda: hf.MLCDVisionModel(hf.MLCDVisionConfig(**VISION)), 1),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**VISION, use_relative_position_bias=True)), 1),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**VISION)), 0),
    "aimv2": (lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VISION)), 0),
}
STAGED = {
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**STAGES)),
    "swinv2": lambda: hf.Swinv2Model(hf.Swinv2Config(**STAGES)),
}


def saved(build: Callable[[], hf.PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(0)
    return save(build(), folder, "ViTImageProcessor", None)


@torch.no_grad()
def one_by_one(folder: Path, layers: tuple[int, ...], pool: Callable[[Tensor], Tensor]) -> Tensor:
    model = hf.AutoModel.from_pretrained(folder).eval()
    prepare = hf.ViTImageProcessorPil.from_pretrained(folder)
    rows = []
    for picture in pictures():
        pixels = prepare(images=[picture], return_tensors="pt")["pixel_values"]
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        rows.append(torch.stack([pool(states[layer][0]) for layer in layers]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", PLAIN)
def test_images_equal_a_loop_over_single_ones(tmp_path, family):
    build, leading = PLAIN[family]
    folder = saved(build, tmp_path / "encoder")
    for pooling in ("cls", "mean") if leading else ("mean",):
        backbone = load_backbone(view(folder, "image", pooling=pooling))
        pool = (lambda h: h[0]) if pooling == "cls" else (lambda h: h[leading:].mean(dim=0))
        expected = one_by_one(folder, (0, 2, 4), pool)
        torch.testing.assert_close(backbone.encode(backbone.prepare(pictures())), expected, rtol=1e-5, atol=1e-5)
        assert expected.shape == (3, 3, 32) and backbone.final_state == "unnormalised"
    assert load_backbone(view(folder, "image")).pooling == ("cls" if leading else "mean")


def test_an_encoder_that_keeps_what_it_made_can_still_be_trained(tmp_path):
    """BEiT stores the index of its relative positions at its first run, which is in loading."""
    backbone = load_backbone(view(saved(PLAIN["beit"][0], tmp_path / "beit"), "image"))
    inputs = backbone.prepare(pictures())
    assert not backbone.encode(inputs).requires_grad
    backbone.model.requires_grad_(True)
    backbone.final(inputs).square().sum().backward()
    tables = [table.grad for name, table in backbone.model.named_parameters() if "relative_position_bias" in name]
    assert len(tables) == 4 and all(gradient.any() for gradient in tables)


def test_the_class_token_of_a_pooling_head_is_none_of_the_tokens(tmp_path):
    folder = saved(PLAIN["aimv2"][0], tmp_path / "aimv2")
    assert "pooling: expected mean for this encoder, found cls" in refusal(folder, "image", pooling="cls")


@pytest.mark.parametrize("family", STAGED)
def test_of_stages_the_last_one_is_kept(tmp_path, family):
    """The last stage has an input and outputs, numbered among all states. A state is of four merged patches."""
    folder = saved(STAGED[family], tmp_path / "encoder")
    backbone = load_backbone(view(folder, "image"))
    assert (backbone.depth, backbone.width, backbone.layers) == (4, 32, (2, 3))
    assert (backbone.pooling, backbone.final_state) == ("mean", "unnormalised")
    assert backbone.describe()["first_layer"] == 2
    states = backbone.encode(backbone.prepare(pictures()))
    expected = one_by_one(folder, (2, 3), lambda h: h.mean(dim=0))
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    last = load_backbone(view(folder, "image", layers=(3,)))
    assert torch.equal(last.encode(last.prepare(pictures())), states[:, 1:])
    assert load_backbone(view(folder, "image", layer_groups=1)).layers == (2, 3)
    message = "layers: expected ascending numbers within 2..3, its last stage, found 0,2"
    assert message in refusal(folder, "image", layers=(0, 2))
    assert "layer_groups: expected 1 to 1, the encoder's blocks, found 2" in refusal(folder, "image", layer_groups=2)
    assert "pooling: expected mean for this encoder, found cls" in refusal(folder, "image", pooling="cls")


def test_a_cache_knows_the_last_stages_groups(tmp_path, catalogue):
    folder = saved(STAGED["swin"], tmp_path / "swin")
    cpu = torch.device("cpu")
    data = load_dataset(catalogue)
    extract(data, [view(folder, "image")], tmp_path / "cache", cpu, ExtractionConfig(workers=0))
    item_ids = data.sequences.item_ids
    table = load_table(tmp_path / "cache", ["v"], item_ids, cpu, layer_groups=1)
    assert table.shapes == [(2, 32)]
    with pytest.raises(InputError, match="layer_groups: expected 1 to 1, the encoder's blocks, found 2"):
        load_table(tmp_path / "cache", ["v"], item_ids, cpu, layer_groups=2)


def test_a_class_token_of_the_last_stage_stands_before_its_patches(tmp_path):
    sizes = {"hidden_sizes": [8, 8, 8, 16], "num_attention_heads": [1, 1, 1, 2], "depths": [1, 1, 1, 1]}
    folder = saved(lambda: hf.PvtModel(hf.PvtConfig(image_size=32, **sizes)), tmp_path / "pvt")
    backbone = load_backbone(view(folder, "image", pooling="mean"))
    with torch.inference_mode():
        inputs = backbone.prepare(pictures())
        state = backbone._hidden_states(inputs)[-1]
    torch.testing.assert_close(backbone.encode(inputs)[:, -1], state[:, 1:].mean(dim=1))
    assert load_backbone(view(folder, "image")).pooling == "cls"


def test_encoders_that_give_no_tokens_are_refused(tmp_path):
    """They take masks beside the pixels, or have weights for another library (EVA)."""
    siglip2 = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**tiny.SHAPE, num_patches=16, patch_size=8))
    message = refusal(saved(lambda: siglip2, tmp_path / "siglip2"), "image")
    assert "cannot be used as an encoder" in message and "pixel_attention_mask" in message
    eva = tmp_path / "eva"
    code = {"auto_map": {"AutoConfig": "eva.Config"}}
    eva.mkdir()
    for settings, reason in (
        ({"model_type": "timm_wrapper"}, "cannot be used as an encoder"),
        ({"model_type": "eva"} | code, "auto_map names eva.Config for AutoConfig"),
    ):
        (eva / "config.json").write_text(json.dumps({"architecture": "eva02_large_patch14_224", **settings}))
        message = refusal(eva, "image")
        assert reason in message
