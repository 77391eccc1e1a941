"""What the kernels' benchmark measures: ops, batches and shapes."""

from __future__ import annotations

from dataclasses import dataclass

OPS = ("side-network", "loss", "loss-unmasked", "target-rank", "target-rank-float32")
USERS = (64, 512, 8192)  # a batch


@dataclass(frozen=True)
class KernelSettings:
    """Of a benchmark. No users stands for USERS, as far as the dataset has as many."""

    users: tuple[int, ...] = ()
    ops: tuple[str, ...] = OPS
    forms: tuple[str, ...] = ()  # none stands for all
    width: int = 768
    layers: int = 7
    bottleneck: int = 64
    embedding_dim: int = 64
    exact_users: int = 8192  # the largest batch whose gradients are compared with fp64
    seed: int = 0
