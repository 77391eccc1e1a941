"""A profile by kernel: how often each is launched in a step, and what it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST_KERNELS = 60  # in the results; the table has all
NAME_LENGTH = 100  # characters


class Kernel(NamedTuple):
    """A kernel's share of a step."""

    name: str
    launches: float  # a step
    us: float  # a step


@dataclass(frozen=True)
class Profile:
    """The kernels of some steps, the most expensive first. On a CPU: its operators."""

    kernels: list[Kernel]
    steps: int
    span_us: float  # from the first kernel's start to the last one's end
    profiler: profile

    @property
    def busy_us(self) -> float:
        """Return the microseconds of all kernels of a step."""
        return sum(kernel.us for kernel in self.kernels)

    def as_json(self) -> dict[str, Any]:
        """Return the totals and the most expensive kernels."""
        return {
            "steps": self.steps,
            "launches_a_step": sum(kernel.launches for kernel in self.kernels),
            "busy_us_a_step": self.busy_us,
            "span_us_a_step": self.span_us / self.steps,
            "kernels": [kernel._asdict() for kernel in self.kernels[:MOST_KERNELS]],
        }

    def text(self) -> str:
        """Return the table of all kernels."""
        lines = [f"{'launches':>9} {'us a step':>10} {'share':>6}  kernel"]
        for kernel in self.kernels:
            share = kernel.us / self.busy_us if self.busy_us else 0
            lines.append(f"{kernel.launches:9.1f} {kernel.us:10.1f} {share:6.1%}  {kernel.name}")
        launches = sum(kernel.launches for kernel in self.kernels)
        lines.append(f"{launches:9.1f} {self.busy_us:10.1f} of {self.span_us / self.steps:.1f} us a step")
        return "\n".join(lines)

    def write_trace(self, path: Path) -> None:
        """Write the trace that chrome://tracing and Perfetto read."""
        self.profiler.export_chrome_trace(str(path))


def profile_of(call: Callable[[], Any], steps: int, device: torch.device) -> Profile:
    """Profile a call that takes some steps, all that they compile and capture being there already."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind and not is_annotation(event)]
    kernels, span = by_kernel(events, steps)
    return Profile(kernels, steps, span, profiler)


def by_kernel(events: Iterable[Any], steps: int) -> tuple[list[Kernel], float]:
    """Add up the profiler's events by name; return the kernels and the microseconds from first to last."""
    launches: defaultdict[str, int] = defaultdict(int)
    times: defaultdict[str, float] = defaultdict(float)
    starts, ends = [], []
    for event in events:
        name = event.name[:NAME_LENGTH]
        launches[name] += 1
        times[name] += event.time_range.elapsed_us()
        starts.append(event.time_range.start)
        ends.append(event.time_range.end)
    names = sorted(times, key=times.__getitem__, reverse=True)
    span = max(ends) - min(starts) if starts else 0.0
    return [Kernel(name, launches[name] / steps, times[name] / steps) for name in names], span


def is_annotation(event: Any) -> bool:
    """Tell whether an event is a range that a program marked, not a kernel."""
    return bool(getattr(event, "is_user_annotation", False))
