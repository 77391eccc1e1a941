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
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at top level it may want torchvision

from .attention import choose_attention
from .config import ViewConfig
from .digests import value_digest, weights_digest
from .errors import InputError
from .hidden_states import grouped_layers
from .hugging_face import cached_or_fetched, clear_errors, model_dtype, model_folder, quiet, refuse_missing_weights

Inputs = dict[str, Tensor]
READS = {"input_ids": "text", "pixel_values": "image"}  # an encoder's main input tells what it reads
TOWERS = {"text": ("text_model", "language_model"), "image": ("vision_model",)}  # of a text-image model
UNUSED_WEIGHTS = {"pooler", "head"}  # a checkpoint may lack what no hidden state comes from
CLASS_TOKENS = ("cls_token", "class_embedding")


def load_backbone(view: ViewConfig, device: torch.device | str = "cpu", attention: str = "auto") -> Backbone:
    """The view's encoder, frozen and ready on the device. `attention` is one of config.ATTENTIONS.

    Raises InputError where the encoder cannot be found, lacks weights, reads something else than the view's source,
    or cannot give the view's layers and pooling.
    """
    reader = ImageBackbone if view.source == "image" else TextBackbone
    with quiet():
        return reader(view, torch.device(device), attention)


def default_layers(depth: int) -> tuple[int, ...]:
    """0 and every second hidden state counted back from the last, for `depth` of them (LayerDrop by pairs)."""
    return tuple(sorted({0, *range(depth - 1, 0, -2)}))


class Backbone(ABC):
    """A frozen encoder. Subclasses say how contents become inputs and tokens become one state."""

    kind: str  # "text" or "image"
    input_names: tuple[str, ...]  # what the encoder takes of what `prepare` gives

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        self.view, self.device = view, device
        self.dtype = model_dtype(view.encoder_dtype, device)
        with clear_errors(view.encoder, "an encoder"):
            config = _load_config(view.encoder, self.kind)
            self.processor = cached_or_fetched(self._load_processor, view.encoder)
            self._refuse_groups(config)
            self.processor_digest = value_digest(self._processor_content())
            self.attention = choose_attention(attention, _model_class(config), device, self.dtype)
            self.model = _load_model(view.encoder, config, self.kind, self.dtype, self.attention)
            self.model.to(device).eval().requires_grad_(False)
            states, normalised = self._probe()
        getLogger(__name__).info("%s: attention by %s", view.encoder, self.attention)
        self.final_state = "normalised" if normalised else "unnormalised"
        self._check_states(states)
        self.depth, self.width = len(states), states[0].shape[-1]
        self.layers = self._layers()
        self.pooling = self._pooling()

    @abstractmethod
    def prepare(self, contents: Sequence[Any]) -> Inputs:
        """What the encoder reads, on the CPU, from texts or RGB images. Needs no model."""

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Tensor:
        """Pooled states [N, kept layers K, width D] on the device, in the encoder's dtype."""
        moved = self._moved(inputs)
        states = self._hidden_states(moved)
        return torch.stack([self._pool(states[layer], moved) for layer in self.layers], dim=1)

    def final(self, inputs: Inputs) -> Tensor:
        """The pooled final state [N, width D] (Hugging Face's `last_hidden_state`), which gradients flow through."""
        moved = self._moved(inputs)
        return self._pool(self.model(**self._taken(moved)).last_hidden_state, moved)

    def describe(self) -> dict[str, Any]:
        """What a store's manifest records, as plain JSON values."""
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
        }

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.view.encoder}: {message}")

    def _moved(self, inputs: Inputs) -> Inputs:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def _taken(self, inputs: Inputs) -> Inputs:
        """What the encoder takes of its inputs."""
        return {name: inputs[name] for name in self.input_names}

    def _hidden_states(self, inputs: Inputs) -> tuple[Tensor, ...]:
        states = self.model(**self._taken(inputs), output_hidden_states=True).hidden_states
        if states is None:
            raise self._error(f"{type(self.model).__name__} reports no hidden states")
        return states

    @torch.inference_mode()
    def _probe(self) -> tuple[tuple[Tensor, ...], bool]:
        """The states of one made-up input, and whether the last one comes out of a norm layer."""
        norms: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: norms.append(output))
            for module in self.model.modules()
            if "Norm" in type(module).__name__
        ]
        try:
            states = self._hidden_states(self._probe_inputs())
        finally:
            for hook in hooks:
                hook.remove()
        return states, any(torch.equal(norm, states[-1]) for norm in norms)

    def _check_states(self, states: tuple[Tensor, ...]) -> None:
        shapes = sorted({tuple(state.shape) for state in states})
        if len(shapes) > 1 or len(shapes[0]) != 3:
            raise self._error(f"hidden states: expected one shape (items, tokens, width), found {shapes}")

    def _refuse_groups(self, config: PretrainedConfig) -> None:
        """Before anything large is loaded, more groups of blocks than the encoder has."""
        own = getattr(config, f"{'vision' if self.kind == 'image' else 'text'}_config", config)
        if self.view.layer_groups is not None and hasattr(own, "num_hidden_layers"):
            try:
                grouped_layers(own.num_hidden_layers, self.view.layer_groups)
            except InputError as error:
                raise self._error(str(error)) from None

    def _layers(self) -> tuple[int, ...]:
        if self.view.layer_groups is not None:
            return grouped_layers(self.depth - 1, self.view.layer_groups)
        layers = default_layers(self.depth) if self.view.layers is None else self.view.layers
        ordered = bool(layers) and all(a < b for a, b in zip(layers, layers[1:]))
        if not ordered or layers[0] < 0 or layers[-1] >= self.depth:
            found = ",".join(map(str, layers)) or "none"
            raise self._error(f"layers: expected ascending numbers within 0..{self.depth - 1}, found {found}")
        return layers

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
    def _probe_inputs(self) -> Inputs: ...

    @abstractmethod
    def _poolings(self) -> tuple[str, ...]: ...  # what the encoder allows, its default first

    @abstractmethod
    def _pool(self, states: Tensor, inputs: Inputs) -> Tensor: ...  # [N, tokens, D] -> [N, D]


