"""Prepare images for vision encoders, as float32 values or as bytes that can be turned into the same values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ModelInputs = dict[str, Tensor]  # tensors by the argument names of a Hugging Face model
WORKER_MODULES = (__name__, "transformers.image_processing_backends")  # a process needs them to prepare images


class ByteForm(NamedTuple):
    """A way to keep prepared images as bytes: resized and cropped, but not yet rescaled and normalised."""

    prepare: Callable[[Sequence[Image.Image]], ModelInputs]  # N RGB images -> pixel_values uint8 [N, 3, height, width]
    values: Tensor  # float32 [3, 256] on the encoder's device: the value of each byte of each channel

    def pixel_values(self, pixels: Tensor) -> Tensor:
        """Turn bytes, uint8 [N, 3, height, width], into the processor's float32 values of the same shape and device."""
        channels = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
        return self.values.flatten().index_select(0, (pixels + channels).flatten()).view(pixels.shape)


def byte_form(processor: Any, device: torch.device) -> ByteForm | None:
    """Return the way to keep prepared images as bytes, with `values` on the device; None if the processor allows none.

    The processor must end with a map that gives each byte of a channel one value, such as rescaling and normalisation.
    This is checked on two random images.
    """
    prepare = functools.partial(pixel_values, processor, do_rescale=False, do_normalize=False)
    all_bytes = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    unshaped = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    noise = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    probes = [Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1))]
    try:
        mapped = pixel_values(processor, [Image.fromarray(all_bytes)], **unshaped)["pixel_values"]
        form = ByteForm(prepare, mapped.reshape(3, 256).to(device))
        pixels = prepare(probes)["pixel_values"]
        restored = form.pixel_values(pixels.to(device)).cpu()
        equal = pixels.dtype == torch.uint8 and torch.equal(restored, pixel_values(processor, probes)["pixel_values"])
    except Exception:  # a processor that cannot leave out steps, or rejects these sizes, may raise any error
        return None
    return form if equal else None


def pixel_values(processor: Any, images: Sequence[Image.Image], **options: bool) -> ModelInputs:
    """Return a vision encoder's inputs, float32 [N, 3, height, width], for N RGB images. options: of the processor."""
    return {"pixel_values": processor(images=list(images), return_tensors="pt", **options)["pixel_values"]}
