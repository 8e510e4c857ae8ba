"""Held-out loss: one sum over one weight, without dropout, whatever the micro-batches."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from tiny_training import dropout_model, random_examples
from torch.nn import functional

from deft.encoding.rows import Example
from deft.evaluation import heldout
from deft.evaluation.heldout import held_out_loss
from deft.model.causal_lm import CausalLM
from deft.plan.packs import pack

LENGTHS = (60, 3, 3, 30, 4, 2, 5)


def sums(causal_lm: CausalLM, examples: list[Example]) -> list[tuple[float, float]]:
    """Of each text the weighted sum of its losses and the sum of its weights, by transformers alone, in fp64."""
    found = []
    causal_lm.model.eval()
    for part in chain.from_iterable(examples):
        tokens, weights = torch.from_numpy(part.tokens).long(), torch.from_numpy(part.weights).double()[1:]
        with torch.no_grad():
            logits = causal_lm.model(input_ids=tokens[None]).logits[0, :-1].double()
        losses = functional.cross_entropy(logits, tokens[1:], reduction="none")
        found.append((float((weights * losses).sum()), float(weights.sum())))
    causal_lm.model.train()
    return found


@pytest.mark.parametrize("together", [3, 1000])
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_it_is_the_mean_over_all_weights(budget: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "TOGETHER", together)
    causal_lm, examples = dropout_model(), random_examples(LENGTHS)
    parts = sums(causal_lm, examples)
    expected = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    assert held_out_loss(causal_lm, examples, budget) == pytest.approx(expected, rel=1e-5)


def test_means_of_micro_batches_or_of_examples_would_be_seen() -> None:
    """Their means are far from the one that is asked for."""
    parts = sums(dropout_model(), random_examples(LENGTHS))
    expected = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    packs = pack(LENGTHS, 40)
    assert len(packs) > 1
    of_packs = [[sum(parts[index][k] for index in members) for k in (0, 1)] for members in packs]
    for means in (parts, of_packs):
        assert sum(total / weight for total, weight in means) / len(means) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_it_is_measured_and_then_as_it_was(training: bool) -> None:
    causal_lm, examples = dropout_model(), random_examples(LENGTHS)
    causal_lm.model.train(training)
    before = torch.get_rng_state()
    found = [held_out_loss(causal_lm, examples, 40) for _ in range(2)]
    assert found[0] == found[1]
    assert causal_lm.model.training == training
    assert torch.equal(torch.get_rng_state(), before)
