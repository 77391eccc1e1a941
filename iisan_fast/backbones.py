"""Frozen Hugging Face encoders: texts or images in, pooled hidden states of the kept layers out.

States are what Hugging Face reports as `hidden_states`, index 0 being the embedding output. What the last one is, after
a final norm or before it, differs by family, so it is found out and recorded.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, logging
from transformers.utils import cached_file

from .config import ViewConfig
from .digests import value_digest, weights_digest
from .errors import InputError

Inputs = dict[str, Tensor]
UNUSED_WEIGHTS = ("pooler", "head.")  # a checkpoint may lack what no hidden state comes from
CLASS_TOKENS = ("cls_token", "class_embedding")


def load_backbone(view: ViewConfig, device: torch.device | str = "cpu") -> Backbone:
    """The view's encoder, frozen and ready on the device.

    Raises InputError where the encoder cannot be found, lacks weights, reads something else than the view's source,
    or cannot give the view's layers and pooling.
    """
    kind = ImageBackbone if view.source == "image" else TextBackbone
    with _quiet(), _clear_errors(view.encoder):
        return kind(view, torch.device(device))


def default_layers(depth: int) -> tuple[int, ...]:
    """0 and every second hidden state up to the last, for `depth` of them (LayerDrop by pairs)."""
    last = depth - 1
    return tuple(sorted({0, *range(last, 0, -2)}))


class Backbone(ABC):
    """A frozen encoder. Subclasses say how contents become inputs and tokens become one state."""

    kind: str
    input_names: tuple[str, ...]

    def __init__(self, view: ViewConfig, device: torch.device) -> None:
        self.view, self.device = view, device
        self.dtype = _dtype(view.encoder_dtype, device)
        self.processor = self._load_processor()
        self.processor_digest = value_digest(self._processor_content())
        self.model = _load_model(view.encoder, self.kind, self.dtype).to(device).eval().requires_grad_(False)
        states, normalised = self._probe()
        self.final_state = "normalised" if normalised else "unnormalised"
        self.depth, self.width = len(states), states[0].shape[-1]
        if any(state.shape != states[0].shape for state in states):
            raise InputError(f"{view.encoder}: its hidden states differ in shape from layer to layer")
        self.layers = self._layers()
        self.pooling = self._pooling()

    @abstractmethod
    def prepare(self, contents: Sequence[Any]) -> Inputs:
        """What the encoder reads, on the CPU, from texts or RGB images. Needs no model."""

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Tensor:
        """Pooled states [N, kept layers K, width D] on the device, in the encoder's dtype."""
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        states = self._hidden_states(moved)
        return torch.stack([self._pool(states[layer], moved) for layer in self.layers], dim=1)

    def describe(self) -> dict[str, Any]:
        """What a store's manifest records, as plain JSON values."""
        return {
            "encoder": self.view.encoder,
            "architecture": type(self.model).__name__,
            "weights": weights_digest(_folder(self.view.encoder)),
            "processor": self.processor_digest,
            "pooling": self.pooling,
            "layers": list(self.layers),
            "depth": self.depth,
            "width": self.width,
            "final_state": self.final_state,
            "encoder_dtype": str(self.dtype).removeprefix("torch."),
        }

    def _hidden_states(self, inputs: Inputs) -> tuple[Tensor, ...]:
        used = {name: inputs[name] for name in self.input_names}
        states = self.model(**used, output_hidden_states=True).hidden_states
        if states is None:
            raise InputError(f"{self.view.encoder}: {type(self.model).__name__} reports no hidden states")
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
        last = states[-1]
        return states, any(norm.shape == last.shape and torch.equal(norm, last) for norm in norms)

    def _layers(self) -> tuple[int, ...]:
        layers = self.view.layers or default_layers(self.depth)
        ordered = all(a < b for a, b in zip(layers, layers[1:]))
        if not ordered or layers[0] < 0 or layers[-1] >= self.depth:
            raise InputError(
                f"{self.view.encoder}: layers: expected ascending numbers within 0..{self.depth - 1}, "
                f"found {','.join(map(str, layers))}"
            )
        return layers

    def _pooling(self) -> str:
        allowed = self._poolings()
        pooling = self.view.pooling or allowed[0]
        if pooling not in allowed:
            raise InputError(
                f"{self.view.encoder}: pooling: expected {' or '.join(allowed)} for this encoder, found {pooling}"
            )
        return pooling

    @abstractmethod
    def _load_processor(self) -> Any: ...

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

    def prepare(self, contents: Sequence[str]) -> Inputs:
        """input_ids and attention_mask, int64 [N, tokens], at most max_tokens wide, special tokens included."""
        ids = self._tokenise(contents)
        mask = [torch.ones(len(row), dtype=torch.int64) for row in ids]
        padding = self.processor.pad_token_id or 0
        rows = [torch.tensor(row) for row in ids]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"max_tokens": self.view.max_tokens}

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self.processor(list(texts), truncation=True, max_length=self.view.max_tokens, padding=False).input_ids
        for text, row in zip(texts, ids):
            if not row:
                raise InputError(f"{self.view.encoder}: the text {text!r} gives no tokens")
        return ids

    def _load_processor(self) -> Any:
        config = _tower_config(self.view.encoder, self.kind)
        tokenizer = AutoTokenizer.from_pretrained(self.view.encoder)
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
        if self.view.max_tokens > limit:
            raise InputError(f"{self.view.encoder}: max_tokens: expected at most {limit}, found {self.view.max_tokens}")
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

    def _probe_inputs(self) -> Inputs:
        """Two texts that differ in their last token only, one after the other in `_is_causal`."""
        ids = self._tokenise(["a text to probe with"])[0]
        ids = torch.tensor([ids if len(ids) > 1 else ids * 2], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _poolings(self) -> tuple[str, ...]:
        cls = getattr(self.processor, "cls_token_id", None)
        leads = cls is not None and self._tokenise(["a text"])[0][0] == cls
        return ("cls", "mean", "last") if leads and not self._is_causal() else ("mean", "last")

    @torch.inference_mode()
    def _is_causal(self) -> bool:
        """Found by trying: in a causal encoder another last token leaves the first token's states as they were."""
        inputs = self._probe_inputs()
        first = self._hidden_states(inputs)
        inputs["input_ids"][0, -1] = (inputs["input_ids"][0, -1] + 1) % len(self.processor)
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
    """A vision encoder over patches, with or without a class token before them."""

    kind = "image"
    input_names = ("pixel_values",)

    def prepare(self, contents: Sequence[Image.Image]) -> Inputs:
        """pixel_values, float32 [N, 3, height, width], as the encoder's own processor makes them."""
        pixels = self.processor(images=list(contents), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}

    def _load_processor(self) -> Any:
        _tower_config(self.view.encoder, self.kind)
        # One backend everywhere: torchvision's resizing differs, and need not be installed.
        return AutoImageProcessor.from_pretrained(self.view.encoder, backend="pil")

    def _processor_content(self) -> Any:
        settings = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        return [type(self.processor).__name__, "pil", settings]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"processor_backend": "pil"}

    def _probe_inputs(self) -> Inputs:
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": self.prepare([Image.fromarray(noise.numpy())])["pixel_values"].to(self.device)}

    def _hidden_states(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return super()._hidden_states({"pixel_values": inputs["pixel_values"].to(self.dtype)})

    def _poolings(self) -> tuple[str, ...]:
        has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in self.model.named_parameters())
        return ("cls", "mean") if has_class_token else ("mean",)

    def _pool(self, states: Tensor, inputs: Inputs) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        patches = self._patches(inputs["pixel_values"])
        return states[:, states.shape[1] - patches :].float().mean(dim=1).to(states.dtype)

    def _patches(self, pixels: Tensor) -> int:
        """Patch tokens; class and register tokens stand before them."""
        size = self.model.config.patch_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (pixels.shape[-2] // height) * (pixels.shape[-1] // width)


def _tower_config(encoder: str, kind: str) -> Any:
    """The configuration of the encoder, or of the tower of a text-image pair that reads `kind`."""
    config = AutoConfig.from_pretrained(encoder)
    towers = {"text": getattr(config, "text_config", None), "image": getattr(config, "vision_config", None)}
    if all(towers.values()):
        return towers[kind]
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{encoder}: an encoder-decoder; expected an encoder or a decoder-only language model")
    reads = "text" if hasattr(config, "vocab_size") else "image"
    if reads != kind:
        raise InputError(f"{encoder}: reads {reads}, expected an encoder of {kind}")
    return config


def _load_model(encoder: str, kind: str, dtype: torch.dtype) -> nn.Module:
    model, info = AutoModel.from_pretrained(encoder, dtype=dtype, output_loading_info=True)
    tower = getattr(model, "text_model" if kind == "text" else "vision_model", model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is tower and name), "")
    missing = sorted(
        name
        for name in info["missing_keys"]
        if name.startswith(prefix) and not any(unused in name for unused in UNUSED_WEIGHTS)
    )
    if missing:
        raise InputError(f"{encoder}: its checkpoint lacks {len(missing)} weights, {missing[0]} first")
    return tower


def _folder(encoder: str) -> Path:
    """Where the encoder's files lie: its own folder, or the snapshot of a hub name."""
    path = Path(encoder)
    return path if path.is_dir() else Path(cached_file(encoder, "config.json")).parent


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hugging Face's own bars and notes would break into ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _clear_errors(encoder: str) -> Iterator[None]:
    """Hugging Face's paragraphs, in one line."""
    path = Path(encoder)
    if (path.is_absolute() or encoder.startswith(".")) and not path.is_dir():
        raise InputError(f"{encoder}: no such folder; expected an encoder as transformers saves it, or a hub name")
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{encoder}: the encoder cannot be loaded ({type(error).__name__}: {reason})") from error
