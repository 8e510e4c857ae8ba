"""A step waits for its device once: it runs on tensors without values here, where whoever asks for one is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_static_shapes import micro_batches, model
from torch import Tensor, nn

from deft.loader import Work
from deft.loss import nll
from deft.model import attention
from deft.model.learner import Learner
from deft.model.static import Compiled
from deft.optim import adamw as optimizer
from deft.optim.adamw import AdamW
from deft.training import step
from deft.training.state import TrainState
from deft.training.step import StepNumbers


def varlen_attn(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
    """What the kernel on CUDA gives, as far as shapes go."""
    assert edges.device == query.device
    groups = query.shape[1] // key.shape[1]
    return query * scale + (key + value).repeat_interleave(groups, dim=1)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> TrainState:
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_fits_varlen", lambda *_: True)
    fused = optimizer.adamw
    monkeypatch.setattr(optimizer, "adamw", lambda *each, **settings: fused(*each, **settings | {"fused": True}))
    own = model().to("meta", torch.bfloat16)
    return TrainState(Learner(own, "packed"), AdamW(own.named_parameters(), dtype=torch.bfloat16, lr=1.0))


def work() -> Work:
    return Work(0, 0, tuple(micro_batches()), 100.0, 1, 1, ())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Stands in for the one read."""
    found: list[tuple[Tensor, ...]] = []

    def read(*values: Tensor) -> StepNumbers:
        found.append(values)
        return StepNumbers(1.0, 1.0)

    monkeypatch.setattr(step, "_read", read)
    return found


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_step_reads_its_loss_and_norm_together_and_nothing_else(
    state: TrainState, reads: list[tuple[Tensor, ...]], is_filled: bool
) -> None:
    learner = state.learner
    if is_filled:
        own: dict[nn.Module, Any] = {layer: layer.forward for layer in learner.model.base_model.layers}
        state.learner = Learner(learner.model, "packed", compiled=Compiled(own, (64, 72)))
    for _ in range(2):
        step.take(state, work(), nll, clip=1.0, factor=1.0)
    assert state.step == 2
    assert [[(each.device.type, each.dtype) for each in values] for values in reads] == [
        [("meta", torch.float64)] * 2
    ] * 2


def test_without_it_the_read_is_found(state: TrainState) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step.take(state, work(), nll, clip=1.0, factor=1.0)
