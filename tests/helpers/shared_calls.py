"""Python functions as calls that the C++ library's threads share out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from iisan_fast.kernels.cpu import schedule

Work = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_int64))


class Number(ctypes.Structure):
    _fields_ = [("value", ctypes.c_int64)]


def share_out(work: Callable[[int], int], count: int, threads: int) -> None:
    """Call `work` once for every number below `count`."""
    call = Work(lambda pointer: work(pointer[0]))
    schedule.share_out(call, [Number(i) for i in range(count)], torch.float32, threads)
