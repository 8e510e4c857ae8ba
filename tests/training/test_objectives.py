"""Every objective keeps its contract, and what a user's own one raises is named as theirs, forward and backward.

Each module of training/loss/ is held to the contract: a new one is tested without touching this file.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import dropout_state, planned
from torch import Tensor

from deft.core import registry
from deft.core.errors import InputError, UserCodeError
from deft.core.types import Head, Objective
from deft.training import loss, objectives
from deft.training.objectives import OwnObjective
from deft.training.step import optimizer_step


class Failing(torch.autograd.Function):
    """A user's own derivative, which is wrong."""

    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor) -> Tensor:
        return logits_KV.clone()

    @staticmethod
    def backward(ctx: Any, grad_KV: Tensor) -> Tensor:
        raise ZeroDivisionError("a user's mistake")


def own_nll(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    return (weights_K * -logits_KV.log_softmax(1).gather(1, targets_K[:, None])[:, 0]).sum()


def fails_forward(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    raise ZeroDivisionError("a user's mistake")


def fails_backward(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    return own_nll(Failing.apply(logits_KV), targets_K, weights_K)


OBJECTIVES = {name: objectives.load(name) for name in registry.names(loss)} | {
    "a user's own": OwnObjective("my:loss", own_nll)
}


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]


def leaf(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()


def from_hidden(objective: Objective, weights_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and the gradients of the hidden states [5, 4] and of the head's weight [11, 4]."""
    hidden_KH, weight_VH = leaf(5, 4, seed=1), leaf(11, 4, seed=2)
    start = (leaf(5, 4, seed=3).detach(), Head(leaf(11, 4, seed=4).detach(), softcap=3.0))
    more = [start] if objective.uses_start else []
    tally = objective(hidden_KH, Head(weight_VH, softcap=3.0), torch.arange(5), weights_K, *more)
    assert float(tally.weight_sum) == pytest.approx(float(weights_K.sum()))
    return tally.nll_sum, *torch.autograd.grad(tally.nll_sum, (hidden_KH, weight_VH))


WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0], dtype=torch.float64)


def test_it_is_linear_in_the_weights(objective: Objective) -> None:
    other = WEIGHTS.flip(0)
    once, again, mixed = (from_hidden(objective, each) for each in (WEIGHTS, other, 2 * WEIGHTS + 3 * other))
    for one, two, both in zip(once, again, mixed, strict=True):
        assert torch.allclose(2 * one + 3 * two, both)


def test_a_weight_of_zero_has_no_gradient(objective: Objective) -> None:
    weights_K = WEIGHTS * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    _, d_hidden_KH, _ = from_hidden(objective, weights_K)
    assert (d_hidden_KH.abs().sum(1) > 0).tolist() == [True, False, True, True, False]
    total, d_hidden_KH, d_weight_VH = from_hidden(objective, 0 * WEIGHTS)
    assert not any(each.any() for each in (total, d_hidden_KH, d_weight_VH))


def test_from_hidden_states_is_from_logits(objective: Objective) -> None:
    total, d_hidden_KH, d_weight_VH = from_hidden(objective, WEIGHTS)
    hidden_KH, weight_VH = leaf(5, 4, seed=1), leaf(11, 4, seed=2)
    logits_KV = 3.0 * torch.tanh(hidden_KH @ weight_VH.T / 3.0)
    start_KV = 3.0 * torch.tanh(leaf(5, 4, seed=3) @ leaf(11, 4, seed=4).T / 3.0).detach()
    more = [start_KV] if objective.uses_start else []
    tally = objective.from_logits(logits_KV, torch.arange(5), WEIGHTS, *more)
    expected = tally.nll_sum, *torch.autograd.grad(tally.nll_sum, (hidden_KH, weight_VH))
    for mine, theirs in zip((total, d_hidden_KH, d_weight_VH), expected, strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("function", [fails_forward, fails_backward])
def test_what_a_users_loss_raises_is_named_as_theirs(function: Any) -> None:
    """With the line at fault and none of torch's or ours; the step changes nothing."""
    state, step_batch = dropout_state(), planned().step(0)
    before = {name: each.clone() for name, each in state.masters.state().items()}
    with pytest.raises(UserCodeError, match=r"my:loss raised ZeroDivisionError: a user's mistake") as raised:
        optimizer_step(state, step_batch, OwnObjective("my:loss", function), lr=1e-2, clip=1.0)
    assert raised.value.exit_code == 2
    assert raised.value.brief.endswith(")")
    assert next(line for line in str(raised.value).splitlines() if line.startswith("  File")).count(__file__) == 1
    assert "torch" not in raised.value.brief
    assert "torch/autograd" not in str(raised.value)
    assert all(torch.equal(each, before[name]) for name, each in state.masters.state().items())
    assert all(each.grad is None for each in state.masters.parameters.values())


def test_other_tensors_that_a_users_loss_is_computed_from_get_their_gradient() -> None:
    temperature = torch.ones((), requires_grad=True)

    def tempered(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        return own_nll(logits_KV / temperature, targets_K, weights_K)

    tally = OwnObjective("my:loss", tempered).from_logits(leaf(5, 11, seed=1), torch.arange(5), WEIGHTS)
    tally.nll_sum.backward()
    assert temperature.grad is not None
    assert temperature.grad != 0


def test_a_users_loss_has_the_gradient_of_its_own_graph_to_the_bit() -> None:
    mine, theirs = leaf(5, 11, seed=1), leaf(5, 11, seed=1)
    (0.5 * OwnObjective("my:loss", own_nll).from_logits(mine, torch.arange(5), WEIGHTS).nll_sum).backward()
    (0.5 * own_nll(theirs, torch.arange(5), WEIGHTS)).backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_users_loss_may_change_its_logits_in_place() -> None:
    def tempered(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        return own_nll(logits_KV.div_(2.0), targets_K, weights_K)

    mine, theirs = leaf(5, 11, seed=1), leaf(5, 11, seed=1)
    OwnObjective("my:loss", tempered).from_logits(1.0 * mine, torch.arange(5), WEIGHTS).nll_sum.backward()
    tempered(1.0 * theirs, torch.arange(5), WEIGHTS).backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_nothing_is_kept_of_a_users_loss_once_its_gradient_is_known() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(each) is Tensor and each.shape == (5, 13) for each in gc.get_objects())

    logits_KV = leaf(5, 13, seed=1)
    before = alive()
    tally = OwnObjective("my:loss", own_nll).from_logits(logits_KV, torch.arange(5), WEIGHTS)
    assert alive() > before
    tally.nll_sum.backward()
    assert alive() == before


LOSSES_BY_A_USER = """
import torch
from torch.nn import functional

def total(logits_KV, targets_K, weights_K):
    return (weights_K * functional.cross_entropy(logits_KV, targets_K, reduction="none")).sum()

def mean(logits_KV, targets_K, weights_K):
    return functional.cross_entropy(logits_KV, targets_K)

def weighted_mean(logits_KV, targets_K, weights_K):
    return total(logits_KV, targets_K, weights_K) / weights_K.sum()
"""


@pytest.mark.parametrize("function", ["mean", "weighted_mean"])
def test_a_mean_is_no_loss(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make each micro-batch count alike, so that memory settings would change the result."""
    (tmp_path / "user_losses.py").write_text(LOSSES_BY_A_USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(objectives.load("user_losses:total"), OwnObjective)
    with pytest.raises(InputError, match=rf"user_losses:{function} is not linear in weights_K"):
        objectives.load(f"user_losses:{function}")
