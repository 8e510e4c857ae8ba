"""Which example stands in which step: a pure function of (seed, epoch), known in full before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Batching:
    """One optimizer step: this many examples, or those that fit in this many tokens. Exactly one of the two is set."""

    examples: int | None = 32
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Epoch:
    """The examples of one epoch in order, and where each step begins in that order.

    order   int32 [E], int64 from 2**31 examples on
    starts  int64 [steps + 1], from 0 to E
    """

    order: np.ndarray
    starts: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def members(self, step: int) -> np.ndarray:
        """The examples of a step of this epoch, counted from 0."""
        return self.order[self.starts[step] : self.starts[step + 1]]


def plan(
    sizes: np.ndarray, batchings: Sequence[tuple[int, Batching]], seed: int, epochs: Iterable[int]
) -> tuple[Epoch, ...]:
    """Epochs in a row, each example once in each, in an order drawn from (seed, epoch).

    batchings  (step, batching), ascending from step 0: what cuts steps from that one on. The order of an epoch does not
               depend on it: where it changes, what is left of the epoch is cut anew.

    >>> first, second = plan(np.ones(5), [(0, Batching(examples=3)), (1, Batching(examples=1))], 0, range(2))
    >>> first.starts.tolist(), second.starts.tolist()
    ([0, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    """
    planned: list[Epoch] = []
    done = 0
    for epoch in epochs:
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(sizes))
        starts = _starts(sizes[order], batchings, done)
        planned.append(Epoch(order.astype(np.int32 if len(order) < 2**31 else np.int64), starts))
        done += len(starts) - 1
    return tuple(planned)


def _starts(sizes: np.ndarray, batchings: Sequence[tuple[int, Batching]], done: int) -> np.ndarray:
    """Where the steps of an epoch begin, whose first is the run's step `done`."""
    starts = [0]
    while starts[-1] < len(sizes):
        step = done + len(starts) - 1
        batching = [each for since, each in batchings if since <= step][-1]
        until = min((since for since, _ in batchings if since > step), default=None)
        cut = _cut(sizes[starts[-1] :], batching)[1:] + starts[-1]
        starts += cut[: None if until is None else until - step].tolist()
    return np.array(starts, np.int64)


def _cut(sizes: np.ndarray, batching: Batching) -> np.ndarray:
    if batching.examples is not None:
        return np.array([*range(0, len(sizes), batching.examples), len(sizes)], np.int64)
    return np.array(_token_starts(sizes, batching.tokens or 1), np.int64)


def _token_starts(sizes: np.ndarray, limit: int) -> list[int]:
    """Steps of as many examples as fit in `limit` tokens; an example longer than that is a step alone.

    >>> _token_starts(np.array([3, 3, 3, 9, 1]), 6)
    [0, 2, 3, 4, 5]
    """
    totals = np.concatenate([[0], np.cumsum(sizes)])
    fitting = np.searchsorted(totals, totals[:-1] + limit, side="right") - 1
    following = np.maximum(fitting, np.arange(1, len(totals))).tolist()
    starts = [0]
    while starts[-1] < len(sizes):
        starts.append(following[starts[-1]])
    return starts
