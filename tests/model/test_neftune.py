"""Noise on embeddings: the paper's, of each document by itself, the same in every way through a model; in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_training import dropout_model, planned, random_examples
from torch import Tensor

from deft.core.types import StepBatch
from deft.evaluation.heldout import held_out_loss
from deft.model import fused_layers
from deft.model.causal_lm import CausalLM
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import badstep
from deft.training.chunked import NLL

ALPHA = 50.0


def noisy(way: str = "fused") -> CausalLM:
    causal_lm = dropout_model()
    causal_lm.model.eval()
    causal_lm.noise = ALPHA
    mode: Any = "packed" if way in ("fused", "own layers") else way
    causal_lm.mode = mode
    if way == "own layers":
        fused_layers.remove(causal_lm.model)
    return causal_lm


def step(microbatch_tokens: int, seed: int = 0, number: int = 0) -> StepBatch:
    examples = random_examples((40, 9, 30, 12, 25, 17, 12, 8))
    batching = Batching(examples=4)
    made = loader.make(examples, batching, epochs=1, seed=seed, microbatch_tokens=microbatch_tokens)
    return made.step(number)


def gradients(causal_lm: CausalLM, step_batch: StepBatch) -> list[Tensor]:
    causal_lm.model.zero_grad()
    totals = [causal_lm(batch, NLL).nll_sum for batch in step_batch.micro_batches]
    torch.stack(totals).sum().backward()
    return [torch.stack(totals).sum().detach(), *(each.grad.clone() for each in causal_lm.model.parameters())]


def by_definition(causal_lm: CausalLM, step_batch: StepBatch) -> Tensor:
    """The loss by transformers' own forward, each document alone."""
    model, losses = causal_lm.model, []
    embedding = model.get_input_embeddings()
    for batch in (each for packed in step_batch.micro_batches for each in badstep.documents(packed)):
        embedded_TH = embedding(batch.tokens)
        limit = ALPHA / math.sqrt(embedded_TH.numel())
        draw = torch.Generator().manual_seed(batch.seeds[0])
        noise_TH = (2.0 * torch.rand(embedded_TH.shape, generator=draw) - 1.0) * limit
        logits = model(inputs_embeds=(embedded_TH + noise_TH)[None]).logits[0, batch.rows]
        losses.append(batch.weights @ torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("way", ["fused", "own layers", "alone", "whole"])
def test_it_is_that_of_the_paper(way: str) -> None:
    causal_lm, batches = noisy(way), step(10**6)
    total, *found = gradients(causal_lm, batches)
    plain = dropout_model()
    plain.model.eval()
    meant = by_definition(plain, batches)
    expected = torch.autograd.grad(meant, [*plain.model.parameters()])
    assert total.item() == pytest.approx(meant.item(), rel=1e-5)
    assert all(float((a - b).norm()) <= 1e-4 * float(b.norm()) for a, b in zip(found, expected, strict=True))
    causal_lm.noise = 0.0
    assert abs(gradients(causal_lm, batches)[0].item() / total.item() - 1.0) > 1e-3


def test_how_a_step_is_cut_does_not_matter() -> None:
    (one, *ones), (two, *twos) = (gradients(noisy(), step(budget)) for budget in (45, 10**6))
    assert len(step(45).micro_batches) > len(step(10**6).micro_batches)
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    assert all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in zip(ones, twos, strict=True))


def test_every_document_of_every_step_has_its_own() -> None:
    batches = [step(45), step(45, number=1), step(45, seed=1)]
    seeds = [seed for each in batches for batch in each.micro_batches for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds) == 12


def test_evaluation_and_steps_without_it_have_none() -> None:
    examples, causal_lm = random_examples((40, 9)), noisy()
    with_noise = held_out_loss(causal_lm, examples, 100)
    causal_lm.noise = 0.0
    assert held_out_loss(causal_lm, examples, 100) == with_noise
    assert planned().step(0).micro_batches[0].seeds
