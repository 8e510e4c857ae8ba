"""A step is taken whole, with its clipping and its learning rate, or leaves no trace at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import dropout_state, planned

from deft.loader import Work
from deft.loss import nll
from deft.training import badstep
from deft.training.rehearse import rehearse
from deft.training.state import TrainState
from deft.training.step import take


class Stopped(BaseException):
    """What `poll` raises where a run is to end."""


def interrupted(state: TrainState, work: Work) -> None:
    """After one of several micro-batches."""
    polls = iter(range(len(work.batches)))

    def poll() -> None:
        if next(polls) == 1:
            raise Stopped

    with pytest.raises(Stopped):
        take(state, work, nll, clip=1.0, factor=1.0, poll=poll)


def not_finite(state: TrainState, work: Work) -> None:
    """The loss of the last micro-batch is not a number."""
    left = iter(range(len(work.batches), 0, -1))

    def loss(*given: Any) -> torch.Tensor:
        return nll.loss(*given) * (float("nan") if next(left) == 1 else 1.0)

    numbers = take(state, work, SimpleNamespace(loss=loss), clip=1.0, factor=1.0)  # type: ignore[arg-type]
    assert not numbers.are_finite


def rehearsed(state: TrainState, work: Work) -> None:
    rehearse(state, work.batches[0], nll)


def examined(state: TrainState, work: Work) -> None:
    badstep.examine(state.learner, work, nll)


def steps_after(before: Callable[[TrainState, Work], None] | None) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The numbers of two steps with dropout, and the optimizer's state after them."""
    state, plan = dropout_state(), planned()
    torch.manual_seed(7)
    assert len(plan.step(0).batches) > 1
    if before is not None:
        before(state, plan.step(0))
    numbers = [take(state, plan.step(step), nll, clip=1.0, factor=1.0) for step in range(2)]
    return numbers, state.optimizer.state()


@pytest.mark.parametrize("before", [interrupted, not_finite, rehearsed, examined])
def test_what_is_undone_or_only_tried_leaves_no_trace(before: Callable[[TrainState, Work], None]) -> None:
    """Neither a gradient nor a random number: the steps that follow have the same bits."""
    numbers, state = steps_after(before)
    expected, untouched = steps_after(None)
    assert numbers == expected
    assert state.keys() == untouched.keys()
    assert all(torch.equal(each, untouched[name]) for name, each in state.items())


def test_the_comparison_sees_a_random_number() -> None:
    drawn, _ = steps_after(lambda state, work: torch.rand(1))
    assert drawn != steps_after(None)[0]


def change(factor: float) -> torch.Tensor:
    """What a first step moves the weights by, all together."""
    state = dropout_state()
    before = [each.detach().clone() for each in state.learner.model.parameters()]
    torch.manual_seed(7)
    take(state, planned().step(0), nll, clip=None, factor=factor)
    after = state.learner.model.parameters()
    return torch.cat([(now - then).flatten() for now, then in zip(after, before, strict=True)]).detach()


def test_the_factor_multiplies_the_learning_rate() -> None:
    assert torch.allclose(change(0.25), 0.25 * change(1.0), atol=1e-6)
    assert float(change(1.0).abs().max()) > 5e-3


def moments(clip: float | None) -> tuple[float, torch.Tensor]:
    """The gradient's norm as it is told, and the first moments after a first step: a tenth of the gradient."""
    state = dropout_state()
    state.optimizer.betas = (0.9, 0.95)
    torch.manual_seed(7)
    numbers = take(state, planned().step(0), nll, clip=clip, factor=1.0)
    found = state.optimizer.state()
    return numbers.grad_norm, torch.cat([found[name].flatten() for name in found if name.startswith("exp_avg.")])


def test_the_whole_gradient_is_clipped_and_told_as_it_was() -> None:
    norm, whole = moments(None)
    told, clipped = moments(norm / 8)
    assert told == norm
    assert float(whole.norm()) == pytest.approx(0.1 * norm, rel=1e-5)
    assert torch.allclose(clipped, whole / 8, rtol=1e-4, atol=1e-9)
    assert torch.equal(moments(norm * 8)[1], whole)
