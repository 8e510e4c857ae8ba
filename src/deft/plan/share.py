"""The micro-batches of a step that one of several ranks computes."""

from __future__ import annotations

from dataclasses import replace

from deft.core.types import StepBatch


def share(step: StepBatch, rank: int, ranks: int) -> StepBatch:
    """This rank's micro-batches of a step, dealt out in turn; the step's numbers stay those of the whole step.

    >>> step = StepBatch(0, 0, ("a", "b", "c"), 1.0, 30, 3, ((), (), ()))
    >>> [share(step, rank, 2).micro_batches for rank in range(2)], share(step, 0, 1) == step
    ([('a', 'c'), ('b',)], True)
    """
    return replace(step, micro_batches=step.micro_batches[rank::ranks], origins=step.origins[rank::ranks])
