"""A micro-batch computed and thrown away before the first step, so that what does not fit is known at once."""

from __future__ import annotations

from deft.core.types import MicroBatch, Objective
from deft.training import randomness
from deft.training.state import TrainState


def dry_run_step(state: TrainState, micro_batch: MicroBatch, objective: Objective) -> None:
    """One forward and backward without an update: gradients are dropped, random numbers are as they were."""
    with randomness.preserved():
        try:
            state.causal_lm(micro_batch, objective).nll_sum.backward()
        finally:
            state.masters.zero_grad()
