"""Check convolutional encoders: the mean of each stage's map is a layer, for states and for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers.encoders import pictures, refusal, view
from iisan_fast.config import ExtractionConfig, ModelConfig, RunConfig, TrainConfig, UncachedConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.encoders.stage_maps import channel_axis, pooled_map
from iisan_fast.errors import InputError
from iisan_fast.states.extraction import extract
from iisan_fast.states.recorded_views import refuse_other_encoders
from iisan_fast.states.store import Store
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
GROUPS = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
# Family: its tiny model, and the channels of its maps.
FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], list[int]]] = {
    "convnext": (lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)), [8, 8, 12, 16, 24]),
    "convnextv2": (lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(**STAGES)), [8, 8, 12, 16, 24]),
    "resnet": (lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, **STAGES)), [8, 8, 12, 16, 24]),
    "regnet": (lambda: hf.RegNetModel(hf.RegNetConfig(**GROUPS, groups_width=8)), [8, 16, 24, 32, 48]),
    "bit": (lambda: hf.BitModel(hf.BitConfig(**GROUPS, num_groups=2)), [8, 16, 24, 32, 48]),
    "mobilenet": (
        lambda: hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.25, finegrained_output=True)),
        [8, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 40, 40, 40, 80, 1280],  # the last one behind all blocks
    ),
}


def saved(family: str, folder: Path) -> Path:
    """Save the tiny model of a family with an image processor of 64 x 64 pixels. The weights and norms are random."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    model.save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def convnext(tmp_path_factory) -> Path:
    return saved("convnext", tmp_path_factory.mktemp("convnext") / "encoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_a_loop_over_single_images(family, tmp_path):
    folder = saved(family, tmp_path / "encoder")
    widths = FAMILIES[family][1]
    backbone = load_backbone(view(folder, "image"))
    states = backbone.encode(backbone.prepare(pictures()))
    model = hf.AutoModel.from_pretrained(folder).eval()
    prepare = hf.ViTImageProcessorPil.from_pretrained(folder)
    for picture, of_picture in zip(pictures(), states):
        with torch.no_grad():
            pixels = prepare(images=[picture], return_tensors="pt")["pixel_values"]
            output = model(pixel_values=pixels, output_hidden_states=True)
        maps = list(output.hidden_states)
        if len(maps) < len(widths):
            maps.append(output.last_hidden_state)
        assert [map_.shape[1] for map_ in maps] == widths
        for map_, state in zip(maps, of_picture, strict=True):
            expected = map_[0].flatten(1).mean(dim=1)
            torch.testing.assert_close(state[: len(expected)], expected, rtol=1e-4, atol=1e-6)
            assert not state[len(expected) :].any()
    described = backbone.describe()
    assert described["widths"] == widths and described["layers"] == list(range(len(widths)))
    assert described["width"] == states.shape[2] >= max(widths) and described["pooling"] == "mean"


def test_states_are_read_by_hooks_and_equal_those_of_one_call(convnext):
    backbone = load_backbone(view(convnext, "image", layers=(1, 3, 4)))
    inputs = backbone.prepare(pictures())
    assert backbone._places is not None
    states = backbone.encode(inputs)
    assert torch.equal(states, backbone.encode_whole(inputs)) and states.shape == (3, 3, 24)
    assert backbone.describe()["widths"] == [8, 16, 24]
    final = backbone.final(inputs)
    torch.testing.assert_close(final, states[:, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bit"])  # BiT ends with a norm
def test_the_final_state_is_the_last_layer(family, tmp_path):
    backbone = load_backbone(view(saved(family, tmp_path / "encoder"), "image"))
    inputs = backbone.prepare(pictures())
    assert backbone._places is not None
    torch.testing.assert_close(backbone.final(inputs), backbone.encode(inputs)[:, -1], rtol=1e-5, atol=1e-6)


def test_layers_and_pooling_that_do_not_exist_are_refused(convnext):
    assert "layers: expected ascending numbers within 0..4, found 2,5" in refusal(convnext, "image", layers=(2, 5))
    assert "pooling: expected mean for this encoder, found cls" in refusal(convnext, "image", pooling="cls")


def test_maps_with_the_channels_last_are_pooled_alike():
    maps = torch.randn(2, 5, 4, 4)
    assert channel_axis([maps, torch.randn(2, 9, 2, 2)]) == 1
    assert channel_axis([maps.movedim(1, 3), torch.randn(2, 2, 2, 9)]) == 3
    assert channel_axis([maps, torch.randn(2, 16, 5)]) is None
    first, last = pooled_map(maps, 1, 7), pooled_map(maps.movedim(1, 3), 3, 7)
    torch.testing.assert_close(first, last)
    assert first.shape == (2, 7) and not first[:, 5:].any()


def config_of(dataset: Path, method: str, encoder: ViewConfig, cache: Path | None = None) -> RunConfig:
    """Return the configuration of a run of two steps."""
    uncached = UncachedConfig((encoder,)) if cache is None else None
    sizes = {"bottleneck": 8} if method.startswith("iisan") else {}
    optimisation = TrainConfig(batch_users=32, max_epochs=1)
    model = ModelConfig(method, embedding_dim=16, **sizes)
    return RunConfig(str(dataset), cache and str(cache), (encoder.name,), uncached, model=model, train=optimisation)


def test_maps_of_a_model_without_a_last_hidden_state_are_refused(tmp_path):
    sizes = {"stage_in_channels": [8, 8], "stage_mid_channels": [8, 8], "stage_out_channels": [8, 8]}
    blocks = {"stage_num_blocks": [1, 1], "stage_downsample": [True, True], "stage_light_block": [False, False]}
    layers = {"stage_kernel_size": [3, 3], "stage_numb_of_layers": [1, 1], "hidden_sizes": [8, 8], "depths": [1, 1]}
    config = hf.HGNetV2Config(embedding_size=8, stem_channels=[3, 8, 8], **sizes, **blocks, **layers)
    hf.HGNetV2Backbone(config).save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    assert "HGNetV2Backbone reports no last_hidden_state; choose another encoder" in refusal(tmp_path, "image")


def loss_of(run: Path) -> float:
    return json.loads(RunFolder(run).metrics.read_text().splitlines()[-1])["loss"]


@pytest.mark.slow
def test_cached_and_uncached_iisan_take_the_same_steps(convnext, small_catalogue, tmp_path):
    encoder = view(convnext, "image")
    cache = tmp_path / "cache"
    extract(load_dataset(small_catalogue), [encoder], cache, CPU, ExtractionConfig(dtype="float32"))
    with Store(cache) as store:
        assert store.view("v")["widths"] == [8, 8, 12, 16, 24]
    refuse_other_encoders(cache, [encoder])
    with pytest.raises(InputError, match="layers"):
        refuse_other_encoders(cache, [view(convnext, "image", layers=(0, 2, 4))])
    losses = []
    for place in (cache, None):
        run = tmp_path / f"run {place is None}"
        train(config_of(small_catalogue, "iisan-versa", encoder, place), run, CPU)
        losses.append(loss_of(run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frozen", "full", "bitfit"])
def test_other_methods_take_their_steps(method, tmp_path, small_catalogue):
    encoder = view(saved("resnet", tmp_path / "encoder"), "image")
    train(config_of(small_catalogue, method, encoder), tmp_path / "run", CPU)
    assert 0 < loss_of(tmp_path / "run") < 20
