"""Held-out loss: the same sums as in training, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from deft.encoding.rows import Example
from deft.loader import build
from deft.model.learner import Learner
from deft.plan.packs import pack
from deft.training.step import nll_sum
from deft.types import Batch

TOGETHER = 1000
"""So many examples are packed together."""


@torch.no_grad()
def held_out_loss(learner: Learner, examples: Sequence[Example], loss: ModuleType, microbatch_tokens: int) -> float:
    """Nats per unit of weight over all targets of `examples`; dropout is off while it is measured."""
    was_training = learner.model.training
    learner.model.eval()
    total = weight = 0.0
    for batch in _batches(examples, microbatch_tokens):
        total += float(nll_sum(learner, batch, loss))
        weight += float(batch.weights.double().sum())
    learner.model.train(was_training)
    return total / weight


def _batches(examples: Sequence[Example], microbatch_tokens: int) -> Iterator[Batch]:
    """Micro-batches of `TOGETHER` examples at a time, so that no more are held."""
    for start in range(0, len(examples), TOGETHER):
        parts = [part for example in examples[start : start + TOGETHER] for part in example]
        for indices in pack([len(part.tokens) for part in parts], microbatch_tokens):
            yield build([(parts[index].tokens, parts[index].weights) for index in indices])
