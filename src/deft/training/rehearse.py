"""The largest micro-batch once before the first step, so that what does not fit is known at once."""

from __future__ import annotations

from types import ModuleType

from deft.training import randomness
from deft.training.state import TrainState
from deft.training.step import nll_sum
from deft.types import Batch


def rehearse(state: TrainState, batch: Batch, loss: ModuleType) -> None:
    """One forward and backward without an update; gradients are thrown away, random numbers are as they were."""
    before = randomness.snapshot(state.learner.device)
    try:
        nll_sum(state.learner, batch, loss).backward()
    finally:
        state.optimizer.zero_grad()
        randomness.restore(before, state.learner.device)
