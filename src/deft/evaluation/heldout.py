"""Held-out loss: the negative log-likelihood, whatever is minimised, so that runs compare; without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deft.core.types import MicroBatch
from deft.encoding.rows import Example
from deft.model.causal_lm import CausalLM, evaluating
from deft.plan.loader import build
from deft.plan.packs import pack
from deft.training.chunked import NLL

TOGETHER = 1000
"""How many examples are packed together."""


@torch.no_grad()
def held_out_loss(causal_lm: CausalLM, examples: Sequence[Example], microbatch_tokens: int) -> float:
    """Nats per unit of weight over all targets of `examples`; dropout is off while it is measured."""
    total = weight = 0.0
    with evaluating(causal_lm.model):
        for batch in _batches(examples, microbatch_tokens):
            tally = causal_lm(batch, NLL)
            total += float(tally.nll_sum)
            weight += float(tally.weight_sum)
    return total / weight


def _batches(examples: Sequence[Example], microbatch_tokens: int) -> Iterator[MicroBatch]:
    """Micro-batches of `TOGETHER` examples at a time, so that no more are held."""
    for start in range(0, len(examples), TOGETHER):
        parts = [part for example in examples[start : start + TOGETHER] for part in example]
        for indices in pack([len(part.tokens) for part in parts], microbatch_tokens):
            yield build([(parts[index].tokens, parts[index].weights) for index in indices])
