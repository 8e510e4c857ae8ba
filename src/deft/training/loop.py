"""The loop: a generator of step records. What else happens between steps is written in the `for` body around it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from types import ModuleType

import torch

from deft.errors import NumbersError
from deft.loader import Loader
from deft.training.state import TrainState
from deft.training.step import take
from deft.types import StepRecord


def train(
    state: TrainState,
    loader: Loader,
    loss: ModuleType,
    *,
    clip: float | None,
    factor: Callable[[int], float],
    poll: Callable[[], None] = lambda: None,
) -> Iterator[StepRecord]:
    """Runs the steps that `state` has not done yet and yields a record after each.

    A record that is not finite is of a step that changed nothing. Whoever takes it calls `state.skip()` to go past
    the step; NumbersError where they have not.

    factor  step (from 0) -> what the learning rate is multiplied by
    poll    called before each micro-batch; what it raises ends the loop between two steps
    """
    began = time.perf_counter()
    with closing(loader.work(state.step)) as works:
        for work in works:
            multiplier = factor(work.step)
            numbers = take(state, work, loss, clip=clip, factor=multiplier, poll=poll)
            now = time.perf_counter()
            yield StepRecord(
                step=work.step + 1,
                epoch=work.epoch,
                loss=numbers.loss,
                grad_norm=numbers.grad_norm,
                learning_rate=state.optimizer.lr * multiplier,
                target_tokens=work.target_tokens,
                tokens=work.tokens,
                padded_tokens=sum(map(state.learner.padding, work.batches)),
                seconds=now - began,
                peak_bytes=peak_bytes(),
            )
            if state.step == work.step:
                raise NumbersError(f"step {work.step + 1}: loss or gradient is not finite; no weight was changed")
            began = now


def peak_bytes() -> int:
    """The most memory used so far: the device's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
