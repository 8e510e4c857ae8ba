"""The model that a run began with, for losses that hold the trained one to it: what is frozen is not kept twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import differences, folder, settings
from rich.console import Console
from tiny_training import dropout_model, planned
from torch import Tensor

from deft.core.types import MicroBatch
from deft.model import adapters, selftest
from deft.model.causal_lm import CausalLM
from deft.model.config import AdapterConfig
from deft.run import config
from deft.run.reading import Session
from deft.run.train import train
from deft.training import objectives
from deft.training.badstep import documents
from deft.training.chunked import NLL

__all__ = ["folder"]
KL = objectives.load("kl", {"beta": 0.5})


def begun(mode: Any = "packed") -> CausalLM:
    causal_lm = dropout_model()
    causal_lm.model.eval()
    causal_lm.mode = mode
    causal_lm.keep_start()
    return causal_lm


def gradients(causal_lm: CausalLM, objective: Any, *batches: MicroBatch) -> tuple[float, list[Tensor]]:
    causal_lm.model.zero_grad()
    total = sum(causal_lm(batch, objective).nll_sum for batch in batches)
    assert isinstance(total, Tensor)
    total.backward()
    return total.item(), [each.grad.clone() for each in causal_lm.model.parameters() if each.grad is not None]


def move(causal_lm: CausalLM) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in causal_lm.model.parameters():
            each += 0.1 * torch.randn(each.shape, generator=draw) if each.requires_grad else 0.0


def batch() -> MicroBatch:
    return max(planned().step(0).micro_batches, key=lambda each: len(each.documents))


@pytest.mark.parametrize("mode", ["packed", "alone", "whole"])
def test_at_first_it_is_the_negative_log_likelihood(mode: str) -> None:
    causal_lm = begun(mode)
    (kl, of_kl), (nll, of_nll) = (gradients(causal_lm, each, batch()) for each in (KL, NLL))
    assert kl == pytest.approx(nll, rel=1e-6)
    assert all(torch.allclose(one, two, atol=2e-5) for one, two in zip(of_kl, of_nll, strict=True))
    move(causal_lm)
    assert gradients(causal_lm, KL, batch())[0] > 1.05 * gradients(causal_lm, NLL, batch())[0]


def test_packed_documents_are_as_alone_and_as_the_definition() -> None:
    causal_lm, packed = begun(), batch()
    move(causal_lm)
    assert len(packed.documents) > 1
    (total, mine), (parts, theirs) = (gradients(causal_lm, KL, *batches) for batches in ([packed], documents(packed)))
    assert total == pytest.approx(parts, rel=1e-5)
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-4) for one, two in zip(mine, theirs, strict=True))
    meant = torch.zeros(())
    assert causal_lm.start is not None
    for each in documents(packed):
        new, old = (
            model(each.tokens[None]).logits[0, each.rows].log_softmax(1)
            for model in (causal_lm.model, causal_lm.start.model)
        )
        kl_K = (old.exp() * (old - new)).sum(1)
        meant += (each.weights * (0.5 * kl_K - new[range(len(each.rows)), each.targets])).sum().detach()
    assert total == pytest.approx(meant.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_of_an_adapted_model_the_adapters_alone_are_kept_twice(name: Any) -> None:
    """Also where the run goes on from one that has learnt something."""
    model: Any = dropout_model().model
    adapters.attach(model, AdapterConfig(name=name, r=2))
    for layer in adapters.layers(model).values():
        torch.nn.init.normal_(layer.lora_B[adapters.NAME].weight, std=0.3)
    causal_lm = selftest.choose(model)
    causal_lm.keep_start()
    assert causal_lm.start is not None
    both = zip(model.named_parameters(), causal_lm.start.model.parameters(), strict=True)
    assert {name for (name, mine), theirs in both if mine is not theirs} == {
        name for name, each in model.named_parameters() if each.requires_grad
    }
    model.eval()
    nll = gradients(causal_lm, NLL, batch())[0]
    assert gradients(causal_lm, KL, batch())[0] == pytest.approx(nll, rel=1e-6)
    move(causal_lm)
    assert gradients(causal_lm, KL, batch())[0] > 1.01 * gradients(causal_lm, NLL, batch())[0]


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 2}])
def test_a_resumed_run_is_held_to_the_same_start(folder: Path, adapter: Any) -> None:
    more = {"loss": {"name": "kl", "options": {"beta": 1.0}}, "adapter": adapter, "epochs": 1, "neftune": 5.0}
    for name in ("whole", "cut"):
        train(config.make(settings(folder, name, **more)))
    for part in ("final", "checkpoints/step-000005"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    train(config.make(settings(folder, "cut", **more)), Session(console=Console(file=(told := io.StringIO()))))
    assert "resumed step 4" in told.getvalue()
    assert differences(folder, "whole", "cut") == []
