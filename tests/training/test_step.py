"""A step is taken whole, with its clipping and its learning rate, or leaves no trace at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_training import dropout_state, planned

from deft.core.types import StepBatch, Tally
from deft.training import badstep
from deft.training.chunked import NLL, Chunked
from deft.training.state import TrainState
from deft.training.step import dry_run_step, optimizer_step

LR = 1e-2


class Stopped(BaseException):
    """What `poll` raises where a run is to end."""


def interrupted(state: TrainState, step_batch: StepBatch) -> None:
    """After one of several micro-batches."""
    polls = iter(range(len(step_batch.micro_batches)))

    def poll() -> None:
        if next(polls) == 1:
            raise Stopped

    with pytest.raises(Stopped):
        optimizer_step(state, step_batch, NLL, clip=1.0, lr=LR, poll=poll)


def not_finite(state: TrainState, step_batch: StepBatch) -> None:
    """The loss of the last micro-batch is not a number."""
    left = iter(range(len(step_batch.micro_batches), 0, -1))

    class Spoiled(Chunked):
        def __call__(self, *given: Any) -> Tally:
            tally = super().__call__(*given)
            return Tally(tally.nll_sum * (float("nan") if next(left) == 1 else 1.0), tally.weight_sum)

    numbers = optimizer_step(state, step_batch, Spoiled(), clip=1.0, lr=LR)
    assert not numbers.are_finite


def tried(state: TrainState, step_batch: StepBatch) -> None:
    dry_run_step(state, step_batch.micro_batches[0], NLL)


def examined(state: TrainState, step_batch: StepBatch) -> None:
    badstep.examine(state.causal_lm, step_batch, NLL)


def steps_after(before: Callable[[TrainState, StepBatch], None] | None) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The numbers of two steps with dropout, and the masters and the optimizer's state after them."""
    state, plan = dropout_state(), planned()
    torch.manual_seed(7)
    assert len(plan.step(0).micro_batches) > 1
    if before is not None:
        before(state, plan.step(0))
    numbers: list[Any] = [optimizer_step(state, plan.step(step), NLL, clip=1.0, lr=LR) for step in range(2)]
    return numbers, state.masters.state() | state.optimizer.state()


@pytest.mark.parametrize("before", [interrupted, not_finite, tried, examined])
def test_what_is_undone_or_only_tried_leaves_no_trace(before: Callable[[TrainState, StepBatch], None]) -> None:
    """Neither a gradient nor a random number: the steps that follow have the same bits."""
    numbers, state = steps_after(before)
    expected, untouched = steps_after(None)
    assert numbers == expected
    assert state.keys() == untouched.keys()
    assert all(torch.equal(each, untouched[name]) for name, each in state.items())


def test_the_comparison_sees_a_random_number() -> None:
    drawn, _ = steps_after(lambda state, step_batch: torch.rand(1))
    assert drawn != steps_after(None)[0]


def change(factor: float) -> torch.Tensor:
    """What a first step moves the weights by, all together."""
    state = dropout_state()
    before = [each.detach().clone() for each in state.causal_lm.model.parameters()]
    torch.manual_seed(7)
    optimizer_step(state, planned().step(0), NLL, clip=None, lr=factor * LR)
    after = state.causal_lm.model.parameters()
    return torch.cat([(now - then).flatten() for now, then in zip(after, before, strict=True)]).detach()


def test_the_factor_multiplies_the_learning_rate() -> None:
    assert torch.allclose(change(0.25), 0.25 * change(1.0), atol=1e-6)
    assert float(change(1.0).abs().max()) > 5e-3


def moments(clip: float | None) -> tuple[float, torch.Tensor]:
    """The gradient's norm as it is told, and the first moments after a first step: a tenth of the gradient."""
    state = dropout_state()
    torch.manual_seed(7)
    numbers = optimizer_step(state, planned().step(0), NLL, clip=clip, lr=LR)
    found = state.optimizer.state()
    return numbers.grad_norm, torch.cat([found[name].flatten() for name in found if name.startswith("exp_avg.")])


def test_the_whole_gradient_is_clipped_and_told_as_it_was() -> None:
    norm, whole = moments(None)
    told, clipped = moments(norm / 8)
    assert told == norm
    assert float(whole.norm()) == pytest.approx(0.1 * norm, rel=1e-5)
    assert torch.allclose(clipped, whole / 8, rtol=1e-4, atol=1e-9)
    assert torch.equal(moments(norm * 8)[1], whole)
