"""Define the settings of encoders: views, extraction, and encoders that run in every step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, check_choice
from ..files import expanded_name
from ..setting_fields import check_settings, same_setting, setting

SOURCES = ("image", "title", "caption")
POOLINGS = ("cls", "mean", "last")
ENCODER_DTYPES = ("auto", "float32", "bfloat16", "float16")
STORE_DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("auto", "xformers", "sdpa", "eager")
MISSING_IMAGES = ("error", "blank")
SETTINGS_OF_VIEWS = {"revision": "--revision, in Python revision="}  # they are no options of loading
# Options of loading an encoder that are set here, that would be right for its weights and not for the rest, that run
# code from elsewhere (weights_only, kernels), or that replace weights (ignore_mismatched_sizes draws some at random;
# gguf_file and use_safetensors choose files that the digest of the weights does not cover).
RESERVED_OPTIONS = (
    *("attn_implementation", "config", "local_files_only", "output_hidden_states", "output_loading_info"),
    *("subfolder", "torch_dtype", "trust_remote_code", "code_revision", "weights_only"),
    *("use_kernels", "kernel_config", "allow_all_kernels", "adapter_kwargs", "adapter_name"),
    *("state_dict", "ignore_mismatched_sizes", "gguf_file", "use_safetensors"),
)


@dataclass(frozen=True)
class ViewConfig:
    """One view of the items: a source, the encoder that reads it, the pooling, and the layers that are kept."""

    name: str = setting(help="Name of the view in the cache and in a run.")
    source: str = setting(help="Content of an item that the encoder reads.", choices=SOURCES)
    encoder: str = setting(help="Hub name or folder of the encoder.")
    pooling: str | None = setting(
        None, help="Pooling of a layer's tokens.", choices=POOLINGS, automatic="the encoder family's default"
    )
    layers: tuple[int, ...] | None = setting(
        None,
        help="Hidden states that are kept, by number; 0 is the embedding output.",
        automatic="0, 2, 4, … to the last",
    )
    max_tokens: int = setting(30, help="Tokens of a text that are read.", minimum=1, maximum=1_000_000)
    encoder_dtype: str = setting(
        "auto",
        help="Data type of the encoder's weights.",
        choices=ENCODER_DTYPES,
        automatic="bfloat16 on CUDA, else float32",
    )
    layer_groups: int | None = setting(
        None,
        help="Keep the embedding output and the last block of each of so many equal groups, in place of layers.",
        minimum=1,
        maximum=1000,
        automatic="by layers",
    )
    options: Mapping[str, Any] = setting({}, help="Options of Hugging Face's from_pretrained, by name.")
    trust_remote_code: bool = setting(
        False, help="Run Python code that the checkpoint brings with it; a settings file cannot switch it on."
    )
    revision: str | None = setting(
        None, help="Branch, tag or commit of the encoder's hub name.", automatic="the default branch"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "encoder", expanded_name(self.encoder))
        if self.layer_groups is not None and self.layers is not None:
            raise InputError("layers, layer_groups: expected one of them, found both")
        if "dtype" in self.options:
            self._rename_dtype()
        if self.revision is not None and not re.fullmatch(r"[^\s\0]+", self.revision):
            raise InputError(f"revision: expected a branch, tag or commit, found {self.revision!r}")
        for name in self.options:
            if name in SETTINGS_OF_VIEWS:
                raise InputError(f"options.{name}: is a setting of its own; give {SETTINGS_OF_VIEWS[name]}")
            if name in RESERVED_OPTIONS:
                raise InputError(f"options.{name}: is decided here; expected another option of from_pretrained")
        if not self.name or "\0" in self.name:
            raise InputError(f"name: expected a view's name, found {self.name!r}")

    def _rename_dtype(self) -> None:
        """Move the option dtype, which is Hugging Face's name of encoder_dtype, to encoder_dtype.

        Raises InputError if the two differ.
        """
        options = dict(self.options)
        dtype = options.pop("dtype")
        check_choice("options.dtype", dtype, ENCODER_DTYPES)
        if self.encoder_dtype not in ("auto", dtype):
            raise InputError(f"encoder_dtype, options.dtype: found {self.encoder_dtype} and {dtype}; give one of them")
        object.__setattr__(self, "encoder_dtype", dtype)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ExtractionConfig:
    """Settings of extraction, which stores the hidden states of frozen encoders in a cache."""

    dtype: str = setting(
        "bfloat16",
        help="Data type of hidden states in the cache; encoders that run in every step round to it.",
        choices=STORE_DTYPES,
    )
    missing_images: str = setting(
        "error",
        help="For images that are missing or cannot be read: stop with an error, or encode a blank image.",
        choices=MISSING_IMAGES,
    )
    attention: str = setting(
        "auto",
        help="Implementation of attention in encoders.",
        choices=ATTENTIONS,
        automatic="xformers on CUDA if it is installed, else torch's (sdpa)",
    )
    layer_groups: int | None = setting(
        None,
        help="Keep the embedding output and the last block of each of so many equal groups.",
        minimum=1,
        maximum=1000,
        automatic="the layers of each view",
    )
    batch_size: int = setting(64, help="Items that are encoded at a time.", minimum=1)
    workers: int | None = setting(
        None,
        help="Processes that read images ahead of the encoder; 0 is none.",
        minimum=0,
        automatic="by idle CPUs and the number of images",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class UncachedConfig:
    """Encoders that run in every step, in place of a cache of their states."""

    views: tuple[ViewConfig, ...] = setting(help="Views whose encoders run.")
    dtype: str = same_setting(ExtractionConfig, "dtype")
    missing_images: str = same_setting(ExtractionConfig, "missing_images")
    attention: str = same_setting(ExtractionConfig, "attention")
    items_at_once: int | None = setting(
        None,
        help="Items that a trained encoder takes at a time.",
        minimum=1,
        maximum=1_000_000,
        automatic="as many as memory allows",
    )
    checkpointing: bool = setting(False, help="Compute the blocks of a trained encoder twice, which takes less memory.")

    def __post_init__(self) -> None:
        check_settings(self)
