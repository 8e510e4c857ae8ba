"""Which part of a tensor is on a rank, where the ranks share one copy of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a whole tensor this rank holds: shape of the whole, [start, stop) of its first dimension."""

    shape: tuple[int, ...]
    start: int
    stop: int
