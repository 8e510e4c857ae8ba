"""A step waits for its device once: it runs on tensors without values here, where whoever asks for one is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_llama import micro_batches, model
from states import state_around
from torch import Tensor, nn

from deft.core.types import StepBatch
from deft.model import attention
from deft.model.causal_lm import CausalLM
from deft.model.compiled_layers import CompiledLayers
from deft.training import chunked, step
from deft.training.optim import adamw as optimizer
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
    return state_around(CausalLM(own, "packed"), torch.bfloat16)


def work() -> StepBatch:
    return StepBatch(0, 0, tuple(micro_batches()), 100.0, 1, 1, ())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Stands in for the one read."""
    found: list[Tensor] = []

    def read(numbers: Tensor, ranks: int, shard: int) -> StepNumbers:
        found.append(numbers)
        return StepNumbers(1.0, 1.0)

    monkeypatch.setattr(step, "_read", read)
    return found


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_step_reads_its_loss_and_norm_together_and_nothing_else(
    state: TrainState, reads: list[Tensor], is_filled: bool
) -> None:
    causal_lm = state.causal_lm
    if is_filled:
        own: dict[nn.Module, Any] = {layer: layer.forward for layer in causal_lm.model.base_model.layers}
        causal_lm.compiled = CompiledLayers(own, (64, 72))
    for _ in range(2):
        step.optimizer_step(state, work(), chunked.NLL, clip=1.0, lr=1e-5)
    assert state.step == 2
    assert [(each.device.type, each.dtype, each.shape) for each in reads] == [
        ("meta", torch.float64, (2 + len(micro_batches()),))
    ] * 2


def test_without_it_the_read_is_found(state: TrainState) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step.optimizer_step(state, work(), chunked.NLL, clip=1.0, lr=1e-5)
