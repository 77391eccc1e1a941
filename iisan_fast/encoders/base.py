"""Frozen Hugging Face encoders: texts or images in, pooled hidden states of the kept layers out.

States are what Hugging Face reports as `hidden_states`, index 0 being the embedding output. What the last one is, after
a final norm or before it, differs by family, so it is found out and recorded.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at top level it may want torchvision

from .. import kernels
from ..config import ViewConfig
from ..errors import InputError
from ..fingerprints import value_digest, weights_digest
from ..states import grouped_layers
from .attention import choose_attention
from .hidden_state_hooks import Place, find_places, keeps_nothing, reading
from .hugging_face import (
    cached_or_fetched,
    clear_errors,
    load_config,
    load_model,
    model_class,
    model_dtype,
    model_folder,
    quiet,
)
from .image_bytes import ByteForm, ModelInputs, byte_form, pixel_values

LOGGER = getLogger(__name__)
PLACED_BY = {"device_map", "quantization_config"}  # loading options with which Hugging Face says where a model lies
UNRECORDED = {"device_map", "max_memory", "offload_folder"}  # that change no state
CLASS_TOKENS = ("cls_token", "class_embedding")


def load_backbone(view: ViewConfig, device: torch.device | str = "cpu", attention: str = "auto") -> Backbone:
    """The view's encoder, frozen and ready on the device. `attention` is one of config.ATTENTIONS.

    Raises InputError where the encoder cannot be found, lacks weights, reads something else than the view's source,
    or cannot give the view's layers and pooling.
    """
    reader = ImageBackbone if view.source == "image" else TextBackbone
    with quiet():
        return reader(view, torch.device(device), attention)


def load_backbones(
    views: Sequence[ViewConfig], device: torch.device | str = "cpu", attention: str = "auto"
) -> list[Backbone]:
    """`load_backbone` of each view; what a view keeps beyond its encoder's depth is refused before weights are read."""
    with quiet():
        for view in views:
            with clear_errors(view.encoder, "an encoder"):
                _checked_config(view)
    return [load_backbone(view, device, attention) for view in views]


def default_layers(depth: int) -> tuple[int, ...]:
    """0 and every second hidden state counted back from the last, for `depth` of them (LayerDrop by pairs)."""
    return tuple(sorted({0, *range(depth - 1, 0, -2)}))


