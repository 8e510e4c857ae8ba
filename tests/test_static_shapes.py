"""Law 6 for what fills micro-batches up to one shape, and layers that are compiled for it once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from deft.loader import build
from deft.loss import nll
from deft.model import attention, faster
from deft.model.learner import Learner
from deft.model.static import Room, compile_layers, fill
from deft.training.step import nll_sum
from deft.types import Batch

LENGTHS = [[40, 25], [33, 20, 9], [65], [30, 10, 20, 5], [1 + 12, 50]]


def micro_batches() -> list[Batch]:
    draw = np.random.default_rng(0)
    return [
        build([(draw.integers(0, 300, length), (np.arange(length) > 3).astype(np.float32)) for length in lengths])
        for lengths in LENGTHS
    ]


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train()


def gradients(learner: Learner, batch: Batch) -> dict[str, torch.Tensor]:
    learner.model.zero_grad()
    total = nll_sum(learner, batch, nll)
    total.backward()
    found = {name: weight.grad.clone() for name, weight in learner.model.named_parameters() if weight.grad is not None}
    return {"loss": total.detach(), **found}


@pytest.mark.parametrize("has_blocks", [False, True])
def test_what_fills_up_changes_neither_sums_nor_gradients(has_blocks: bool) -> None:
    own = model()
    if has_blocks:
        assert faster.install(own) == 2
    learner, batches = Learner(own, "packed"), micro_batches()
    room = Room.for_all(batches)
    for batch in batches:
        filled = fill(batch, room)
        assert (len(filled.tokens), len(filled.documents)) == (room.tokens, room.documents)
        expected = gradients(learner, batch)
        for name, gradient in gradients(learner, filled).items():
            assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_layers_are_compiled_once() -> None:
    own, batches = model(), micro_batches()
    learner = Learner(own, "packed")
    room = Room.for_all(batches)
    expected = [gradients(learner, batch)["loss"] for batch in batches]
    assert compile_layers(own, backend="eager") == 2
    compiled = []
    for batch, loss in zip(batches, expected, strict=True):
        assert gradients(learner, fill(batch, room))["loss"] == pytest.approx(float(loss), rel=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert set(compiled[1:]) == {compiled[0]}, compiled
