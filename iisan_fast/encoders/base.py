"""Define the frozen Hugging Face encoder, which turns inputs into pooled hidden states of selected layers.

Hidden states are those that Hugging Face reports as `hidden_states`; index 0 is the embedding output. Model families
differ in the last one: some report it after the final norm, some before. So each encoder runs once on an example when
it is loaded, and its description records the answer.
"""

from __future__ import annotations

import copy
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ViewConfig
from ..errors import InputError
from ..fingerprints import value_digest, weights_digest
from .attention import choose_attention, run_with_all_arguments
from .batch_mates import REASONS, SINGLE, TOGETHER, allowed_batches, run_groups
from .hidden_state_hooks import Place, find_places, keeps_nothing, reading
from .hub_files import cached_or_fetched, model_commit, model_folder
from .hugging_face import Architecture, clear_errors, load_architecture, load_model, model_classes, model_dtype
from .image_bytes import ModelInputs
from .layer_selection import selected_layers
from .own_code import accepted_own_code
from .running_code import code_digest, refuse_other_classes

LOGGER = getLogger(__name__)
PLACED_BY = {"device_map", "quantization_config"}  # with these loading options Hugging Face places the model
UNRECORDED = {"device_map", "max_memory", "offload_folder"}  # loading options that change no hidden state


