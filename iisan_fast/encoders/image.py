"""Define vision encoders: preparing images, and pooling over the class token, the patches or the pixels of a map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it may need torchvision

from .base import Backbone
from .image_bytes import ByteForm, ModelInputs, byte_form, pixel_values
from .stage_maps import channel_axis, pooled_map

CLASS_TOKENS = ("cls_token", "class_embedding")  # the parameter of a class token has a name with this end


class ImageBackbone(Backbone):
    """A vision encoder over patches, with or without class and register tokens before them, or a convolutional one.

    An encoder of patches in stages, such as Swin, changes the shape of its states between stages. Only the states of
    its last stage can be selected: the stage's input and its blocks' outputs. Of a convolutional encoder, such as
    ConvNeXt, the mean of each map can be selected (`stage_maps`).
    """

    kind = "image"
    rows_at_once = 16  # an image has about 200 tokens
    input_names = ("pixel_values",)
    channel_axis: int | None = None  # of the maps of a convolutional encoder
    widths: tuple[int, ...] = ()  # the numbers of channels of its maps

    def prepare(self, contents: Sequence[Image.Image]) -> ModelInputs:
        """Return pixel_values, float32 [N, 3, height, width], for N RGB images, made by the encoder's own processor."""
        return pixel_values(self.processor, contents)

    @property
    def preparation(self) -> Callable[[Sequence[Image.Image]], ModelInputs]:
        """Return a function that does the work of `prepare` without the model, so that other processes can call it."""
        return functools.partial(pixel_values, self.processor)

    def byte_form(self) -> ByteForm | None:
        """Return the way to keep prepared images as bytes; None if the processor allows none (see `byte_form`)."""
        return byte_form(self.processor, self.device)

    def describe(self) -> dict[str, Any]:
        """Return the description of `Backbone.describe`, and the backend of the image processor.

        That of a convolutional encoder also holds the number of channels of each layer, without the zeros behind them.
        """
        widths = {"widths": [self.widths[layer] for layer in self.layers]} if self.widths else {}
        return super().describe() | {"processor_backend": self.processor.backend} | widths

    def _load_processor(self, encoder: str, **options: Any) -> Any:
        """Return the encoder's image processor."""
        # Use Pillow if the processor allows it: torchvision resizes differently, and may not be installed.
        return AutoImageProcessor.from_pretrained(
            encoder, backend="pil", trust_remote_code=self.view.trust_remote_code, **options
        )

    def _processor_content(self) -> Any:
        """Return the class, the backend and the settings of the image processor, as JSON values."""
        settings = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        return [type(self.processor).__name__, self.processor.backend, settings]

    def example(self) -> ModelInputs:
        """Return pixel_values of one random image of 64 x 64, prepared as usual, on the encoder's device."""
        return self._moved(self.prepare([_noise(0)]))

    def mixed_example(self) -> ModelInputs:
        """Return pixel_values of two random images of 64 x 64, prepared as usual, on the encoder's device."""
        return self._moved(self.prepare([_noise(1), _noise(0)]))

    def _taken(self, inputs: ModelInputs) -> ModelInputs:
        """Return the pixel values, converted to the encoder's dtype."""
        return {"pixel_values": inputs["pixel_values"].to(self.dtype)}

    def _check_states(self, states: Sequence[Tensor]) -> None:
        """Set the first layer that can be selected and the number of tokens before the patches, or the maps' channels.

        Raises InputError if the states have no common shape, if the encoder has no patch size, or if there is not one
        state for each patch.
        """
        self.channel_axis = channel_axis(states)
        if self.channel_axis is not None:
            self.widths = tuple(state.shape[self.channel_axis] for state in states)
            self.all_by_default = True
            return
        shapes = [state.shape for state in states]
        self.first_layer = next(k for k in range(len(shapes)) if len({*shapes[k:]}) == 1)
        super()._check_states(states[self.first_layer :])
        if self.first_layer:  # an encoder in stages has at most a class token before its patches
            self.leading = int(self._has_class_token())
            return
        size = getattr(self.model.config, "patch_size", None)
        if size is None:
            raise self._error("no patch_size; expected an encoder of patches (ViT, CLIP, DINOv2, SigLIP, …)")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = self.example()["pixel_values"].shape
        tokens = states[0].shape[1]
        patches = (pixels[-2] // height) * (pixels[-1] // width)
        if tokens < patches:
            raise self._error(f"expected a state for each of {patches} patches, found {tokens}")
        self.leading = tokens - patches  # class and register tokens stand before the patches

    def _states_of(self, output: Any) -> tuple[Tensor, ...]:
        """Return the hidden states in a model's output. A map behind those of all stages is one more of them.

        Raises InputError if there are none, or if maps have no last hidden state.
        """
        states = super()._states_of(output)
        if channel_axis(states) is None:
            return states
        last = getattr(output, "last_hidden_state", None)
        if last is None:
            raise self._error(f"{type(self.model).__name__} reports no last_hidden_state; choose another encoder")
        is_one_more = last.dim() == 4 and last.shape != states[-1].shape  # MobileNetV2 widens the last map
        return (*states, last) if is_one_more else states

    def _state_width(self, states: Sequence[Tensor]) -> int:
        """Return the width of a pooled state; that of the widest map."""
        return super()._state_width(states) if self.channel_axis is None else max(self.widths)

    def _has_class_token(self) -> bool:
        """Return True if the encoder has a parameter for a class token."""
        return any(name.endswith(CLASS_TOKENS) for name, _ in self.model.named_parameters())

    def _poolings(self) -> tuple[str, ...]:
        """Return the poolings that the encoder allows, its default first."""
        if self.channel_axis is not None:
            return ("mean",)
        # If no token stands before the patches, the class token belongs to a head that pools them.
        return ("cls", "mean") if self.leading and self._has_class_token() else ("mean",)

    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor:
        """Return the class token's state, or the mean of the patches' states: [N, tokens, D] -> [N, D].

        Of maps it is the mean of the pixels, with zeros up to the width D.
        """
        if self.channel_axis is not None:
            return pooled_map(states, self.channel_axis, self.width)
        if self.pooling == "cls":
            return states[:, 0]
        return states[:, self.leading :].float().mean(dim=1).to(states.dtype)


def _noise(seed: int) -> Image.Image:
    """Return a random RGB image of 64 x 64."""
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())
