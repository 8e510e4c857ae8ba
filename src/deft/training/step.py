"""One optimizer step: the gradient of the mean over everything in it, summed over ranks in order, one update.

Micro-batch i is computed by rank i mod N in round i div N; a rank without one in the last round adds nothing. Where the
model is sharded it computes a token that weighs nothing, as the others need it to gather their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deft.core.errors import NumbersError
from deft.core.types import MicroBatch, Objective, StepBatch
from deft.distributed.sums import OrderedSums
from deft.model.causal_lm import CausalLM
from deft.model.compiled_layers import smallest
from deft.training import randomness
from deft.training.masters import clip_scale
from deft.training.state import TrainState

IDLE = replace(smallest(), weights=torch.zeros(1))
"""What a rank without a micro-batch computes where the model is sharded."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """loss is nats per unit of weight; grad_norm the global norm before clipping; stops whether any rank wants to.

    suspects  micro-batches whose loss was not finite
    """

    loss: float
    grad_norm: float
    stops: bool = False
    suspects: tuple[int, ...] = ()

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
        numbers = _accumulate(state, step_batch, objective, poll, wants_to_stop)
        state.world.at(step_batch.step + 1)
    except BaseException:
        _undo(state, before)
        raise
    state.suspects = numbers.suspects
    if numbers.are_finite:
        state.update(lr, clip_scale(torch.tensor(numbers.grad_norm), clip))
    else:
        _undo(state, before)
    return numbers


def _accumulate(
    state: TrainState,
    step_batch: StepBatch,
    objective: Objective,
    poll: Callable[[], None],
    wants_to_stop: Callable[[], bool],
) -> StepNumbers:
    """The step's numbers; its gradient is with the masters, of sharded ones that of their rows."""
    # The device runs ahead of Python until the one read at the end. MPS has no fp64.
    home = torch.device("cpu") if state.causal_lm.device.type == "mps" else state.causal_lm.device
    world, shards, batches = state.world, state.shards, step_batch.micro_batches
    losses = torch.zeros(len(batches), dtype=torch.float64, device=home)
    sums = OrderedSums(world, state.masters.parameters)
    for first in range(0, len(batches), world.size):
        index = first + world.rank
        world.at(step_batch.step + 1, first // world.size, *step_batch.origins[index : index + 1])
        poll()
        state.masters.collect()
        ranks = len(batches) - first
        if shards is not None:
            shards.begin(ranks, ranks <= world.size)
        if index < len(batches):
            losses[index] = _backward(state, batches[index], step_batch.normalizer, objective)
        elif shards is not None:
            _backward(state, IDLE, step_batch.normalizer, objective)
        if shards is None and world.size > 1:
            sums.add(state.masters.take_gradients(), ranks)
    if world.size > 1:
        state.masters.put_gradients(sums.take() if shards is None else shards.take())
    squares, stops = losses.new_zeros(world.size), losses.new_full((1,), float(wants_to_stop()))
    squares[world.rank] = state.masters.squared_norm().to(home, torch.float64)
    return _read(world.sum(torch.cat([squares, stops, losses])), world.size, shards.layout.shard if shards else 1)


def _backward(state: TrainState, micro_batch: MicroBatch, normalizer: float, objective: Objective) -> Tensor:
    """The share of a micro-batch in the step's loss; its gradient is with the parameters.

    With several ranks what is drawn for it does not depend on which one computes it, nor on what that drew before.
    """
    if state.world.size > 1 and micro_batch.seeds:
        torch.manual_seed(micro_batch.seeds[0])
    mean = mean_share(state.causal_lm, micro_batch, normalizer, objective)
    mean.backward()
    return mean.detach()


def _read(numbers: Tensor, ranks: int, shard: int) -> StepNumbers:
    """The one wait for the device in a step: squares of each rank's rows, who wants to stop, each micro-batch's loss.

    Raises NumbersError where copies of the model have not computed the same norm from the same sums.
    """
    found = numbers.tolist()
    squares, stops, losses = found[:ranks], found[ranks], found[ranks + 1 :]
    norms = [_root(squares[first : first + shard]) for first in range(0, ranks, shard)]
    if odd := [copy for copy, norm in enumerate(norms) if norm != norms[0] and norm == norm]:
        what = f"rank {odd[0] * shard} has {norms[odd[0]]} where rank 0 has {norms[0]}, of the same gradient"
        raise NumbersError(f"{what}: are their processors or libraries not the same, or is one of them broken?")
    total = 0.0
    for loss in losses:
        total += loss
    return StepNumbers(total, norms[0], stops > 0, tuple(i for i, loss in enumerate(losses) if not math.isfinite(loss)))


def _root(squares: Sequence[float]) -> float:
    """The norm from the squares of its parts, rounded to fp32."""
    return float(torch.tensor(squares, dtype=torch.float64).sum().sqrt().float())


def _undo(state: TrainState, before: dict[str, Any]) -> None:
    state.drop_gradients()
    randomness.restore(before)


def dry_run_step(state: TrainState, micro_batch: MicroBatch, objective: Objective) -> None:
    """One forward and backward without an update, to see what fits: no gradient and no random number is left of it."""
    with randomness.preserved():
        try:
            if state.shards is not None:
                state.shards.begin(state.world.size)
            state.causal_lm(micro_batch, objective).nll_sum.backward()
        finally:
            state.drop_gradients()


def mean_share(causal_lm: CausalLM, micro_batch: MicroBatch, normalizer: float, objective: Objective) -> Tensor:
    """What a micro-batch adds to the loss of its step: a scalar with its graph; NaN where the normalizer is 0.

    The normalizer is in the weights, so that no gradient has to be divided, and rounded, once more.
    """
    scaled = replace(micro_batch, weights=micro_batch.weights / normalizer)
    total = causal_lm(scaled, objective).nll_sum
    return total if normalizer > 0.0 else total * math.nan
