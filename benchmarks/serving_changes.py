"""The parts of the benchmark of serving that change or write something: each works on a copy of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CHANGES: dict[str, Callable[..., dict[str, Any]]] = {}