class Backbone(ABC):
    """A frozen encoder. Subclasses say how contents become inputs and tokens become one state.

    It encodes in inference mode, but is looked over without: some encoders keep a tensor that they make when they first
    run, as BEiT does an index, and where they are trained later, a backward has to read it.
    """

    kind: str  # "text" or "image"
    input_names: tuple[str, ...]  # what the encoder takes of what `prepare` gives
    first_layer = 0  # that can be kept
    rows_at_once: int  # that a CPU's core encodes

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        self.view, self.device = view, device
        self.dtype = model_dtype(view.encoder_dtype, device)
        with clear_errors(view.encoder, "an encoder"):
            config = _checked_config(view)
            self.processor = cached_or_fetched(self._load_processor, view.encoder)
            self.processor_digest = value_digest(self._processor_content())
            self.attention = choose_attention(attention, model_class(config), device, self.dtype)
            options = {**view.options, "dtype": self.dtype, "attn_implementation": self.attention}
            self.model = load_model(view.encoder, config, self.kind, options)
            self.model.eval().requires_grad_(False)
            if PLACED_BY & view.options.keys():
                self.device = _first_device(self.model, device)
            else:
                self.model.to(device)
            states, normalised = self._probe()
            self._check_states(states)
            self._places = self._find(states)
            self._shared = self._can_be_shared()
        LOGGER.info("%s: attention by %s", view.encoder, self.attention)
        self.final_state = "normalised" if normalised else "unnormalised"
        self.depth, self.width = len(states), states[-1].shape[-1]
        self.layers = self._layers()
        self.pooling = self._pooling()

    @abstractmethod
    def prepare(self, contents: Sequence[Any]) -> ModelInputs:
        """What the encoder reads, on the CPU, from texts or RGB images. Needs no model."""

    @torch.inference_mode()
    def encode(self, inputs: ModelInputs) -> Tensor:
        """Pooled states [N, kept layers K, width D] on the device, in the encoder's dtype.

        Each layer is pooled as it is made: memory does not grow with the number of layers. On a CPU the cores share
        the rows.
        """
        if self._places is None:
            return self.encode_whole(inputs)
        moved = self._moved(inputs)
        with reading([self._places[layer] for layer in self.layers]) as read:

            @torch.inference_mode()
            def part(rows: slice) -> Tensor:
                own = {name: tensor[rows] for name, tensor in moved.items()}
                return self._stacked(read(lambda: self._run(own), functools.partial(self._pool, inputs=own)))

            rows = len(next(iter(moved.values())))
            parts = kernels.equal_parts(rows, self.rows_at_once) if self._shared else [slice(None)]
            states = kernels.at_once(part, parts)
            return states[0] if len(states) == 1 else torch.cat(states)

    @torch.inference_mode()
    def encode_whole(self, inputs: ModelInputs) -> Tensor:
        """`encode` by one call of the encoder, which reports the hidden states of all layers together."""
        moved = self._moved(inputs)
        states = self._hidden_states(moved)
        return self._stacked([self._pool(states[layer], moved) for layer in self.layers])

    def _stacked(self, pooled: Sequence[Tensor]) -> Tensor:
        return torch.stack([state.to(self.device) for state in pooled], dim=1)

    def final(self, inputs: ModelInputs) -> Tensor:
        """The pooled final state [N, width D] (Hugging Face's `last_hidden_state`), which gradients flow through."""
        moved = self._moved(inputs)
        return self._pool(self._run(moved).last_hidden_state, moved)

    def describe(self) -> dict[str, Any]:
        """What a store's manifest records, as plain JSON values."""
        options = {name: value for name, value in self.view.options.items() if name not in UNRECORDED}
        return {
            "encoder": self.view.encoder,
            "model_type": self.model.config.model_type,
            "weights": weights_digest(model_folder(self.view.encoder)),
            "processor": self.processor_digest,
            "pooling": self.pooling,
            "layers": list(self.layers),
            "depth": self.depth,
            "width": self.width,
            "final_state": self.final_state,
            "encoder_dtype": str(self.dtype).removeprefix("torch."),
            **({"options": options} if options else {}),
            **({"first_layer": self.first_layer} if self.first_layer else {}),
        }

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.view.encoder}: {message}")

    def _moved(self, inputs: ModelInputs) -> ModelInputs:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def _taken(self, inputs: ModelInputs) -> ModelInputs:
        """What the encoder takes of its inputs."""
        return {name: inputs[name] for name in self.input_names}

    def _run(self, inputs: ModelInputs, **options: bool) -> Any:
        return self.model(**self._taken(inputs), **options)

    def _hidden_states(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        states = getattr(self._run(inputs, output_hidden_states=True), "hidden_states", None)
        if states is None:
            raise self._error(f"{type(self.model).__name__} reports no hidden states")
        return states

    @torch.no_grad()
    def _probe(self) -> tuple[tuple[Tensor, ...], bool]:
        """The states of one made-up input, and whether the last one comes out of a norm layer."""
        norms: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: norms.append(output))
            for module in self.model.modules()
            if "Norm" in type(module).__name__
        ]
        try:
            states = self._hidden_states(self.example())
        finally:
            for hook in hooks:
                hook.remove()
        return states, any(torch.equal(norm.to(states[-1].device), states[-1]) for norm in norms)

    @torch.no_grad()
    def _find(self, states: tuple[Tensor, ...]) -> list[Place] | None:
        """Where the encoder makes the states of the made-up input."""
        places = find_places(self.model, lambda: self._run(self.example()), states)
        if places is None:
            LOGGER.warning("%s: its hidden states cannot be read one by one; batches keep all", self.view.encoder)
        return places

    @torch.no_grad()
    def _can_be_shared(self) -> bool:
        """Whether a CPU's cores can take rows of their own, which they are done with sooner than with a share of every
        operator."""
        if self.device.type != "cpu" or PLACED_BY & self.view.options.keys() or self._places is None:
            return False
        once = self.example()
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        return keeps_nothing(self.model, [lambda: self._run(once), lambda: self._run(twice)])

    def _check_states(self, states: Sequence[Tensor]) -> None:
        shapes = sorted({tuple(state.shape) for state in states})
        if len(shapes) > 1 or len(shapes[0]) != 3:
            raise self._error(f"hidden states: expected one shape (items, tokens, width), found {shapes}")

    def _layers(self) -> tuple[int, ...]:
        first, kept = self.first_layer, self.view.layers
        if self.view.layer_groups is not None:
            return _grouped(self.view, self.depth - 1, first)
        layers = tuple(first + layer for layer in default_layers(self.depth - first)) if kept is None else kept
        return _ordered(self.view, layers, self.depth - 1, first)

    def _pooling(self) -> str:
        allowed = self._poolings()
        pooling = self.view.pooling or allowed[0]
        if pooling not in allowed:
            raise self._error(f"pooling: expected {' or '.join(allowed)} for this encoder, found {pooling}")
        return pooling

    @abstractmethod
    def _load_processor(self, encoder: str, local_files_only: bool) -> Any: ...

    @abstractmethod
    def _processor_content(self) -> Any: ...  # all that preprocessing depends on, as a JSON value

    @abstractmethod
    def example(self) -> ModelInputs:
        """Made-up contents of one batch, as the encoder takes them, on its device."""

    @abstractmethod
    def _poolings(self) -> tuple[str, ...]: ...  # what the encoder allows, its default first

    @abstractmethod
    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor: ...  # [N, tokens, D] -> [N, D]


