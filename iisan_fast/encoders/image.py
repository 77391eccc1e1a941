"""Vision encoders: preparing images, and pooling over the class token or the patches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at top level it may want torchvision

from .base import Backbone
from .image_bytes import ByteForm, ModelInputs, byte_form, pixel_values

CLASS_TOKENS = ("cls_token", "class_embedding")  # how the names of class tokens' parameters end


class ImageBackbone(Backbone):
    """A vision encoder over patches, with or without class and register tokens before them; or one in stages, as Swin
    is, of which the last one's states are of one shape and can be kept: what goes into it, and what comes out."""

    kind = "image"
    rows_at_once = 16  # of some 200 tokens each
    input_names = ("pixel_values",)

    def prepare(self, contents: Sequence[Image.Image]) -> ModelInputs:
        """pixel_values, float32 [N, 3, height, width], as the encoder's own processor makes them."""
        return pixel_values(self.processor, contents)

    @property
    def preparation(self) -> Callable[[Sequence[Image.Image]], ModelInputs]:
        """`prepare` without the model, to be sent to other processes."""
        return functools.partial(pixel_values, self.processor)

    def byte_form(self) -> ByteForm | None:
        """Return the way to keep images as bytes; None if the processor does not end with a map of bytes to values."""
        return byte_form(self.processor, self.device)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"processor_backend": self.processor.backend}

    def _load_processor(self, encoder: str, local_files_only: bool) -> Any:
        # Pillow wherever there is the choice: torchvision's resizing differs, and need not be installed.
        return AutoImageProcessor.from_pretrained(
            encoder, backend="pil", local_files_only=local_files_only, trust_remote_code=False
        )

    def _processor_content(self) -> Any:
        settings = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        return [type(self.processor).__name__, self.processor.backend, settings]

    def example(self) -> ModelInputs:
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        inputs = self.prepare([Image.fromarray(noise.numpy())])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _taken(self, inputs: ModelInputs) -> ModelInputs:
        return {"pixel_values": inputs["pixel_values"].to(self.dtype)}

    def _check_states(self, states: Sequence[Tensor]) -> None:
        shapes = [state.shape for state in states]
        self.first_layer = next(k for k in range(len(shapes)) if len({*shapes[k:]}) == 1)
        super()._check_states(states[self.first_layer :])
        if self.first_layer:  # stages merge patches, and put at most a class token before them
            self.leading = int(self._has_class_token())
            return
        size = getattr(self.model.config, "patch_size", None)
        if size is None:
            raise self._error("no patch_size; expected an encoder of patches (ViT, CLIP, DINOv2, SigLIP, …)")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels, tokens = self.example()["pixel_values"].shape, states[0].shape[1]
        patches = (pixels[-2] // height) * (pixels[-1] // width)
        if tokens < patches:
            raise self._error(f"expected a state for each of {patches} patches, found {tokens}")
        self.leading = tokens - patches  # class and register tokens stand before the patches

    def _has_class_token(self) -> bool:
        return any(name.endswith(CLASS_TOKENS) for name, _ in self.model.named_parameters())

    def _poolings(self) -> tuple[str, ...]:
        # Where nothing stands before the patches, the class token is that of a head which pools them.
        return ("cls", "mean") if self.leading and self._has_class_token() else ("mean",)

    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        return states[:, self.leading :].float().mean(dim=1).to(states.dtype)
