"""What training changes is put down whole: weights, moments, buffers, and every generator of random numbers."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from tiny_training import dropout_state, planned

from deft.training import randomness
from deft.training.chunked import NLL
from deft.training.step import optimizer_step


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> tuple[list[float], ...]:
        return [random.random() for _ in range(3)], np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    draw()
    before = randomness.from_json(json.loads(json.dumps(randomness.as_json(randomness.snapshot()))))
    drawn = draw()
    for one, other in zip(drawn, draw(), strict=True):
        assert one != other
    randomness.restore(before)
    assert draw() == drawn


def test_buffers_are_restored_like_weights_and_moments() -> None:
    """As of a model that counts or averages while it is trained."""
    state, plan = dropout_state(), planned()
    state.causal_lm.model.register_buffer("seen", torch.tensor([1.0, 2.0]))
    optimizer_step(state, plan.step(0), NLL, clip=1.0, lr=1e-2)
    saved = state.tensors()
    optimizer_step(state, plan.step(1), NLL, clip=1.0, lr=1e-2)
    state.causal_lm.model.seen.mul_(3.0)
    assert any(not torch.equal(each, saved["model"][name]) for name, each in state.tensors()["model"].items())
    state.restore(saved, 1)
    assert state.step == 1
    now = state.tensors()
    for part, tensors in saved.items():
        assert now[part].keys() == tensors.keys()
        assert all(torch.equal(each, tensors[name]) for name, each in now[part].items()), part
    assert state.causal_lm.model.seen.tolist() == [1.0, 2.0]