class TextBackbone(Backbone):
    """A bidirectional or causal text encoder.

    Texts are padded here, on the right and masked, so no padding token is needed and none reaches a pooled state.
    """

    kind = "text"
    rows_at_once = 32
    input_names = ("input_ids", "attention_mask")

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        super().__init__(view, device, attention)
        least, most = self.processor.num_special_tokens_to_add() + 1, self._positions()
        if not least <= view.max_tokens <= most:
            raise self._error(f"max_tokens: expected {least} to {most}, found {view.max_tokens}")

    def prepare(self, contents: Sequence[str]) -> ModelInputs:
        """input_ids and attention_mask, int64 [N, tokens], at most max_tokens wide, special tokens included.

        Raises InputError for a text that gives no token at all.
        """
        return self.pad(self.tokenize(contents))

    @property
    def padding_token(self) -> int:
        """What texts are padded with. Some encoders count positions by it, so that it matters even where masked."""
        return self.processor.pad_token_id or 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token numbers, at most max_tokens, special tokens included.

        Raises InputError for a text that gives no token at all.
        """
        limit = self.view.max_tokens
        rows = self.processor(list(texts), truncation=True, max_length=limit, padding=False).input_ids
        for text, row in zip(texts, rows):
            if not row:
                raise self._error(f"the text {text!r} gives no tokens")
        return rows

    def pad(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> ModelInputs:
        """input_ids and attention_mask, int64 [N, tokens], as wide as the longest of N token sequences."""
        ids = [torch.as_tensor(row, dtype=torch.int64) for row in tokens]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding_token),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"max_tokens": self.view.max_tokens}

    def _load_processor(self, encoder: str, local_files_only: bool) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=local_files_only, trust_remote_code=False)
        # Where its files are missing, transformers may make a tokenizer up to which every word is unknown.
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            raise self._error("its tokenizer knows no word; expected tokenizer files beside the weights")
        return tokenizer

    def _processor_content(self) -> Any:
        tokenizer = self.processor
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            content = tokenizer.backend_tokenizer.to_str()
        else:
            content = tokenizer.get_vocab()
        return [type(tokenizer).__name__, content, tokenizer.special_tokens_map]

    def _positions(self) -> int:
        """How many tokens the encoder has positions for."""
        limits = [self.processor.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)  # positions count on from the padding's
        return min(limit or math.inf for limit in limits)

    def example(self) -> ModelInputs:
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def _poolings(self) -> tuple[str, ...]:
        cls = getattr(self.processor, "cls_token_id", None)
        leads = cls is not None and self.processor("a text").input_ids[:1] == [cls]
        return ("cls", "mean", "last") if leads and not self._is_causal() else ("mean", "last")

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Found by trying: in a causal encoder another last token leaves the first token's states as they were."""
        inputs = self.example()
        first = self._hidden_states(inputs)
        inputs["input_ids"][0, -1] += 1
        second = self._hidden_states(inputs)
        return all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(first, second))

    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        mask = inputs["attention_mask"].to(states.device)
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        total = torch.where(mask[..., None] > 0, states, 0).float().sum(dim=1)
        return (total / mask.sum(dim=1, keepdim=True)).to(states.dtype)


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
        """How to keep images as bytes; None where the processor does more than map each byte to a value, at the end."""
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


def _checked_config(view: ViewConfig) -> PretrainedConfig:
    """The configuration of the view's encoder. Raises InputError where the view keeps layers beyond what that says."""
    kind = "image" if view.source == "image" else "text"
    config = load_config(view.encoder, kind)
    own = getattr(config, f"{'vision' if kind == 'image' else 'text'}_config", config)
    blocks = getattr(own, "num_hidden_layers", None)
    if blocks is not None and view.layer_groups is not None:
        _grouped(view, blocks)
    if blocks is not None and view.layers is not None:
        _ordered(view, view.layers, blocks)
    return config


def _ordered(view: ViewConfig, layers: tuple[int, ...], last: int, first: int = 0) -> tuple[int, ...]:
    """The layers, if they are some of first..last in order."""
    if not layers or layers[0] < first or layers[-1] > last or any(a >= b for a, b in zip(layers, layers[1:])):
        found = ",".join(map(str, layers)) or "none"
        allowed = f"{first}..{last}" + (", its last stage" if first else "")
        raise InputError(f"{view.encoder}: layers: expected ascending numbers within {allowed}, found {found}")
    return layers


def _grouped(view: ViewConfig, blocks: int, first: int = 0) -> tuple[int, ...]:
    """`grouped_layers` of the view, with its encoder's name before an error."""
    try:
        return grouped_layers(blocks, view.layer_groups, first)
    except InputError as error:
        raise InputError(f"{view.encoder}: {error}") from None


def _first_device(model: nn.Module, asked: torch.device) -> torch.device:
    """Where the inputs of a model go that Hugging Face has placed; parts of it may lie on disk."""
    return next((each.device for each in model.parameters() if each.device.type != "meta"), asked)
