"""Which attention an encoder computes with: xformers' memory-efficient one, torch's, or the encoder's own.

xformers takes part through Hugging Face's attention interface, under the name "xformers"; it is imported where it is
chosen and nowhere else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..config import ATTENTIONS
from ..errors import InputError

LOGGER = logging.getLogger(__name__)
MASKED = -30_000.0  # exp() of it is 0, yet it is finite in half precision: a row with every key masked gives no NaN
ALIGNMENT = 8  # rows of a bias start at multiples of so many numbers


def choose_attention(asked: str, model_class: type[PreTrainedModel], device: torch.device, dtype: torch.dtype) -> str:
    """What `from_pretrained` takes as attn_implementation, for one of config.ATTENTIONS: xformers, sdpa or eager.

    What cannot be had gives way to the next of the three; that is said once. Raises InputError for any other name.
    """
    if asked not in ATTENTIONS:
        raise InputError(f"attention: expected one of {', '.join(ATTENTIONS)}, found {asked!r}")
    if asked == "eager":
        return "eager"
    if not model_class._supports_sdpa:  # its scores are no plain dot products: relative positions, caps, sinks
        _say_once(f"{model_class.__name__} keeps its own attention")
        return "eager"
    wanted = asked == "xformers" or (asked == "auto" and device.type == "cuda")
    if not (wanted and model_class._supports_attention_backend):
        return "sdpa"
    problem = xformers_problem(device, dtype)
    if problem is None:
        return "xformers"
    _say_once(f"xformers' attention cannot be used ({problem}); torch's takes its place")
    return "sdpa"


@functools.cache
def xformers_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers has no attention for such tensors, found by trying; None where it has."""
    if device.type != "cuda":
        return f"it needs CUDA, found {device.type}"
    logging.getLogger("xformers").setLevel(logging.ERROR)  # an extension that cannot be loaded takes it many lines
    try:
        attend = _kernel()
        states = torch.zeros(1, ALIGNMENT, 1, 64, device=device, dtype=dtype)
        attend(states, states, states, attn_bias=states.new_zeros(1, 1, ALIGNMENT, ALIGNMENT))
    except Exception as error:  # not installed, built for another torch, no kernel for the GPU: each has its own type
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, heads, queries, width] to key and value [B, heads or a divisor, keys, width].

    Gives [B, queries, heads, width] and, as no weights are kept, None. The mask says all: no flag makes it causal.
    """
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
    """The bias [B, 1, queries, keys] of a pattern and its padding, made once for all layers.

    None where each query sees each key; a causal pattern is always spelt out, as eager attention has it.
    """
    mask = sdpa_mask(**pattern | {"allow_is_causal_skip": False})
    return None if mask is None else _additive(mask, dtype)


AttentionInterface.register("xformers", xformers_attention)
AttentionMaskInterface.register("xformers", xformers_mask)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, laid out as xformers reads it; the mask itself if it is that already."""
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
