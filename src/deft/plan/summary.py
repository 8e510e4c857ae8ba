"""A run's plan in numbers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deft.plan.order import Epoch
from deft.plan.packs import pack

LOOKED_AT_STEPS = 1000
"""Numbers of single steps are taken from this many steps of the first epoch; the others are drawn alike."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of several numbers the least, the mean and the most.

    >>> str(Spread.of([3, 5, 10])), str(Spread.of([4, 4]))
    ('6 (3 to 10)', '4')
    """

    least: int
    mean: float
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        return cls(min(numbers), sum(numbers) / len(numbers), max(numbers))

    def __str__(self) -> str:
        mean = f"{self.mean:,.0f}" if self.mean >= 100 else f"{self.mean:.3g}"
        return mean if self.least == self.most else f"{mean} ({self.least:,} to {self.most:,})"


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a run will do: its steps, and what a step holds.

    fill  the share of a micro-batch's room that tokens take
    """

    examples: int
    epochs: int
    steps: int
    steps_per_epoch: Spread
    examples_per_step: Spread
    tokens_per_step: Spread
    targets_per_step: Spread
    packs_per_step: Spread
    fill: float


def summarise(
    epochs: Sequence[Epoch],
    steps: int,
    lengths: Callable[[int], Sequence[int]],
    targets: Callable[[int], int],
    budget: int,
) -> PlanSummary:
    """The plan of `epochs`, of which `steps` are run, in numbers.

    lengths  example -> tokens of each of its texts
    targets  example -> its learnt tokens
    budget   tokens of a micro-batch
    """
    first = epochs[0]
    members = [first.members(step).tolist() for step in range(min(first.steps, LOOKED_AT_STEPS))]
    texts = [[length for example in step for length in lengths(example)] for step in members]
    packed = [pack(step, budget) for step in texts]
    tokens = [sum(step) for step in texts]
    # A text longer than the budget has a micro-batch of its size.
    room = sum(_room(step, packs, budget) for step, packs in zip(texts, packed, strict=True))
    return PlanSummary(
        examples=len(first.order),
        epochs=len(epochs),
        steps=steps,
        steps_per_epoch=Spread.of([epoch.steps for epoch in epochs]),
        examples_per_step=Spread.of([len(step) for step in members]),
        tokens_per_step=Spread.of(tokens),
        targets_per_step=Spread.of([sum(map(targets, step)) for step in members]),
        packs_per_step=Spread.of([len(step) for step in packed]),
        fill=sum(tokens) / room,
    )


def _room(lengths: Sequence[int], packs: Sequence[Sequence[int]], budget: int) -> int:
    return sum(max(budget, sum(lengths[index] for index in members)) for members in packs)
