"""Test if two methods differ, given the figures of the same users under both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import InputError

MOST_ENUMERATED = 12  # up to 12 differences, all ways to flip their signs are tried (4,096)
ELEMENTS_AT_ONCE = 1 << 21  # draws x users, 16 MiB
TIE_TOLERANCE = 1e-12  # two sums are equal if they differ by less, relative to the sum of magnitudes


def paired_test(a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of the difference between two methods' means.

    This is Fisher's randomisation test (The Design of Experiments, 1935), which Smucker, Allan and Carterette (CIKM
    2007) recommend for retrieval metrics. If the methods are equal, each user's difference could as well have the other
    sign. p is the share of sign flips whose sum is at least as far from 0 as the observed sum. If at most 12
    differences are not 0, all flips are counted. If not, `draws` random flips give (1 + hits) / (1 + draws).

    a, b: float64 [users], such as `user_gains` of two runs, in the same order of users. Raises InputError if their
    lengths differ, if there are no users, or if a figure is not finite.
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
        """Count the flips that are at least as far from 0. flipped: 0 or 1, [flips, users]."""
        return int(np.count_nonzero(abs(total - 2 * (flipped @ differences)) >= observed))

    if len(differences) <= MOST_ENUMERATED:
        return hits(_all_ways(len(differences))) / 2 ** len(differences)
    return (1 + sum(map(hits, _random_ways(len(differences), draws, seed)))) / (1 + draws)


def _all_ways(users: int) -> np.ndarray:
    """Return all 2^users combinations of 0 and 1, [2^users, users]."""
    return np.arange(2**users)[:, None] >> np.arange(users) & 1


def _random_ways(users: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `draws` random rows of 0 and 1, in arrays [rows, users] of limited size."""
    generator = np.random.default_rng(seed)
    at_once = max(1, ELEMENTS_AT_ONCE // users)
    for start in range(0, draws, at_once):
        drawn = generator.integers(256, size=(min(at_once, draws - start), -(-users // 8)), dtype=np.uint8)
        yield np.unpackbits(drawn, axis=1, count=users)
