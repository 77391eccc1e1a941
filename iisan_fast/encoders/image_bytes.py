"""Images as vision encoders read them, and as bytes that become the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ModelInputs = dict[str, Tensor]  # by the names that a Hugging Face model gives them
WORKER_MODULES = (__name__, "transformers.image_processing_backends")  # a process that prepares images imports them


class ByteForm(NamedTuple):
    """Images as bytes: resized and cropped, but not yet rescaled and normalised."""

    prepare: Callable[[Sequence[Image.Image]], ModelInputs]  # pixel_values uint8 [N, 3, height, width] of RGB images
    values: Tensor  # float32 [3, 256] on the encoder's device: what each byte of a channel becomes

    def pixel_values(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, height, width] of bytes uint8 of that shape, on the same device, as the processor does it."""
        channels = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
        return self.values.flatten().index_select(0, (pixels + channels).flatten()).view(pixels.shape)


def byte_form(processor: Any, device: torch.device) -> ByteForm | None:
    """Return the way to keep images as bytes; None if the processor does not end with a map of bytes to values."""
    prepare = functools.partial(pixel_values, processor, do_rescale=False, do_normalize=False)
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    unshaped = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    noise = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    probes = [Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1))]
    try:
        mapped = pixel_values(processor, [Image.fromarray(every)], **unshaped)["pixel_values"]
        form = ByteForm(prepare, mapped.reshape(3, 256).to(device))
        pixels = prepare(probes)["pixel_values"]
        restored = form.pixel_values(pixels.to(device)).cpu()
        same = pixels.dtype == torch.uint8 and torch.equal(restored, pixel_values(processor, probes)["pixel_values"])
    except Exception:  # a processor whose steps cannot be left out, or that is fussy about sizes, raises anything
        return None
    return form if same else None


def pixel_values(processor: Any, images: Sequence[Image.Image], **options: bool) -> ModelInputs:
    """Return a vision encoder's inputs for RGB images: float32 [N, 3, height, width]. Options are the processor's."""
    return {"pixel_values": processor(images=list(images), return_tensors="pt", **options)["pixel_values"]}
