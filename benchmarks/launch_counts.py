"""Count what a step would do on a GPU, without one: its launches, its reads by the host, and the memory it allocates.

The step runs on meta tensors, which have shapes and no values. A launch is a launch of a Triton kernel, an operator of
PyTorch that makes no view, a copy, or a memset; an operator that PyTorch runs as several kernels counts as several.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import Launch, recording

ALLOCATION_UNIT = 512  # bytes, to which PyTorch's allocator rounds up
# Operators that make a tensor and launch nothing.
WITHOUT_LAUNCH = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_")
)
WITHOUT_LAUNCH |= frozenset(("_unsafe_view", "lift_fresh", "detach_", "record_stream"))
# Operators that PyTorch runs as several kernels on CUDA, index operators with deterministic algorithms.
SEVERAL_LAUNCHES = {"native_layer_norm_backward": 3, "index_copy": 12, "index_copy_": 12, "index_put_": 12}
SEVERAL_LAUNCHES |= {"index_put": 12, "_index_put_impl_": 12, "embedding_dense_backward": 12, "sort": 4, "cumsum": 2}
TENSORS_A_LAUNCH = 36  # of an operator over lists of parameters with their moments and gradients
HOST_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class LaunchCounter(TorchDispatchMode):
    """Count launches by part of a step, and follow the memory that is allocated, while this context is entered.

    Triton's launches are recorded, not run. Only memory that is allocated within the context is followed.
    """

    def __init__(self) -> None:
        """Begin with no launches and no memory."""
        super().__init__()
        self.operators: defaultdict[str, Counter[str]] = defaultdict(Counter)  # launches by part and operator
        self.launches: list[tuple[str, Launch]] = []  # (part, launch) of every Triton kernel, in their order
        self.host_reads: list[tuple[str, str]] = []  # (part, operator)
        self.allocated = self.peak = 0  # bytes
        self.allocations = 0  # of any size
        self._part = ""
        self._sizes: dict[int, int] = {}  # bytes of the storages that live, by their address
        self._recording: Any = None

    def __enter__(self) -> LaunchCounter:
        self._recording = recording(self._on_launch)
        self._recording.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._recording.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if any(tag in func.tags for tag in HOST_READS) and _on_device((args, kwargs)):
            self.host_reads.append((self._part, name))
            if torch.Tag.data_dependent_output in func.tags:
                return _stand_in(func)
        result = func(*args, **kwargs)
        results = _on_device(result)
        for tensor in results:
            self._follow(tensor)
        if launches := _launches_of(func, name, args, bool(results)):
            self.operators[self._part][name] += launches
        return result

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is inside under a name."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def by_part(self) -> dict[str, int]:
        """Return the launches of each part, in the order in which the parts began to launch."""
        counts: Counter[str] = Counter()
        for part, _ in self.launches:
            counts[part] += 1
        for part, operators in self.operators.items():
            counts[part] += operators.total()
        return dict(counts)

    def total(self) -> int:
        """Return the launches of all parts."""
        return sum(self.by_part().values())

    def forget_launches(self) -> None:
        """Begin to count again; allocated memory is still followed."""
        self.allocations = 0
        self.operators.clear()
        self.launches.clear()
        self.host_reads.clear()

    def _on_launch(self, launch: Launch) -> None:
        """Note a Triton launch under the current part of the step."""
        self.launches.append((self._part, launch))

    def _follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage as allocated, once, until Python frees it."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
        self._sizes[address] = size
        self.allocated += size
        self.allocations += 1
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        """Take the storage at an address off the allocated bytes."""
        self.allocated -= self._sizes.pop(address)


def _on_device(value: Any) -> list[Tensor]:
    """Return the meta tensors in a value; those on the CPU are the host's."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_meta]


def _stand_in(func: Any) -> Any:
    """Return a value for what the host would read: meta tensors hold none."""
    return False if str(func._schema.returns[0].type) == "bool" else 0


def _launches_of(func: Any, name: str, args: tuple, on_device: bool) -> int:
    """Return how many kernels an operator launches on CUDA."""
    if name.startswith("_fused_"):
        return _launches_over_lists(args[0])
    if name.startswith("_foreach_"):
        return -(-len(args[0]) // TENSORS_A_LAUNCH)
    if not on_device or func.is_view or name in WITHOUT_LAUNCH:
        return 0
    return SEVERAL_LAUNCHES.get(name, 1)


def _launches_over_lists(parameters: Iterable[Tensor]) -> int:
    """Return the launches of a fused optimizer: so many tensors a launch, and 320 blocks of 65,536 elements."""
    sizes = [parameter.numel() for parameter in parameters]
    blocks = sum(-(-size // 65_536) for size in sizes)
    return max(-(-len(sizes) // TENSORS_A_LAUNCH), -(-blocks // 320))
