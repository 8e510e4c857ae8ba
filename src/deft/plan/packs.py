"""The documents of a step -> micro-batches under a token budget. Memory only: never the result."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, lanes: int = 1) -> list[list[int]]:
    """Indices of the documents of each micro-batch: first fit, the longest first; one over the budget is alone.

    Documents of equal length come to lie side by side.

    lanes  how many micro-batches are computed side by side: there are a multiple of them, as far as there are
           documents, and their tokens are balanced

    >>> pack([5, 3, 2, 2], budget=7), pack([5, 3, 2, 2], budget=20, lanes=2)
    ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    """
    if lanes > 1:
        return _balanced(lengths, budget, lanes)
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


def _balanced(lengths: Sequence[int], budget: int, lanes: int) -> list[list[int]]:
    """The longest first, each to the micro-batch that has the fewest tokens; more of them where one would not fit."""
    fewest = -(-sum(lengths) // (budget * lanes)) * lanes
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for count in range(min(fewest, len(lengths)), len(lengths) + lanes, lanes):
        packs: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
        filled = [(0, number) for number in range(len(packs))]
        for index in order:
            tokens, least = filled[0]
            packs[least].append(index)
            heapq.heapreplace(filled, (tokens + lengths[index], least))
        if all(tokens <= budget or len(packs[number]) == 1 for tokens, number in filled):
            return packs
    return [[index] for index in order]
