"""The documents of a step -> micro-batches under a token budget. Memory only: never the result."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the documents of each micro-batch: first fit, the longest first; one over the budget is alone.

    Documents of equal length come to lie side by side.

    >>> pack([5, 3, 2, 2], budget=7)
    [[0, 2], [1, 3]]
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        home = next((p for p, left in enumerate(room) if lengths[index] <= left), None)
        if home is None:
            packs.append([index])
            room.append(budget - lengths[index])
        else:
            packs[home].append(index)
            room[home] -= lengths[index]
    return packs
