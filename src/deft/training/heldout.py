"""Held-out loss: the same sums as in training, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from deft.encoding.rows import Example
from deft.loader import build
from deft.model.learner import Learner
from deft.plan.packs import pack
from deft.training.step import nll_sum


@torch.no_grad()
def held_out_loss(learner: Learner, examples: Sequence[Example], loss: ModuleType, microbatch_tokens: int) -> float:
    """Nats per unit of weight over all targets of `examples`; dropout is off while it is measured."""
    parts = [part for example in examples for part in example]
    packs = pack([len(part.tokens) for part in parts], microbatch_tokens)
    was_training = learner.model.training
    learner.model.eval()
    total = weight = 0.0
    for indices in packs:
        batch = build([(parts[index].tokens, parts[index].weights) for index in indices])
        total += float(nll_sum(learner, batch, loss))
        weight += float(batch.weights.double().sum())
    learner.model.train(was_training)
    return total / weight
