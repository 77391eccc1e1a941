"""Check that images kept as bytes give the processor's pixel values, or have no byte form."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.encoders import (
    IMAGE,
    view,
)
from iisan_fast.encoders.loading import load_backbone

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("family", IMAGE)
def test_images_kept_as_bytes_become_the_processors_pixel_values(built, family):
    backbone = load_backbone(view(built("image", family), "image"))
    form = backbone.byte_form()
    images = [Image.fromarray(RANDOM.integers(0, 256, size, dtype=np.uint8)) for size in ((9, 50, 3), (70, 33, 3))]
    pixels = form.prepare(images)["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 2
    assert torch.equal(form.pixel_values(pixels), backbone.prepare(images)["pixel_values"])


def ignores_options(processor, images, return_tensors, **options):
    return processor(images=images, return_tensors=return_tensors)


def refuses_options(processor, images, return_tensors, **options):
    return {}["fused"] if options else ignores_options(processor, images, return_tensors)


def looks_around(processor, images, return_tensors, **options):
    values = processor(images=images, return_tensors=return_tensors, **options)["pixel_values"]
    return {"pixel_values": values if options else values - values.mean()}


@pytest.mark.parametrize("change_processor", [ignores_options, refuses_options, looks_around])
def test_images_of_processors_that_do_more_have_no_byte_form(built, change_processor):
    backbone = load_backbone(view(built("image", "vit"), "image"))
    backbone.processor = functools.partial(change_processor, backbone.processor)
    assert backbone.byte_form() is None
