"""A frozen Hugging Face encoder: inputs in, pooled hidden states of the kept layers out.

States are what Hugging Face reports as `hidden_states`; index 0 is the embedding output. Families differ in the last
one: some report it after the final norm, some before. So each encoder is tried once, and the answer is recorded.
"""

from __future__ import annotations

import copy
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import kernels
from ..config import ViewConfig
from ..errors import InputError
from ..fingerprints import value_digest, weights_digest
from .attention import choose_attention, run_with_all_arguments
from .hidden_state_hooks import Place, find_places, keeps_nothing, reading
from .hugging_face import (
    cached_or_fetched,
    clear_errors,
    load_config,
    load_model,
    model_classes,
    model_dtype,
    model_folder,
)
from .image_bytes import ModelInputs
from .layer_selection import selected_layers

LOGGER = getLogger(__name__)
PLACED_BY = {"device_map", "quantization_config"}  # loading options with which Hugging Face says where a model lies
UNRECORDED = {"device_map", "max_memory", "offload_folder"}  # loading options that change no state


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
            config = checked_config(view)
            self.processor = cached_or_fetched(self._load_processor, view.encoder)
            self.processor_digest = value_digest(self._processor_content())
            chosen = choose_attention(attention, model_classes(config), device, self.dtype)
            options = {**view.options, "dtype": self.dtype, "attn_implementation": chosen}
            self.model = load_model(view.encoder, config, self.kind, options)
            self.model.eval().requires_grad_(False)
            if PLACED_BY & view.options.keys():
                self.device = _first_device(self.model, device)
            else:
                self.model.to(device)
            self.attention, (states, normalised) = run_with_all_arguments(self.model, chosen, self._probe)
            self._check_states(states)
            self._places = self._find(states)
            self._shared = self._can_be_shared()
        LOGGER.info("%s: attention by %s", view.encoder, self.attention)
        self.final_state = "normalised" if normalised else "unnormalised"
        self.depth, self.width = len(states), states[-1].shape[-1]
        self._select(view)

    def for_view(self, view: ViewConfig) -> Backbone:
        """Return an encoder of another view that shares this one's model.

        view: differs from this one's view in name, pooling and layers alone. Raises InputError for layers and pooling
        that the encoder cannot give.
        """
        other = copy.copy(self)
        other._select(view)
        return other

    @abstractmethod
    def prepare(self, contents: Sequence[Any]) -> ModelInputs:
        """Return the encoder's inputs, on the CPU, for texts or RGB images. The model is not used."""

    @torch.inference_mode()
    def encode(self, inputs: ModelInputs) -> Tensor:
        """Pooled states [N, kept layers K, width D] on the device, in the encoder's dtype.

        Each layer is pooled as it is made: memory does not grow with the number of layers. On a CPU the cores share
        the rows.
        """
        return self.encode_views([self], inputs)[0]

    @torch.inference_mode()
    def encode_views(self, backbones: Sequence[Backbone], inputs: ModelInputs) -> list[Tensor]:
        """Return `encode(inputs)` of each backbone by one forward of the model. All of them share it with this one."""
        if self._places is None:
            return self._encode_views_whole(backbones, inputs)
        moved = self._moved(inputs)
        wanted = [(backbone, layer) for backbone in backbones for layer in backbone.layers]
        with reading([self._places[layer] for _, layer in wanted]) as read:

            @torch.inference_mode()
            def part(rows: slice) -> list[Tensor]:
                shared = {name: tensor[rows] for name, tensor in moved.items()}
                pools = [functools.partial(backbone._pool, inputs=shared) for backbone, _ in wanted]
                return self._stacked(backbones, read(lambda: self._run(shared), pools))

            rows = len(next(iter(moved.values())))
            parts = kernels.equal_parts(rows, self.rows_at_once) if self._shared else [slice(None)]
            states = kernels.at_once(part, parts)
            return states[0] if len(states) == 1 else [torch.cat(by_part) for by_part in zip(*states)]

    @torch.inference_mode()
    def encode_whole(self, inputs: ModelInputs) -> Tensor:
        """`encode` by one call of the encoder, which reports the hidden states of all layers together."""
        return self._encode_views_whole([self], inputs)[0]

    def _encode_views_whole(self, backbones: Sequence[Backbone], inputs: ModelInputs) -> list[Tensor]:
        moved = self._moved(inputs)
        states = self._hidden_states(moved)
        pooled = [backbone._pool(states[layer], moved) for backbone in backbones for layer in backbone.layers]
        return self._stacked(backbones, pooled)

    def _stacked(self, backbones: Sequence[Backbone], pooled: Sequence[Tensor]) -> list[Tensor]:
        """Stack the backbones' layers, each [N, D], one backbone's after the other's, into [N, K, D] a backbone."""
        states = (state.to(self.device) for state in pooled)
        return [torch.stack([*itertools.islice(states, len(backbone.layers))], dim=1) for backbone in backbones]

    def final(self, inputs: ModelInputs) -> Tensor:
        """The pooled final state [N, width D] (Hugging Face's `last_hidden_state`), which gradients flow through."""
        moved = self._moved(inputs)
        return self._pool(self._run(moved).last_hidden_state, moved)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder for a store's manifest, as plain JSON values."""
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
        """Return the inputs that the encoder takes."""
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
        """Return the states of the example, and True if the last one comes out of a norm layer."""
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
        """Return the places where the encoder makes the states of the example."""
        places = find_places(self.model, lambda: self._run(self.example()), states)
        if places is None:
            LOGGER.warning("%s: its hidden states cannot be read one by one; batches keep all", self.view.encoder)
        return places

    @torch.no_grad()
    def _can_be_shared(self) -> bool:
        """Return True if a CPU's cores may encode separate rows, which is faster than a share of every operator."""
        if self.device.type != "cpu" or PLACED_BY & self.view.options.keys() or self._places is None:
            return False
        once = self.example()
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        return keeps_nothing(self.model, [lambda: self._run(once), lambda: self._run(twice)])

    def _check_states(self, states: Sequence[Tensor]) -> None:
        shapes = sorted({tuple(state.shape) for state in states})
        if len(shapes) > 1 or len(shapes[0]) != 3:
            raise self._error(f"hidden states: expected one shape (items, tokens, width), found {shapes}")

    def _select(self, view: ViewConfig) -> None:
        """Take the view's layers and pooling."""
        self.view = view
        self.layers = selected_layers(view, self.depth, self.first_layer)
        self.pooling = self._pooling()

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
        """Return the inputs of one invented batch, on the encoder's device."""

    @abstractmethod
    def _poolings(self) -> tuple[str, ...]: ...  # what the encoder allows, its default first

    @abstractmethod
    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor: ...  # [N, tokens, D] -> [N, D]


def checked_config(view: ViewConfig) -> PretrainedConfig:
    """Return the configuration of the view's encoder.

    Raises InputError if the view asks for layers that the configuration says the encoder lacks.
    """
    kind = "image" if view.source == "image" else "text"
    config = load_config(view.encoder, kind)
    tower = getattr(config, f"{'vision' if kind == 'image' else 'text'}_config", config)
    blocks = getattr(tower, "num_hidden_layers", None)
    if blocks is not None:
        selected_layers(view, blocks + 1)
    return config


def _first_device(model: nn.Module, asked: torch.device) -> torch.device:
    """Return the device that takes the inputs of a model that Hugging Face has placed; parts of it may lie on disk."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), asked)
