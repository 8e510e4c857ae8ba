"""`deft check --time`: the seconds of a whole plan, from a few of its own micro-batches run on the loaded model.

A micro-batch takes `fixed + per_flop * FLOP` seconds and a step one update: a straight line through measurements of
the code that the run itself executes, on the device that it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np
import torch

from deft.core.types import MicroBatch, Objective
from deft.plan.loader import Loader
from deft.run.scaling import Flop
from deft.tracking.console import duration
from deft.training.masters import clip_scale
from deft.training.state import TrainState
from deft.training.step import mean_share

SECONDS = 20.0
LEAST, MOST = 4, 24
"""Micro-batches are measured for about SECONDS, but at least LEAST and at most MOST of them."""


@dataclass(frozen=True, slots=True)
class PlanTime:
    """What all training steps of a plan take; evaluation and saving are not in it.

    measured  how many micro-batches it was measured on
    """

    seconds: float
    tokens_per_second: float
    measured: int

    def __str__(self) -> str:
        """
        >>> str(PlanTime(7200.0, 1234.5, 8))
        'about 2 h 00 min for all steps, 1,230 tokens/s (8 micro-batches measured; evaluation and saving come on top)'
        """
        speed = float(f"{self.tokens_per_second:.3g}")
        measured = f"{self.measured} micro-batches measured; evaluation and saving come on top"
        return f"about {duration(self.seconds)} for all steps, {speed:,.0f} tokens/s ({measured})"


def measure(state: TrainState, planned: Loader, objective: Objective, clip: float | None) -> PlanTime:
    """Runs the plan's largest micro-batch, then typical ones, and prices all steps by them.

    Weights stay as they are, as updates are made at a learning rate of 0; moments do not, so the state must not be
    trained on. Runs out of memory where the plan does.
    """
    steps, flop = planned.spread_steps(), Flop.of(state.causal_lm.model)
    micro_batches = sorted(_described(planned, steps, flop))
    per_step = max(1, round(len(micro_batches) / len(steps)))
    run = partial(_run, state, objective=objective, clip=clip, per_step=per_step)
    warm, _ = run([_built(planned, micro_batches[-1])] * 2)
    count = min(MOST, len(micro_batches), max(LEAST, int(SECONDS / warm[-1])))
    chosen = [part[len(part) // 2] for part in np.array_split(np.arange(len(micro_batches)), count)]
    np.random.default_rng(0).shuffle(chosen)
    seconds, updates = run([_built(planned, micro_batches[index]) for index in chosen])
    fixed, per_flop = _line([micro_batches[index].flop for index in chosen], seconds)
    all_flop = sum(each.flop for each in micro_batches)
    steps_seconds = fixed * len(micro_batches) + per_flop * all_flop + mean(updates) * len(steps)
    tokens = sum(each.tokens for each in micro_batches)
    return PlanTime(steps_seconds * planned.steps / len(steps), tokens / steps_seconds, count)


@dataclass(frozen=True, slots=True, order=True)
class _Priced:
    """One of the plan, by its work, and where it is. tokens are those of all its documents."""

    flop: float
    tokens: int
    step: int
    index: int


def _described(planned: Loader, steps: Sequence[int], flop: Flop) -> Iterator[_Priced]:
    for step in steps:
        for index, batch in enumerate(planned.step(step).micro_batches):
            squares = sum(length**2 for length in batch.documents)
            work = flop(len(batch.tokens), len(batch.targets), squares)
            yield _Priced(work, len(batch.tokens) + len(batch.documents), step, index)


def _built(planned: Loader, micro_batch: _Priced) -> MicroBatch:
    return planned.step(micro_batch.step).micro_batches[micro_batch.index]


def _run(
    state: TrainState, batches: Sequence[MicroBatch], *, objective: Objective, clip: float | None, per_step: int
) -> tuple[list[float], list[float]]:
    """The seconds of each micro-batch, and of the update after each `per_step` of them."""
    seconds, updates = [], []
    for start in range(0, len(batches), per_step):
        step = batches[start : start + per_step]
        seconds += [_timed(state, partial(_backward, state, batch, objective)) for batch in step]
        updates.append(_timed(state, partial(_update, state, clip)))
    return seconds, updates


def _backward(state: TrainState, batch: MicroBatch, objective: Objective) -> None:
    state.masters.collect()
    mean_share(state.causal_lm, batch, float(len(batch.targets)), objective).backward()


def _update(state: TrainState, clip: float | None) -> None:
    state.optimizer.step(0.0, clip_scale(state.masters.squared_norm().sqrt(), clip))


def _timed(state: TrainState, run: Callable[[], None]) -> float:
    _synchronize(state.causal_lm.device)
    began = time.perf_counter()
    run()
    _synchronize(state.causal_lm.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _line(flop: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of a micro-batch and per FLOP, neither below 0: the least squares.

    >>> [round(float(each), 6) for each in _line([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])]
    [1.0, 2.0]
    >>> _line([1.0, 2.0], [1.0, 3.0]), _line([1.0, 2.0], [3.0, 1.0]), _line([2.0, 2.0], [3.0, 5.0])
    ((0.0, 1.3333333333333333), (2.0, 0.0), (0.0, 2.0))
    """
    if max(flop) - min(flop) > 1e-6 * max(flop):
        per_flop, fixed = np.polyfit(flop, seconds, 1)
        if per_flop < 0.0:
            return mean(seconds), 0.0
        if fixed >= 0.0:
            return float(fixed), float(per_flop)
    return 0.0, sum(seconds) / sum(flop)