class TextBackbone(Backbone):
    """A bidirectional or causal text encoder.

    Texts are padded here, on the right and masked, so no padding token is needed and none reaches a pooled state.
    """

    kind = "text"
    input_names = ("input_ids", "attention_mask")

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        super().__init__(view, device, attention)
        least, most = self.processor.num_special_tokens_to_add() + 1, self._positions()
        if not least <= view.max_tokens <= most:
            raise self._error(f"max_tokens: expected {least} to {most}, found {view.max_tokens}")

    def prepare(self, contents: Sequence[str]) -> Inputs:
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

    def pad(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> Inputs:
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

    def _probe_inputs(self) -> Inputs:
        ids = torch.tensor([[1, 2, 3, 4]], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _poolings(self) -> tuple[str, ...]:
        cls = getattr(self.processor, "cls_token_id", None)
        leads = cls is not None and self.processor("a text").input_ids[:1] == [cls]
        return ("cls", "mean", "last") if leads and not self._is_causal() else ("mean", "last")

    @torch.inference_mode()
    def _is_causal(self) -> bool:
        """Found by trying: in a causal encoder another last token leaves the first token's states as they were."""
        inputs = self._probe_inputs()
        first = self._hidden_states(inputs)
        inputs["input_ids"][0, -1] += 1
        second = self._hidden_states(inputs)
        return all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(first, second))

    def _pool(self, states: Tensor, inputs: Inputs) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        mask = inputs["attention_mask"]
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        total = torch.where(mask[..., None] > 0, states, 0).float().sum(dim=1)
        return (total / mask.sum(dim=1, keepdim=True)).to(states.dtype)


class ImageBackbone(Backbone):
    """A vision encoder over patches, with or without class and register tokens before them."""

    kind = "image"
    input_names = ("pixel_values",)

    def prepare(self, contents: Sequence[Image.Image]) -> Inputs:
        """pixel_values, float32 [N, 3, height, width], as the encoder's own processor makes them."""
        return pixel_values(self.processor, contents)

    @property
    def preparation(self) -> Callable[[Sequence[Image.Image]], Inputs]:
        """`prepare` without the model, to be sent to other processes."""
        return functools.partial(pixel_values, self.processor)

    def byte_form(self) -> ByteForm | None:
        """How to keep images as bytes; None where the processor does more than map each byte to a value, at the end."""
        prepare = functools.partial(pixel_values, self.processor, do_rescale=False, do_normalize=False)
        every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        unshaped = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        noise = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
        probes = [Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1))]
        try:
            mapped = pixel_values(self.processor, [Image.fromarray(every)], **unshaped)["pixel_values"]
            form = ByteForm(prepare, mapped.reshape(3, 256).to(self.device))
            pixels = prepare(probes)["pixel_values"]
            found = form.pixel_values(pixels.to(self.device)).cpu()
            same = pixels.dtype == torch.uint8 and torch.equal(found, self.prepare(probes)["pixel_values"])
        except Exception:  # a processor whose steps cannot be left out, or that is fussy about sizes, raises anything
            return None
        return form if same else None

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

    def _probe_inputs(self) -> Inputs:
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        inputs = self.prepare([Image.fromarray(noise.numpy())])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _taken(self, inputs: Inputs) -> Inputs:
        return {"pixel_values": inputs["pixel_values"].to(self.dtype)}

    def _check_states(self, states: tuple[Tensor, ...]) -> None:
        super()._check_states(states)
        size = getattr(self.model.config, "patch_size", None)
        if size is None:
            raise self._error("no patch_size; expected an encoder of patches (ViT, CLIP, DINOv2, SigLIP, …)")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels, tokens = self._probe_inputs()["pixel_values"].shape, states[0].shape[1]
        patches = (pixels[-2] // height) * (pixels[-1] // width)
        if tokens < patches:
            raise self._error(f"expected a state for each of {patches} patches, found {tokens}")
        self.leading = tokens - patches  # class and register tokens stand before the patches

    def _poolings(self) -> tuple[str, ...]:
        has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in self.model.named_parameters())
        return ("cls", "mean") if has_class_token else ("mean",)

    def _pool(self, states: Tensor, inputs: Inputs) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        return states[:, self.leading :].float().mean(dim=1).to(states.dtype)


