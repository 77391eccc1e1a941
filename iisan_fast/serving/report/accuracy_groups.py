"""Divide ranked users into groups of similar size by a number, and estimate the accuracy of each group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

MOST_GROUPS = 6
Z = 1.959964  # 95 % of a normal distribution lie within Z deviations of its mean


class Estimate(NamedTuple):
    """A mean over users with its 95 % interval, as fractions."""

    value: float
    low: float | None  # None for less than two users
    high: float | None


class AccuracyGroup(NamedTuple):
    """The users of a group, or its targets if each counts, and their accuracy."""

    label: str  # the numbers by which they belong to the group: "4", "5–7", "8 or more"
    users: int
    hr: Estimate
    ndcg: Estimate


def accuracy_groups(
    numbers: np.ndarray, gains: Mapping[str, np.ndarray], k: int, zero_apart: bool = False
) -> list[AccuracyGroup]:
    """Return the users in at most `MOST_GROUPS` groups by ascending number; every user is in one group.

    numbers: int64 [users], from 0. gains: of `evaluation.user_gains` for this k. zero_apart: the users with the number
    0 are a group apart from others.
    """
    groups = []
    bounds = group_bounds(numbers, zero_apart)
    for first, last in bounds:
        chosen = (numbers >= first) & (numbers <= last)
        is_open = last > first and last == bounds[-1][1]
        label = f"{first:,}" if first == last else f"{first:,} or more" if is_open else f"{first:,}–{last:,}"
        hits, ndcg = gains[f"hr@{k}"][chosen], gains[f"ndcg@{k}"][chosen]
        groups.append(AccuracyGroup(label, int(chosen.sum()), proportion(hits), mean(ndcg)))
    return groups


def group_bounds(numbers: np.ndarray, zero_apart: bool) -> list[tuple[int, int]]:
    """Return the least and the greatest number of each group, ascending. Users with one number stay together."""
    values, counts = np.unique(numbers, return_counts=True)
    bounds = []
    if zero_apart and len(values) and values[0] == 0:
        bounds.append((0, 0))
        values, counts = values[1:], counts[1:]
    remaining = int(counts.sum())
    places = MOST_GROUPS - len(bounds)
    gathered = 0
    first = None
    for value, count in zip(values.tolist(), counts.tolist()):
        first = value if first is None else first
        gathered += count
        if gathered * places >= remaining or value == values[-1]:
            bounds.append((first, value))
            remaining -= gathered
            places = max(places - 1, 1)
            gathered = 0
            first = None
    return bounds


def proportion(hits: np.ndarray) -> Estimate:
    """Return the share of ones in an array of 0 and 1 with Wilson's interval (JASA 1927)."""
    users = len(hits)
    share = float(hits.mean())
    if users < 2:
        return Estimate(share, None, None)
    centre = (share + Z**2 / (2 * users)) / (1 + Z**2 / users)
    half = Z / (1 + Z**2 / users) * math.sqrt(share * (1 - share) / users + Z**2 / (4 * users**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: np.ndarray) -> Estimate:
    """Return the mean of values from 0 to 1, with the interval of a normal distribution, cut to that range."""
    users = len(values)
    centre = float(values.mean())
    if users < 2:
        return Estimate(centre, None, None)
    half = Z * float(values.std(ddof=1)) / math.sqrt(users)
    return Estimate(centre, max(0.0, centre - half), min(1.0, centre + half))