class Backbone(ABC):
    """A frozen encoder. Subclasses turn contents into inputs, and pool the states of an item's tokens into one.

    `encode` runs in inference mode. The run on the example does not: some encoders store a tensor at their first run
    (BEiT stores an index), and the backward pass must be able to read it if the encoder is trained later.
    """

    kind: str  # "text" or "image"
    input_names: tuple[str, ...]  # the tensors of `prepare` that the encoder takes
    first_layer = 0  # the first layer that a view can select
    all_by_default = False  # if a view that names no layers selects all, not every second one
    unmixed = SINGLE  # what may share a batch if unlike items may not
    rows_at_once: int  # the most rows that one core of a CPU encodes at a time

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        """Load the encoder of a view onto a device, and run it once on an example. attention: one of config.ATTENTIONS.

        Raises InputError if the encoder cannot be loaded, lacks weights, reads another kind of content, or cannot give
        the view's layers and pooling.
        """
        self.view = view
        self.device = device
        self.dtype = model_dtype(view.encoder_dtype, device)
        with clear_errors(view.encoder, "an encoder"):
            architecture = checked_architecture(view)
            self.processor = cached_or_fetched(self._load_processor, view.encoder, view.revision)
            self.processor_digest = value_digest(self._processor_content())
            chosen = choose_attention(attention, model_classes(architecture), device, self.dtype)
            options = {**view.options, "dtype": self.dtype, "attn_implementation": chosen}
            self.model = load_model(view.encoder, architecture, self.kind, options, view.revision)
            self.code = self._code_that_runs(architecture)
            self.model.eval().requires_grad_(False)
            if PLACED_BY & view.options.keys():
                self.device = _first_device(self.model, device)
            else:
                self.model.to(device)
            self.attention, (states, normalised) = run_with_all_arguments(self.model, chosen, self._probe)
            self._check_states(states)
            self._places = self._find(states)
            self._shared = self._can_be_shared()
            self.batches = self._allowed_batches()
            self.width = self._state_width(states)
        LOGGER.info("%s: attention by %s", view.encoder, self.attention)
        if self.batches != TOGETHER:
            LOGGER.warning("%s: %s, so it encodes %s at a time", view.encoder, REASONS[self.batches], self.batches)
        self.final_state = "normalised" if normalised else "unnormalised"
        self.depth = len(states)
        self._select(view)

    def for_view(self, view: ViewConfig) -> Backbone:
        """Return an encoder for another view, which shares this one's model.

        view: may differ from this one's view in name, pooling and layers only. Raises InputError if the encoder cannot
        give the layers or the pooling.
        """
        backbone = copy.copy(self)
        backbone._select(view)
        return backbone

    @abstractmethod
    def prepare(self, contents: Sequence[Any]) -> ModelInputs:
        """Return the encoder's inputs, on the CPU, for N texts or N RGB images, without running the model.

        Raises InputError for a content that gives no input, such as a text without tokens.
        """

    @torch.inference_mode()
    def encode(self, inputs: ModelInputs) -> Tensor:
        """Return the pooled states [N, layers K, width D] on the device, in the encoder's dtype.

        inputs: from `prepare`. Each layer is pooled as soon as it is computed, so memory does not grow with the number
        of layers. On a CPU the cores share the rows if the model allows it.
        """
        return self.encode_views([self], inputs)[0]

    @torch.inference_mode()
    def encode_views(self, backbones: Sequence[Backbone], inputs: ModelInputs) -> list[Tensor]:
        """Return `encode(inputs)` of each backbone, from one forward of the model.

        backbones: encoders that share this one's model, such as those of `for_view`.
        """
        moved = self._moved(inputs)
        return self._by_group(moved, lambda part: self._encode_views_together(backbones, part))

    @torch.inference_mode()
    def encode_whole(self, inputs: ModelInputs) -> Tensor:
        """Return the result of `encode` from one call that reports the hidden states of all layers together."""
        moved = self._moved(inputs)
        return self._by_group(moved, lambda part: self._encode_views_whole([self], part))[0]

    def _encode_views_together(self, backbones: Sequence[Backbone], moved: ModelInputs) -> list[Tensor]:
        """Return the result of `encode_views` for items that may share a batch. moved: inputs on the device."""
        if self._places is None:
            return self._encode_views_whole(backbones, moved)
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

    def _encode_views_whole(self, backbones: Sequence[Backbone], moved: ModelInputs) -> list[Tensor]:
        """Return the result of `_encode_views_together` from one call that reports all hidden states together."""
        states = self._hidden_states(moved)
        pooled = [backbone._pool(states[layer], moved) for backbone in backbones for layer in backbone.layers]
        return self._stacked(backbones, pooled)

    def _stacked(self, backbones: Sequence[Backbone], pooled: Sequence[Tensor]) -> list[Tensor]:
        """Stack pooled states [N, D], ordered by backbone and layer, into one tensor [N, K, D] for each backbone."""
        states = (state.to(self.device) for state in pooled)
        return [torch.stack([*itertools.islice(states, len(backbone.layers))], dim=1) for backbone in backbones]

    def final(self, inputs: ModelInputs) -> Tensor:
        """Return the pooled last hidden state [N, width D] (Hugging Face's `last_hidden_state`), with gradients."""
        moved = self._moved(inputs)
        return self._by_group(moved, lambda part: [self._pool(self._run(part).last_hidden_state, part)])[0]

    def describe(self) -> dict[str, Any]:
        """Return the encoder's description for a store's manifest: weights, layers, pooling, sizes, as JSON values."""
        options = {name: value for name, value in self.view.options.items() if name not in UNRECORDED}
        commit = model_commit(self.view.encoder, self.view.revision)
        return {
            "encoder": self.view.encoder,
            "model_type": self.model.config.model_type,
            "weights": weights_digest(self._folder, with_code=self.code is not None),
            "processor": self.processor_digest,
            "pooling": self.pooling,
            "layers": list(self.layers),
            "depth": self.depth,
            "width": self.width,
            "final_state": self.final_state,
            "encoder_dtype": str(self.dtype).removeprefix("torch."),
            **({"revision": self.view.revision} if self.view.revision is not None else {}),
            **({"commit": commit} if commit is not None else {}),
            **({"options": options} if options else {}),
            **({"first_layer": self.first_layer} if self.first_layer else {}),
            **({"trust_remote_code": True, "code": self.code} if self.code is not None else {}),
            **({"batches": self.batches} if self.batches != TOGETHER else {}),
        }

    @property
    def _folder(self) -> Path:
        """Return the folder with the encoder's files."""
        return model_folder(self.view.encoder, self.view.revision)

    def _code_that_runs(self, architecture: Architecture) -> str | None:
        """Return the digest of the checkpoint's own code; None if it has none.

        Raises InputError if it names code that did not run, or that may not run. Of a hub name, some files are here
        only now that the processor is loaded.
        """
        encoder = self.view.encoder
        named = accepted_own_code(encoder, self._folder, self.kind, self.view.trust_remote_code)
        running = [type(architecture.config), type(self.processor), architecture.model_class]
        refuse_other_classes(encoder, named, self.kind, running)
        return code_digest(running) if named else None

    def _error(self, message: str) -> InputError:
        """Return an InputError whose message names the encoder."""
        return InputError(f"{self.view.encoder}: {message}")

    def _moved(self, inputs: ModelInputs) -> ModelInputs:
        """Return the inputs on the encoder's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def _taken(self, inputs: ModelInputs) -> ModelInputs:
        """Return the inputs that the encoder takes."""
        return {name: inputs[name] for name in self.input_names}

    def _run(self, inputs: ModelInputs, **options: bool) -> Any:
        """Call the model on inputs that are on its device, and return its output."""
        return self.model(**self._taken(inputs), **options)

    def _hidden_states(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        """Return the hidden states of all layers, each [N, tokens, D]. Raises InputError if the model reports none."""
        return self._states_of(self._run(inputs, output_hidden_states=True))

    def _states_of(self, output: Any) -> tuple[Tensor, ...]:
        """Return the hidden states in a model's output. Raises InputError if there are none."""
        states = getattr(output, "hidden_states", None)
        if states is None:
            raise self._error(f"{type(self.model).__name__} reports no hidden states")
        return states

    @torch.no_grad()
    def _probe(self) -> tuple[tuple[Tensor, ...], bool]:
        """Return the hidden states of the example, and True if the last one is the output of a norm layer."""
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
        """Return the places that compute the example's hidden states; None, with a warning, if one has no place."""
        places = find_places(self.model, lambda: self._run(self.example()), states)
        if places is None:
            LOGGER.warning(
                "%s: its hidden states cannot be read one by one; batches keep all layers in memory", self.view.encoder
            )
        return places

    @torch.no_grad()
    def _can_be_shared(self) -> bool:
        """Return True if the cores of a CPU may encode separate rows, which is faster than sharing each operator.

        They may if no option places the model and its modules keep no state between two batches, which is tried out.
        Call it after `_places` is set.
        """
        if self.device.type != "cpu" or PLACED_BY & self.view.options.keys() or self._places is None:
            return False
        once = self.example()
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        return keeps_nothing(self.model, [lambda: self._run(once), lambda: self._run(twice)])

    @torch.no_grad()
    def _allowed_batches(self) -> str:
        """Return what may share a batch without a change of the hidden states, in the words of `batch_mates`."""
        batch = self.mixed_example()
        last = len(batch[self.input_names[0]]) - 1
        alone = self._only(batch, torch.tensor([last]))
        return allowed_batches(self._last_states, batch, alone, self.unmixed)

    def _last_states(self, inputs: ModelInputs) -> Tensor:
        """Return the last of the hidden states [N, tokens, D]."""
        return self._hidden_states(inputs)[-1]

    def _by_group(self, inputs: ModelInputs, run: Callable[[ModelInputs], list[Tensor]]) -> list[Tensor]:
        """Return `run(inputs)`, tensors [N, ...], from one call for each group of items that may share a batch."""
        if self.batches == TOGETHER:
            return run(inputs)
        return run_groups(self._groups(inputs), lambda rows: run(self._only(inputs, rows)))

    def _groups(self, inputs: ModelInputs) -> list[list[int]]:
        """Return the groups of rows that may share a batch."""
        return [[row] for row in range(len(inputs[self.input_names[0]]))]

    def _only(self, inputs: ModelInputs, rows: Tensor) -> ModelInputs:
        """Return the inputs of some rows, int64 [n] on the CPU."""
        return {name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()}

    def _check_states(self, states: Sequence[Tensor]) -> None:
        """Raise InputError if the hidden states are not all of one shape [N, tokens, D]."""
        shapes = sorted({tuple(state.shape) for state in states})
        if len(shapes) > 1 or len(shapes[0]) != 3:
            raise self._error(f"hidden states: expected one shape (items, tokens, width), found {shapes}")

    def _state_width(self, states: Sequence[Tensor]) -> int:
        """Return the width of a pooled state."""
        return states[-1].shape[-1]

    def _select(self, view: ViewConfig) -> None:
        """Set the view, its layers and its pooling. Raises InputError if the encoder cannot give them."""
        self.view = view
        self.layers = selected_layers(view, self.depth, self.first_layer, self.all_by_default)
        self.pooling = self._pooling()

    def _pooling(self) -> str:
        """Return the view's pooling, or the encoder's default. Raises InputError if the encoder does not allow it."""
        allowed = self._poolings()
        pooling = self.view.pooling or allowed[0]
        if pooling not in allowed:
            raise self._error(f"pooling: expected {' or '.join(allowed)} for this encoder, found {pooling}")
        return pooling

    @abstractmethod
    def _load_processor(self, encoder: str, **options: Any) -> Any:
        """Return the encoder's tokenizer or image processor."""

    @abstractmethod
    def _processor_content(self) -> Any:
        """Return everything that preprocessing depends on, as a JSON value."""

    @abstractmethod
    def example(self) -> ModelInputs:
        """Return a small invented batch of inputs, on the encoder's device."""

    @abstractmethod
    def mixed_example(self) -> ModelInputs:
        """Return a batch of two unlike invented items, the last one padded if need be, on the encoder's device."""

    @abstractmethod
    def _poolings(self) -> tuple[str, ...]:
        """Return the poolings that the encoder allows, its default first."""

    @abstractmethod
    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor:
        """Pool the states [N, tokens, D] of a batch of inputs into [N, D]."""


def checked_architecture(view: ViewConfig) -> Architecture:
    """Return the configuration and the model's class of the view's encoder, without reading weights.

    Raises InputError if the encoder cannot be found, reads another kind of content, or has too few blocks for the
    view's layers.
    """
    kind = "image" if view.source == "image" else "text"
    architecture = load_architecture(view.encoder, kind, view.trust_remote_code, view.revision)
    config = architecture.config
    tower = getattr(config, f"{'vision' if kind == 'image' else 'text'}_config", config)
    blocks = getattr(tower, "num_hidden_layers", None)
    if blocks is not None:
        selected_layers(view, blocks + 1)
    return architecture


def _first_device(model: nn.Module, asked: torch.device) -> torch.device:
    """Return the device that takes the inputs of a model that Hugging Face has placed.

    This is the device of the first parameter that is not on disk ("meta"), or `asked` if there is none.
    """
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), asked)
