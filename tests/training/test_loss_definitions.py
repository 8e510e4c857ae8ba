"""Each loss is its definition: written once more here on whole logits, values and gradients in fp64 within 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deft.core import registry
from deft.core.errors import InputError
from deft.core.types import Head
from deft.training import loss, objectives

Definition = Callable[..., Tensor]


def picked(logits_KV: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax [K, V], and its logarithm at the targets [K]."""
    p_KV = logits_KV.exp() / logits_KV.exp().sum(1, keepdim=True)
    return p_KV, p_KV[range(len(targets_K)), targets_K].log()


def final(hidden_KH: Tensor, head: Head) -> Tensor:
    """The logits [K, V]."""
    logits_KV = head.scale * (hidden_KH @ head.weight.T + head.bias)
    return logits_KV if head.softcap is None else head.softcap * torch.tanh(logits_KV / head.softcap)


def smoothed(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    p_KV, _ = picked(logits_KV, targets_K)
    size = logits_KV.shape[1]
    meant_KV = torch.full_like(logits_KV, 0.2 / size)
    meant_KV[range(len(targets_K)), targets_K] += 0.8
    return -(meant_KV * p_KV.log()).sum(1)


def near_zero(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    return -picked(logits_KV, targets_K)[1] + 0.01 * logits_KV.exp().sum(1).log() ** 2


def likely(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    log_p_K = picked(logits_KV, targets_K)[1]
    return -log_p_K.exp().detach() * log_p_K


def unsure(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    p_KV, log_p_K = picked(logits_KV, targets_K)
    entropy_K = -(p_KV * p_KV.log()).sum(1).detach()
    return -log_p_K * entropy_K / math.log(logits_KV.shape[1])


def held(logits_KV: Tensor, targets_K: Tensor, start_KV: Tensor) -> Tensor:
    (p_KV, log_p_K), (start_p_KV, _) = picked(logits_KV, targets_K), picked(start_KV, targets_K)
    return -log_p_K + 0.5 * (start_p_KV * (start_p_KV / p_KV).log()).sum(1)


DEFINITIONS: dict[str, tuple[dict[str, float], Definition]] = {
    "nll": ({}, lambda logits_KV, targets_K: -picked(logits_KV, targets_K)[1]),
    "label_smoothing": ({"epsilon": 0.2}, smoothed),
    "z_loss": ({"strength": 0.01}, near_zero),
    "dft": ({}, likely),
    "entropy_weighted": ({}, unsure),
    "kl": ({"beta": 0.5}, held),
}


def test_every_loss_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(registry.names(loss))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_and_gradients(name: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft.training.chunked.CPU_SLICE", 7 * 13)
    monkeypatch.setattr("deft.training.chunked.LEAST_ROWS", 16)
    monkeypatch.setattr("deft.training.chunked.CPU_BLOCK", 16 * 13 * 8)
    options, definition = DEFINITIONS[name]
    draw = torch.Generator().manual_seed(0)
    sizes = ((50, 6), (13, 6), (13,))
    of_start, leaves = ([torch.randn(*size, generator=draw, dtype=torch.float64) for size in sizes] for _ in range(2))
    hidden_KH, weight_VH, bias_V = (leaf.requires_grad_() for leaf in leaves)
    targets_K, weights_K = torch.randint(13, (50,), generator=draw), torch.rand(50, generator=draw).double()
    objective = objectives.load(name, options)
    heads = Head(weight_VH, bias_V, 0.7, softcap), Head(*of_start[1:], 0.7, softcap)
    start = (of_start[0], heads[1]) if objective.uses_start else None
    ours = objective(hidden_KH, heads[0], targets_K, weights_K, start).nll_sum
    logits_KV, start_KV = final(hidden_KH, heads[0]), final(of_start[0], heads[1])
    more = [start_KV] if objective.uses_start else []
    meant = (weights_K * definition(logits_KV, targets_K, *more)).sum()
    whole = objective.from_logits(logits_KV, targets_K, weights_K, *more).nll_sum
    expected = torch.autograd.grad(meant, leaves, retain_graph=True)
    for total in (ours, whole):
        assert abs(total.item() - meant.item()) <= 1e-12 * abs(meant.item())
        for found, right in zip(torch.autograd.grad(total, leaves, retain_graph=total is whole), expected, strict=True):
            assert float((found - right).norm()) <= 1e-12 * float(right.norm())


def test_options_that_are_not_there() -> None:
    with pytest.raises(InputError, match=r"z_loss has no weight; it has strength"):
        objectives.load("z_loss", {"weight": 1.0})
    with pytest.raises(InputError, match=r"dft has no epsilon; it has none"):
        objectives.load("dft", {"epsilon": 1.0})
