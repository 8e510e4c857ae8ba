"""Several ranks as a step sees them: its share of the micro-batches, one sum, one decision to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from packed_llama import micro_batches, model
from states import state_around

from deft.core.types import StepBatch
from deft.distributed.world import World
from deft.model.causal_lm import CausalLM
from deft.training import chunked, loop
from deft.training.state import TrainState
from deft.training.step import optimizer_step


@dataclass
class Ranks:
    """Stands in for `World`: what the other ranks add to each sum."""

    rank: int = 0
    size: int = 1
    others: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sums: list[torch.Tensor] = field(default_factory=list)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.sums.append(values.clone())
        return values + torch.tensor(self.others, dtype=values.dtype)


def state_in(world: Any) -> TrainState:
    state = state_around(CausalLM(model(), "packed"))
    state.world = world
    return state


def step_batch(step: int = 0) -> StepBatch:
    batches = tuple(micro_batches())
    return StepBatch(step, 0, batches, float(sum(len(batch.targets) for batch in batches)), 1, 1, ((),) * len(batches))


def test_a_step_makes_one_reduction_of_loss_norm_and_the_wish_to_stop() -> None:
    alone, together = Ranks(), Ranks(others=(0.5, 9.0, 1.0))
    own = optimizer_step(state_in(alone), step_batch(), chunked.NLL, lr=1e-3, clip=1.0)
    all_ranks = optimizer_step(state_in(together), step_batch(), chunked.NLL, lr=1e-3, clip=1.0)
    assert (len(alone.sums), len(together.sums)) == (1, 1)
    assert all_ranks.loss == pytest.approx(own.loss + 0.5)
    assert all_ranks.grad_norm == pytest.approx((own.grad_norm**2 + 9.0) ** 0.5)
    assert (own.stops, all_ranks.stops) == (False, True)


def test_the_sum_of_all_ranks_clips_the_gradient() -> None:
    plain, clipped = (state_in(Ranks(others=(0.0, each, 0.0))) for each in (0.0, 1e12))
    before = {name: weight.clone() for name, weight in plain.masters.items()}
    for state in (plain, clipped):
        state.optimizer.eps = 1.0  # type: ignore[attr-defined]
        optimizer_step(state, step_batch(), chunked.NLL, lr=1.0, clip=1.0)
    moved = [sum(float((state.masters[name] - before[name]).norm()) for name in before) for state in (plain, clipped)]
    assert moved[1] < 1e-3 * moved[0]


def test_ranks_share_a_step() -> None:
    whole, *shares = (Ranks(rank, size) for rank, size in ((0, 1), (0, 3), (1, 3), (2, 3)))
    for world in (whole, *shares):
        optimizer_step(state_in(world), step_batch(), chunked.NLL, lr=0.0, clip=None)
    losses = [float(world.sums[0][0]) for world in shares]
    assert sum(losses) == pytest.approx(float(whole.sums[0][0]), rel=1e-6)
    assert all(loss > 0 for loss in losses)


def test_the_loop_ends_after_the_step_at_whose_end_any_rank_wanted_to_stop() -> None:
    class Plan:
        def step_batches(self, start: int) -> Any:
            yield from map(step_batch, range(start, 5))

    def steps(world: Ranks, own: bool) -> list[int]:
        plan: Any = Plan()
        records = loop.train(
            state_in(world), plan, chunked.NLL, clip=None, lr=lambda step: 1e-3, wants_to_stop=lambda: own
        )
        return [record.step for record in records]

    assert steps(Ranks(), own=False) == [1, 2, 3, 4, 5]
    assert steps(Ranks(), own=True) == [1]
    assert steps(Ranks(others=(0.0, 0.0, 1.0)), own=False) == [1]


def test_a_world_of_one_shares_nothing_and_more_ranks_are_refused() -> None:
    numbers = torch.tensor([1.0, 2.0])
    assert World().sum(numbers) is numbers
    with pytest.raises(NotImplementedError):
        World(0, 2)
