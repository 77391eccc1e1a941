"""Choose the form (implementation) that runs an op.

`auto` takes the first form in `FORMS` that can run, else the reference. The argument `form` or the environment variable
IISAN_FAST_FORM names a form instead: it runs, or a FormError says why it cannot. If an op has no form of that name, the
reference runs. The log says once a process which form runs an op.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .cpu.library import why_no_compiler, why_no_library

HAS_TRITON = importlib.util.find_spec("triton") is not None  # at import, since torch.compile cannot trace find_spec
FORM_VARIABLE = "IISAN_FAST_FORM"
REFERENCE, GPU, CPU = "reference", "gpu", "cpu"
FORMS = {  # the forms of each op besides the reference, the fastest first
    "fold_heads": (CPU,),
    "side_towers": (GPU, CPU),
    "sequence_encoder": (GPU, CPU),
    "last_states": (GPU, CPU),
    "inbatch_cross_entropy": (GPU, CPU),
    "target_rank": (GPU, CPU),
    "top_items": (GPU, CPU),
    "adam": (CPU,),
}
WITHOUT_COMPILER = ("target_rank", "top_items")  # their form for a CPU is PyTorch
NAMES = ("auto", REFERENCE, GPU, CPU)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Refusals = Mapping[str, Callable[[], str]]  # form -> function that returns why it does not take the arguments, or ""

log = logging.getLogger("iisan_fast.kernels")
reported: set[tuple[str, str]] = set()  # the (op, form) that were logged


class FormError(ValueError):
    """The named form cannot run. The message says why, and which form can."""


def choose(
    op: str, form: str, tensors: Sequence[Tensor], refusals: Refusals, candidates: Sequence[str] | None = None
) -> str:
    """Return the form that runs an op on these tensors, and log it at its first use.

    Args:
        op: a key of `FORMS`.
        form: the caller's argument: "auto" or the name of a form.
        tensors: the operands whose dtypes and device decide; the first one gives the device.
        refusals: for a form, a function that returns why it does not take the op's arguments, or "".
        candidates: the forms that "auto" may take; None for all of the op.

    Raises FormError if the named form cannot run, or is not a form. While torch.compile traces on a CPU, "auto" returns
    the reference.
    """
    source, name = named_form(form)
    candidates = FORMS[op] if candidates is None else candidates
    if name == "auto":
        if tensors[0].device.type == "cpu" and torch.compiler.is_compiling():
            return REFERENCE  # torch.compile can trace only the reference
        chosen = _first_able(op, candidates, tensors, refusals)
    elif name not in FORMS[op]:
        chosen = REFERENCE
    else:
        if reason := _why_unable(op, name, tensors, refusals):
            others = [other for other in FORMS[op] if other != name]
            able = _first_able(op, others, tensors, refusals)
            raise FormError(f"{source}: {name} cannot run {op}: {reason}; use {able}")
        chosen = name
    if not torch.compiler.is_compiling() and (op, chosen) not in reported:
        report(op, chosen, _explanation(op, chosen, candidates, tensors, refusals))
    return chosen


def report(op: str, form: str, explanation: str = "") -> None:
    """Log the form that runs an op, once a process."""
    if (op, form) not in reported:
        reported.add((op, form))
        log.info("kernels: %s by %s%s", op, form, explanation)


def form_on(device: torch.device) -> str:
    """Return the form that IISAN_FAST_FORM names, or the fastest form that runs on a device.

    Compiles the C++ if the device is a CPU. Raises FormError if the named form cannot run on the device.
    """
    check_form(device)
    _, name = named_form()
    if name != "auto":
        return name
    if device.type == "cpu":
        return REFERENCE if why_no_library() else CPU
    return REFERENCE if device.type != "cuda" or why_not_by_triton(device.type, ()) else GPU


def check_form(device: torch.device) -> None:
    """Raise FormError if the environment names a form that cannot run on a device. Compiles nothing."""
    source, name = named_form()
    if name in ("auto", REFERENCE):
        return
    reason = why_not_by_triton(device.type, ()) if name == GPU else _why_not_on_a_cpu(device.type)
    if name == CPU and not reason:
        reason = why_no_compiler()
    if reason:
        raise FormError(f"{source}: {name} cannot run on {device.type}: {reason}; use auto")


def named_form(form: str = "auto") -> tuple[str, str]:
    """Return (source, name) of the form to use: the argument, or IISAN_FAST_FORM if the argument is "auto".

    The source is "form" or "IISAN_FAST_FORM", for messages. Raises FormError if the name is not a form.
    """
    source = "form"
    if form == "auto" and (variable := os.environ.get(FORM_VARIABLE)):
        source = FORM_VARIABLE
        form = variable
    if form not in NAMES:
        raise FormError(f"{source}: expected {', '.join(NAMES)}, found {form!r}")
    return source, form


def _first_able(op: str, forms: Sequence[str], tensors: Sequence[Tensor], refusals: Refusals) -> str:
    """Return the first form that can run, else the reference; gpu only on CUDA, never by Triton's interpreter."""
    for form in forms:
        if form == GPU and tensors[0].device.type != "cuda":
            continue
        if not _why_unable(op, form, tensors, refusals):
            return form
    return REFERENCE


def _why_unable(op: str, form: str, tensors: Sequence[Tensor], refusals: Refusals) -> str:
    """Return why a form cannot run an op, or ""; checks last whether the C++ can be compiled, as that takes seconds."""
    device = tensors[0].device.type
    if form == GPU:
        reason = why_not_by_triton(device, tuple(tensor.dtype for tensor in tensors))
    else:
        reason = _why_not_on_a_cpu(device)
    if reason:
        return reason
    if form in refusals and (reason := refusals[form]()):
        return reason
    return why_no_library() if form == CPU and op not in WITHOUT_COMPILER else ""


def _why_not_on_a_cpu(device: str) -> str:
    """Return why the cpu form cannot run on a device type, or ""."""
    return "" if device == "cpu" else f"it needs CPU tensors, found {device}"


@functools.cache
def why_not_by_triton(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Return why Triton cannot run on tensors of a device type ("cuda") and these dtypes, or ""."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), found {device}"
    if others := [dtype for dtype in dtypes if dtype not in GPU_DTYPES]:
        return f"it needs float32, bfloat16 or float16, found {others[0]}".replace("torch.", "")
    return ""


def _explanation(op: str, chosen: str, candidates: Sequence[str], tensors: Sequence[Tensor], refusals: Refusals) -> str:
    """Return " (form: reason)" if the fastest form for the tensors' device does not run, else ""."""
    fastest = {"cuda": GPU, "cpu": CPU}.get(tensors[0].device.type, "")
    if fastest == chosen or fastest not in candidates:
        return ""
    reason = _why_unable(op, fastest, tensors, refusals)
    return f" ({fastest}: {reason})" if reason else ""
