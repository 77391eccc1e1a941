"""Choose the attention of an encoder: xformers' memory-efficient one, PyTorch's, or the encoder's eager one.

xformers is registered in Hugging Face's attention interface under the name "xformers". The library is imported only
when it is tried, on CUDA.
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
MASKED = -30_000.0  # its exp() is 0, but it is finite in half precision, so a row with all keys masked gives no NaN
ALIGNMENT = 8  # each row of a bias starts at a multiple of this many numbers
REASON_LENGTH = 300  # characters of the reason in a log message
# Arguments that change no hidden state: the mask holds the window and the causal pattern, so eager ignores them too.
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
    """Return the `attn_implementation` for `from_pretrained`: "xformers", "sdpa" or "eager".

    wanted: one of config.ATTENTIONS. model_classes: the classes of the model and of its towers. If an attention cannot
    be used, the next of these three is chosen, and a warning says so once. Raises InputError if `wanted` is unknown.
    """
    if wanted not in ATTENTIONS:
        raise InputError(f"attention: expected one of {', '.join(ATTENTIONS)}, found {wanted!r}")
    if wanted == "eager":
        return "eager"
    model_classes = list(model_classes)
    for model_class in model_classes:
        if not model_class._supports_sdpa:  # its scores are not plain dot products
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
    """Call `run`, which runs the model, with eager attention if the model's own would drop an argument.

    Some models pass a logit cap or attention sinks, which not every attention knows. transformers' flags do not name
    all of these models (5.17 says that Gemma 2 works with PyTorch's attention), so the arguments of the call are
    checked. attention: the model's current one. If it would drop an argument, the model is switched to eager attention
    for good. Returns the attention that the model uses afterwards, and the result of `run`.
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
    """Raised when a model passes an argument that its attention does not know."""


@functools.cache
def xformers_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return, in one line, why xformers cannot be used on this device and dtype; None if it can."""
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
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of query [B, heads, queries, width] to key and value, as Hugging Face calls it.

    key, value: [B, key heads, keys, width]; `heads` is a multiple of the key heads. attention_mask: boolean (True where
    a key is seen) or added to the scores; None to see every key. No flag makes the attention causal, only the mask.
    Returns [B, queries, heads, width], and None in place of the weights. Raises DroppedArgumentError for any other
    argument that would change the result.
    """
    _refuse_unknown("xformers", arguments, WITHOUT_EFFECT)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, tokens, heads, width]
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast may give rotated queries and keys in float32
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    groups = heads // key.shape[2]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=2) for states in (key, value))
    bias = None
    if attention_mask is not None:
        bias = _additive(attention_mask, query.dtype).expand(batch, heads, queries, keys)
    return _kernel()(query, key, value, attn_bias=bias, p=dropout, scale=scaling), None


def xformers_mask(*, dtype: torch.dtype = torch.float32, **pattern: Any) -> Tensor | None:
    """Return the bias [B, 1, queries, keys] of a mask pattern, which all layers share; None if every key is seen.

    pattern: the arguments that transformers passes to a mask function. A causal pattern always gives a bias.
    """
    mask = sdpa_mask(**pattern | {"allow_is_causal_skip": False})
    return None if mask is None else _additive(mask, dtype)


AttentionInterface.register("xformers", xformers_attention)
AttentionMaskInterface.register("xformers", xformers_mask)


@contextmanager
def _dropping_nothing(attention: str) -> Iterator[None]:
    """Make an attention raise DroppedArgumentError, inside the context, if it would drop an argument."""
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
    """Raise DroppedArgumentError for arguments that are not None and not in `known`."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise DroppedArgumentError(f"{attention} attention would drop its argument {', '.join(unknown)}")


def _failure_of_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run xformers' attention once, and return its error and the library's messages in one line; None if it works."""
    with _collecting("xformers") as messages:  # it logs many lines if an extension cannot be loaded
        try:
            attend = _kernel()
            states = torch.zeros(1, ALIGNMENT, 1, 64, device=device, dtype=dtype)
            attend(states, states, states, attn_bias=states.new_zeros(1, 1, ALIGNMENT, ALIGNMENT)).sum().item()
        except Exception as error:  # if it is missing or does not fit torch or the GPU, the type of the error varies
            text = _one_line(f"{type(error).__name__}: {error}", REASON_LENGTH // 2)
            return _one_line("; ".join([text, *messages]), REASON_LENGTH)
    return None


@contextmanager
def _collecting(library: str) -> Iterator[list[str]]:
    """Yield a list that collects a library's log messages and all Python warnings, which are not printed."""
    messages: list[str] = []
    logger = logging.getLogger(library)
    handler = logging.Handler(logging.WARNING)
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
    """Return a text's first `length` characters, with single spaces in place of line breaks."""
    return " ".join(text.split())[:length]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as a bias that is added to the scores, in the memory layout that xformers needs.

    The mask itself is returned if it has the dtype and the layout already.
    """
    if mask.dtype == torch.bool:  # True: the key is seen
        mask = torch.where(mask, 0.0, MASKED)
    mask, keys = mask.to(dtype), mask.shape[-1]
    if any(stride % ALIGNMENT for stride in mask.stride()[:-1]):
        mask = nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]
    return mask


def _kernel() -> Callable[..., Tensor]:
    """Import xformers' attention. Raises ImportError if the library is missing."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


@functools.cache
def _say_once(message: str) -> None:
    """Log a warning, and do nothing for the same message afterwards."""
    LOGGER.warning(message)
