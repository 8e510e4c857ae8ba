"""One optimizer step: the gradient of the mean over everything in it, one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from deft.hardware import sent
from deft.loader import Work
from deft.model.learner import Learner
from deft.optim.adamw import clip_scale
from deft.training import randomness
from deft.training.state import TrainState
from deft.types import Batch


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """loss is nats per unit of weight; grad_norm the global norm before clipping."""

    loss: float
    grad_norm: float

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def take(
    state: TrainState,
    work: Work,
    loss: ModuleType,
    *,
    clip: float | None,
    factor: float,
    poll: Callable[[], None] = lambda: None,
) -> StepNumbers:
    """Moves `state` one step on. Where the loss or the gradient is not finite, or `poll` raises, nothing has changed.

    The sums of all micro-batches are divided by the step's one normalizer, so how the step was cut never matters.

    poll  called before each micro-batch
    """
    before = randomness.snapshot(state.learner.device)
    try:
        numbers, norm = _accumulate(state, work, loss, poll)
    except BaseException:
        _undo(state, before)
        raise
    if numbers.are_finite:
        state.update(factor, clip_scale(norm, clip))
    else:
        _undo(state, before)
    return numbers


def _accumulate(
    state: TrainState, work: Work, loss: ModuleType, poll: Callable[[], None]
) -> tuple[StepNumbers, torch.Tensor]:
    """The step's numbers and its gradient's norm; the gradient is with the optimizer."""
    # The device runs ahead of Python until the one read at the end. MPS has no fp64.
    home = torch.device("cpu") if state.learner.device.type == "mps" else state.learner.device
    total = torch.zeros((), dtype=torch.float64, device=home)
    for batch in work.batches:
        poll()
        state.optimizer.collect()
        share = mean_share(state.learner, batch, work.normalizer, loss)
        share.backward()
        total += share.detach().to(home, torch.float64)
    norm = state.optimizer.norm()
    return _read(total, norm.to(home, torch.float64)), norm


def _read(loss: torch.Tensor, norm: torch.Tensor) -> StepNumbers:
    """The one wait for the device in a step."""
    return StepNumbers(*torch.stack([loss, norm]).tolist())


def _undo(state: TrainState, before: dict[str, torch.Tensor]) -> None:
    state.optimizer.zero_grad()
    randomness.restore(before, state.learner.device)


def mean_share(learner: Learner, batch: Batch, normalizer: float, loss: ModuleType) -> torch.Tensor:
    """What a micro-batch adds to the loss of its step: a scalar with its graph; NaN where the normalizer is 0.

    The normalizer is in the weights, so that no gradient has to be divided, and rounded, once more.
    """
    make_kernels(learner, batch, loss)
    share = nll_sum(learner, replace(batch, weights=batch.weights / normalizer), loss)
    return share if normalizer > 0.0 else share * math.nan


def make_kernels(learner: Learner, batch: Batch, loss: ModuleType) -> None:
    """Kernels that will stay are made before a micro-batch takes its memory (`hardware.few_sizes`), those of the loss
    where it has a `make_kernels` of its own."""
    learner.make_kernels(batch)
    if hasattr(loss, "make_kernels") and learner.mode != "whole":
        loss.make_kernels(learner.head, len(batch.targets))


def nll_sum(learner: Learner, batch: Batch, loss: ModuleType) -> torch.Tensor:
    """The weighted negative log-likelihood of a micro-batch's targets, summed: a scalar with its graph."""
    batch = on(batch, learner.device)
    if learner.mode == "whole":
        return loss.loss_from_logits(learner.logits(batch), batch.targets, batch.weights)
    return loss.loss(*learner.hidden_and_head(batch), batch.targets, batch.weights)


def on(batch: Batch, device: torch.device) -> Batch:
    """The micro-batch on a device."""
    names = ("tokens", "positions", "rows", "targets", "weights")
    moved: dict[str, Any] = {name: sent(getattr(batch, name), device) for name in names}
    return replace(batch, **moved)
