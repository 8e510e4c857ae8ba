"""The loop: a generator of step records. What else happens between steps is written in the `for` body around it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing

import torch

from deft.core.errors import NumbersError
from deft.core.types import Objective, StepRecord
from deft.plan.loader import Loader
from deft.training.state import TrainState
from deft.training.step import optimizer_step


def train(
    state: TrainState,
    loader: Loader,
    objective: Objective,
    *,
    clip: float | None,
    lr: Callable[[int], float],
    poll: Callable[[], None] = lambda: None,
    wants_to_stop: Callable[[], bool] = lambda: False,
) -> Generator[StepRecord, None, bool]:
    """Runs the steps that `state` has not done yet and yields a record after each; whether a rank wanted to stop.

    It ends after the last step, or after one at whose end a rank wanted to stop. A record that is not finite is of a
    step that changed nothing. Whoever takes it calls `state.skip()` to go past the step; NumbersError where they have
    not.

    lr             step (from 0) -> learning rate
    poll           called before each micro-batch; what it raises ends the loop between two steps
    wants_to_stop  whether this rank wants the run to end after the step
    """
    began = time.perf_counter()
    with closing(loader.step_batches(state.step)) as step_batches:
        for step_batch in step_batches:
            rate = lr(step_batch.step)
            numbers = optimizer_step(
                state, step_batch, objective, lr=rate, clip=clip, poll=poll, wants_to_stop=wants_to_stop
            )
            now = time.perf_counter()
            yield StepRecord(
                step=step_batch.step + 1,
                epoch=step_batch.epoch,
                loss=numbers.loss,
                grad_norm=numbers.grad_norm,
                learning_rate=rate,
                target_tokens=step_batch.target_tokens,
                tokens=step_batch.tokens,
                padded_tokens=sum(map(state.causal_lm.padding, step_batch.micro_batches)),
                seconds=now - began,
                peak_bytes=peak_bytes(),
            )
            if state.step == step_batch.step:
                raise NumbersError(f"step {step_batch.step + 1}: loss or gradient is not finite; no weight was changed")
            if numbers.stops:
                return True
            began = now
    return False


def peak_bytes() -> int:
    """The most memory used so far: the device's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
