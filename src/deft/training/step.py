"""One optimizer step: the gradient of the mean over everything in it, one reduction over ranks, one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deft.core.types import MicroBatch, Objective, StepBatch
from deft.model.causal_lm import CausalLM
from deft.plan.share import share
from deft.training import randomness
from deft.training.masters import clip_scale
from deft.training.state import TrainState


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """loss is nats per unit of weight; grad_norm the global norm before clipping; stops whether any rank wants to."""

    loss: float
    grad_norm: float
    stops: bool = False

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def optimizer_step(
    state: TrainState,
    step_batch: StepBatch,
    objective: Objective,
    *,
    lr: float,
    clip: float | None,
    poll: Callable[[], None] = lambda: None,
    wants_to_stop: Callable[[], bool] = lambda: False,
) -> StepNumbers:
    """Moves `state` one step on. Where the loss or the gradient is not finite, or `poll` raises, nothing has changed.

    The sums of all micro-batches are divided by the step's one normalizer, so how the step was cut never matters.

    poll           called before each micro-batch
    wants_to_stop  whether this rank wants the run to end after this step
    """
    before = randomness.snapshot()
    try:
        numbers, norm = _accumulate(state, step_batch, objective, poll, wants_to_stop)
    except BaseException:
        _undo(state, before)
        raise
    if numbers.are_finite:
        state.update(lr, clip_scale(norm, clip))
    else:
        _undo(state, before)
    return numbers


def _accumulate(
    state: TrainState,
    step_batch: StepBatch,
    objective: Objective,
    poll: Callable[[], None],
    wants_to_stop: Callable[[], bool],
) -> tuple[StepNumbers, Tensor]:
    """The step's numbers and the norm of its gradient, fp32; the gradient is with the masters."""
    # The device runs ahead of Python until the one read at the end. MPS has no fp64.
    home = torch.device("cpu") if state.causal_lm.device.type == "mps" else state.causal_lm.device
    total = torch.zeros((), dtype=torch.float64, device=home)
    for micro_batch in share(step_batch, state.world.rank, state.world.size).micro_batches:
        poll()
        state.masters.collect()
        mean = mean_share(state.causal_lm, micro_batch, step_batch.normalizer, objective)
        mean.backward()
        total += mean.detach().to(home, torch.float64)
    squares = state.masters.squared_norm().to(home, torch.float64)
    stops = torch.full_like(total, float(wants_to_stop()))
    summed = state.world.sum(torch.stack([total, squares, stops]))
    norm = summed[1].float().sqrt()
    return _read(torch.stack([summed[0], norm.double(), summed[2]])), norm


def _read(numbers: Tensor) -> StepNumbers:
    """The one wait for the device in a step."""
    loss, grad_norm, stops = numbers.tolist()
    return StepNumbers(loss, grad_norm, stops > 0)


def _undo(state: TrainState, before: dict[str, Any]) -> None:
    state.masters.zero_grad()
    randomness.restore(before)


def dry_run_step(state: TrainState, micro_batch: MicroBatch, objective: Objective) -> None:
    """One forward and backward without an update, to see what fits: no gradient and no random number is left of it."""
    with randomness.preserved():
        try:
            state.causal_lm(micro_batch, objective).nll_sum.backward()
        finally:
            state.masters.zero_grad()


def mean_share(causal_lm: CausalLM, micro_batch: MicroBatch, normalizer: float, objective: Objective) -> Tensor:
    """What a micro-batch adds to the loss of its step: a scalar with its graph; NaN where the normalizer is 0.

    The normalizer is in the weights, so that no gradient has to be divided, and rounded, once more.
    """
    scaled = replace(micro_batch, weights=micro_batch.weights / normalizer)
    total = causal_lm(scaled, objective).nll_sum
    return total if normalizer > 0.0 else total * math.nan
