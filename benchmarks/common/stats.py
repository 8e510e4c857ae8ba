"""Medians, spreads and paired ratios."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, by linear interpolation.

    >>> quartiles([1, 2, 3, 4, 5])
    (2.0, 4.0)
    """
    ordered = sorted(numbers)
    return _at(ordered, 0.25), _at(ordered, 0.75)


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def drift(before: float, after: float) -> float:
    """How much a number changed, relative to the mean of before and after.

    >>> round(drift(90.0, 110.0), 3)
    0.2
    """
    return 2 * abs(before - after) / (before + after)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Median of ours / theirs block by block, and its 95 % bootstrap interval.

    >>> paired_ratio([4.0, 4.0, 4.0], [2.0, 2.0, 2.0])
    (2.0, 2.0, 2.0)
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    chosen = random.Random(0)
    found = sorted(median(chosen.choices(ratios, k=len(ratios))) for _ in range(draws))
    return median(ratios), _at(found, 0.025), _at(found, 0.975)
