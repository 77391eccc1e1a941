"""Check tiny vision encoders of every family against a loop over single images: pixels, poolings, bytes."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from helpers.encoders import (
    IMAGE,
    VISION,
    differing,
    pictures,
    refusal,
    save,
    tower,
    view,
)
from iisan_fast.encoders.batch_mates import TOGETHER
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError


@pytest.mark.parametrize("family", IMAGE)
def test_images_equal_a_loop_over_single_ones(built, family):
    folder = built("image", family)
    processor = IMAGE[family][1]
    backbone = load_backbone(view(folder, "image"))
    assert (backbone.pooling, backbone.final_state) == IMAGE[family][2:]
    assert backbone.batches == TOGETHER and "batches" not in backbone.describe()
    model = tower(folder, "vision_model", torch.float32)
    prepare = getattr(hf, processor + "Pil").from_pretrained(folder)
    for pooling in ("cls", "mean") if IMAGE[family][2] == "cls" else ("mean",):
        backbone = load_backbone(view(folder, "image", pooling=pooling))
        rows = []
        for picture in pictures():
            with torch.no_grad():
                pixels = prepare(images=[picture], return_tensors="pt")["pixel_values"]
                states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
            tokens = [states[layer][0] for layer in (0, 2, 4)]
            rows.append(torch.stack([h[0] if pooling == "cls" else h[-16:].mean(dim=0) for h in tokens]))
        states = backbone.encode(backbone.prepare(pictures()))
        torch.testing.assert_close(states, torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_pixels_are_those_of_pillow(built):
    """Pillow resizes with the processor's filter, then values are scaled to 0..1 and normalised."""
    backbone = load_backbone(view(built("image", "vit"), "image"))
    for picture in pictures():
        resized = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        expected = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        pixels = backbone.prepare([picture])["pixel_values"]
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected)


def test_images_are_prepared_alike_one_by_one_and_without_the_model(built):
    backbone = load_backbone(view(built("image", "vit"), "image"))
    content = pickle.dumps(backbone.preparation)
    assert len(content) < 10_000
    alone = torch.cat([pickle.loads(content)([picture])["pixel_values"] for picture in pictures()])
    assert torch.equal(alone, backbone.prepare(pictures())["pixel_values"])


def test_poolings_that_a_vision_encoder_lacks_are_refused(built):
    with pytest.raises(InputError, match="pooling: expected mean for this encoder, found cls"):
        load_backbone(view(built("image", "siglip"), "image", pooling="cls"))
    with pytest.raises(InputError, match="expected cls or mean for this encoder, found last"):
        load_backbone(view(built("image", "vit"), "image", pooling="last"))


def test_patches_that_are_dropped_at_random_are_refused(tmp_path):
    masking = hf.ViTMAEModel(hf.ViTMAEConfig(**VISION))
    folder = save(masking, tmp_path / "mae", "ViTImageProcessor", None)
    assert "expected a state for each of 16 patches, found 5" in refusal(folder, "image")


def test_the_image_processor_counts_and_its_backend_is_recorded(built, tmp_path):
    described = load_backbone(view(built("image", "vit"), "image")).describe()
    assert described["processor_backend"] == "pil"
    other_processor = shutil.copytree(built("image", "vit"), tmp_path / "vit")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(other_processor)
    assert differing(load_backbone(view(other_processor, "image")).describe(), described) == {"encoder", "processor"}
