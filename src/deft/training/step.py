"""One optimizer step: the gradient of the mean over everything in it, one update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from deft.errors import NumbersError
from deft.loader import Work
from deft.model.learner import Learner
from deft.optim.adamw import clip_scale
from deft.training.state import TrainState
from deft.types import Batch


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """loss is nats per unit of weight; grad_norm the global norm before clipping."""

    loss: float
    grad_norm: float


def take(state: TrainState, work: Work, loss: ModuleType, *, clip: float | None, factor: float) -> StepNumbers:
    """Moves `state` one step on.

    The sums of all micro-batches are divided by the step's one normalizer, so how the step was cut never matters.
    Raises NumbersError, with no weight changed, where the loss or the gradient is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in work.batches:
        state.optimizer.collect()
        nll = nll_sum(state.learner, batch, loss)
        (nll / work.normalizer).backward()
        total += nll.detach().to("cpu", torch.float64)
    norm = state.optimizer.norm()
    numbers = StepNumbers(float(total) / work.normalizer, float(norm))
    if not (math.isfinite(numbers.loss) and math.isfinite(numbers.grad_norm)):
        state.optimizer.zero_grad()
        raise NumbersError(_not_finite(work, numbers))
    state.optimizer.step(factor, clip_scale(norm, clip))
    state.step += 1
    return numbers


def nll_sum(learner: Learner, batch: Batch, loss: ModuleType) -> torch.Tensor:
    """The weighted negative log-likelihood of a micro-batch's targets, summed: a scalar with its graph."""
    batch = on(batch, learner.device)
    if learner.mode == "whole":
        return loss.loss_from_logits(learner.logits(batch), batch.targets, batch.weights)
    return loss.loss(learner.hidden(batch), learner.head, batch.targets, batch.weights)


def on(batch: Batch, device: torch.device) -> Batch:
    """The micro-batch on a device."""
    moved = {name: getattr(batch, name).to(device) for name in ("tokens", "positions", "rows", "targets", "weights")}
    return replace(batch, **moved)


def _not_finite(work: Work, numbers: StepNumbers) -> str:
    rows = ", ".join(map(str, work.origins[:5])) + (", ..." if len(work.origins) > 5 else "")
    return (
        f"step {work.step + 1}: loss {numbers.loss}, gradient norm {numbers.grad_norm}: not finite. "
        f"No weight was changed. Rows of the step: {rows}. Lower optimizer.lr, or look at these rows."
    )
