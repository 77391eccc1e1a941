"""A test of the difference between two methods, from the figures of the same users under both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import InputError

MOST_ENUMERATED = 12  # differences; all 4,096 ways to flip their signs are tried
ELEMENTS_AT_ONCE = 1 << 21  # of draws x users: 16 MiB
TIE_TOLERANCE = 1e-12  # relative to the sum of magnitudes; within it two sums tie


def paired_test(a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the difference between two methods' means.

    Fisher's randomisation test (The Design of Experiments, 1935), which Smucker, Allan and Carterette (CIKM 2007)
    recommend for retrieval metrics: were the methods equal, each user's difference might as well have had the other
    sign. p is the share of ways to flip signs whose sum is at least as far from 0 as the one observed, over all ways
    where at most 12 differences are not 0, else (1 + hits) / (1 + draws) over random ones.

    Args: a, b float64 [users], such as `user_gains` of two runs, user by user. Raises InputError for lengths that
    differ, no users, and figures that are not finite.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"paired test: expected one figure a user in both, found shapes {a.shape} and {b.shape}")
    if not len(a):
        raise InputError("paired test: expected at least one user, found none")
    differences = a.astype(np.float64) - b
    if not np.isfinite(differences).all():
        raise InputError("paired test: expected finite figures")
    differences = differences[differences != 0]
    total = differences.sum()
    observed = abs(total) - TIE_TOLERANCE * abs(differences).sum()

    def hits(flipped: np.ndarray) -> int:
        """flipped: 0 or 1 [ways, users]."""
        return int(np.count_nonzero(abs(total - 2 * (flipped @ differences)) >= observed))

    if len(differences) <= MOST_ENUMERATED:
        return hits(_all_ways(len(differences))) / 2 ** len(differences)
    return (1 + sum(map(hits, _random_ways(len(differences), draws, seed)))) / (1 + draws)


def _all_ways(users: int) -> np.ndarray:
    return np.arange(2**users)[:, None] >> np.arange(users) & 1


def _random_ways(users: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    at_once = max(1, ELEMENTS_AT_ONCE // users)
    for start in range(0, draws, at_once):
        drawn = generator.integers(256, size=(min(at_once, draws - start), -(-users // 8)), dtype=np.uint8)
        yield np.unpackbits(drawn, axis=1, count=users)
