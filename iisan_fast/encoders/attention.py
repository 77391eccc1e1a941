"""Choose the attention of an encoder: xformers' memory-efficient one, PyTorch's, or the encoder's eager one.

xformers takes part through Hugging Face's attention interface, under the name "xformers". It is imported only where it
is tried, on CUDA.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import ATTENTIONS
from ..errors import InputError

LOGGER = logging.getLogger(__name__)
MASKED = -30_000.0  # exp() of it is 0, yet it is finite in half precision: a row with every key masked gives no NaN
ALIGNMENT = 8  # rows of a bias start at multiples of so many numbers
REASON_LENGTH = 300  # characters of a notice's reason
# Arguments that change no state: eager attention ignores them too. The mask holds the window and the causal pattern.
WITHOUT_EFFECT = frozenset(
    {
        *("is_causal", "sliding_window", "position_ids", "deterministic"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
    }
)
Result = TypeVar("Result")


def choose_attention(
    wanted: str, model_classes: Iterable[type[PreTrainedModel]], device: torch.device, dtype: torch.dtype
) -> str:
    """Choose `from_pretrained`'s attn_implementation for one of config.ATTENTIONS: xformers, sdpa or eager.

    `model_classes` are the model's and its towers'. An attention that cannot be used gives way to the next of the
    three, with one notice. Raises InputError for a name that is not in config.ATTENTIONS.
    """
    if wanted not in ATTENTIONS:
        raise InputError(f"attention: expected one of {', '.join(ATTENTIONS)}, found {wanted!r}")
    if wanted == "eager":
        return "eager"
    model_classes = list(model_classes)
    for model_class in model_classes:
        if not model_class._supports_sdpa:  # its scores are no plain dot products: relative positions, caps, sinks
            _say_once(f"{model_class.__name__} keeps its own attention")
            return "eager"
    use_xformers = wanted == "xformers" or (wanted == "auto" and device.type == "cuda")
    if not (use_xformers and all(model_class._supports_attention_backend for model_class in model_classes)):
        return "sdpa"
    problem = xformers_problem(device, dtype)
    if problem is None:
        return "xformers"
    _say_once(f"xformers' attention cannot be used ({problem}); PyTorch's takes its place")
    return "sdpa"


def run_with_all_arguments(model: PreTrainedModel, attention: str, run: Callable[[], Result]) -> tuple[str, Result]:
    """Run the model with its attention, or with eager attention if that one would drop an argument.

    An attention logit cap or attention sinks are such arguments. transformers' flags do not name all models that pass
    them (5.17 says that Gemma 2 can do with PyTorch's attention), so the arguments themselves are looked at. Returns
    the attention that the model has from now on, and what `run` returned under it.
    """
    if attention == "eager":
        return attention, run()
    try:
        with _dropping_nothing(attention):
            return attention, run()
    except DroppedArgumentError as error:
        _say_once(f"{type(model).__name__} keeps its own attention: {error}")
    model.set_attn_implementation("eager")
    return "eager", run()


class DroppedArgumentError(ValueError):
    """A model passes its attention an argument that the attention does not know."""


@functools.cache
def xformers_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why xformers has no attention for such tensors, in one line; None if it has."""
    if device.type != "cuda":
        return f"it needs CUDA, found {device.type}"
    return _failure_of_xformers(device, dtype)


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, heads, queries, width] to key and value [B, heads or a divisor, keys, width].

    Returns [B, queries, heads, width], and None in place of the weights. The mask says all: no flag makes it causal.
    Raises DroppedArgumentError for any other argument that would change the result.
    """
    _refuse_unknown("xformers", others, WITHOUT_EFFECT)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, tokens, heads, width]
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotated ones may come out of autocast in float32
    batch, queries, heads, _ = query.shape
    keys, groups = key.shape[1], heads // key.shape[2]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=2) for states in (key, value))
    bias = None
    if attention_mask is not None:
        bias = _additive(attention_mask, query.dtype).expand(batch, heads, queries, keys)
    return _kernel()(query, key, value, attn_bias=bias, p=dropout, scale=scaling), None


def xformers_mask(*, dtype: torch.dtype = torch.float32, **pattern: Any) -> Tensor | None:
    """Make the bias [B, 1, queries, keys] of a pattern and its padding, once for all layers.

    None if each query sees each key; a causal pattern is always spelt out, as eager attention has it.
    """
    mask = sdpa_mask(**pattern | {"allow_is_causal_skip": False})
    return None if mask is None else _additive(mask, dtype)


AttentionInterface.register("xformers", xformers_attention)
AttentionMaskInterface.register("xformers", xformers_mask)


@contextmanager
def _dropping_nothing(attention: str) -> Iterator[None]:
    """Make the attention of this name raise DroppedArgumentError instead of dropping an argument."""
    attend = ALL_ATTENTION_FUNCTIONS[attention]
    parameters = inspect.signature(attend).parameters.values()
    known = WITHOUT_EFFECT | {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}

    def attend_or_refuse(*tensors: Any, **arguments: Any) -> Any:
        _refuse_unknown(attention, arguments, known)
        return attend(*tensors, **arguments)

    ALL_ATTENTION_FUNCTIONS[attention] = attend_or_refuse
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[attention] = attend


def _refuse_unknown(attention: str, arguments: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise DroppedArgumentError(f"{attention} attention would drop its argument {', '.join(unknown)}")


def _failure_of_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """Use xformers once; return the error and what xformers says of its extensions, in one line, or None."""
    with _collecting("xformers") as messages:  # an extension that cannot be loaded takes it many lines
        try:
            attend = _kernel()
            states = torch.zeros(1, ALIGNMENT, 1, 64, device=device, dtype=dtype)
            attend(states, states, states, attn_bias=states.new_zeros(1, 1, ALIGNMENT, ALIGNMENT)).sum().item()
        except Exception as error:  # not installed, built for another torch, no kernel for the GPU: any type
            text = _one_line(f"{type(error).__name__}: {error}", REASON_LENGTH // 2)
            return _one_line("; ".join([text, *messages]), REASON_LENGTH)
    return None


@contextmanager
def _collecting(library: str) -> Iterator[list[str]]:
    """Collect what a library logs, and all Python warnings, in place of printing them."""
    messages: list[str] = []
    logger, handler = logging.getLogger(library), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: messages.append(str(message))
            yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _one_line(text: str, length: int) -> str:
    return " ".join(text.split())[:length]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, laid out as xformers reads it; the mask itself if it is that already."""
    if mask.dtype == torch.bool:  # True: may be seen
        mask = torch.where(mask, 0.0, MASKED)
    mask, keys = mask.to(dtype), mask.shape[-1]
    if any(stride % ALIGNMENT for stride in mask.stride()[:-1]):
        mask = nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]
    return mask


def _kernel() -> Callable[..., Tensor]:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


@functools.cache
def _say_once(message: str) -> None:
    LOGGER.warning(message)