class ByteForm(NamedTuple):
    """Images as bytes: resized and cropped, but not yet rescaled and normalised."""

    prepare: Callable[[Sequence[Image.Image]], Inputs]  # pixel_values uint8 [N, 3, height, width] of RGB images
    values: Tensor  # float32 [3, 256] on the encoder's device: what each byte of a channel becomes

    def pixel_values(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, height, width] of bytes uint8 of that shape, on the same device, as the processor does it."""
        channels = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
        return self.values.flatten().index_select(0, (pixels + channels).flatten()).view(pixels.shape)


def pixel_values(processor: Any, images: Sequence[Image.Image], **options: bool) -> Inputs:
    """What a vision encoder reads of RGB images: float32 [N, 3, height, width]. Options are the processor's own."""
    return {"pixel_values": processor(images=list(images), return_tensors="pt", **options)["pixel_values"]}


def _load_config(encoder: str, kind: str) -> PretrainedConfig:
    """The encoder's configuration, once it is sure to read `kind`."""
    config = cached_or_fetched(AutoConfig.from_pretrained, encoder, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise InputError(f"{encoder}: an encoder-decoder; expected an encoder or a decoder-only language model")
    reads = kind if _has_towers(config) else READS.get(_model_class(config).main_input_name, "neither text nor images")
    if reads != kind:
        raise InputError(f"{encoder}: reads {reads}, expected an encoder that reads {kind}")
    return config


def _load_model(
    encoder: str, config: PretrainedConfig, kind: str, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    options = {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    model, info = cached_or_fetched(_model_class(config).from_pretrained, encoder, config=config, **options)
    prefix = ""
    if _has_towers(config):
        name = next((name for name in TOWERS[kind] if hasattr(model, name)), None)
        if name is None:
            raise InputError(f"{encoder}: {type(model).__name__} has no tower that reads {kind} alone")
        model, prefix = getattr(model, name), f"{name}."
    used = (key for key in info["missing_keys"] if key.startswith(prefix) and not UNUSED_WEIGHTS & {*key.split(".")})
    refuse_missing_weights(encoder, used)
    model.config.use_cache = False  # a causal encoder would keep keys and values that nothing reads
    return model


def _has_towers(config: PretrainedConfig) -> bool:
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The headless model; the automatic mapping lacks some towers of their own (SigLIP's for text)."""
    if type(config) not in transformers.MODEL_MAPPING:
        return getattr(transformers, config.architectures[0])
    mapped = transformers.MODEL_MAPPING[type(config)]
    return mapped[0] if isinstance(mapped, tuple) else mapped
