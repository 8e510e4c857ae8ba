"""`loss.name` -> the objective: that of a module in the folder `loss`, or a user's own function of the logits.

Shape suffixes: K targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deft.core import registry
from deft.core.errors import InputError, user_code
from deft.core.types import Head, Objective, Tally
from deft.training import loss

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def load(name: str, options: Mapping[str, float] | None = None) -> Objective:
    """The objective of that name, made with its options.

    Raises InputError for a name or an option that is not there, and for a user's function that is not linear in its
    weights.

    >>> load("label_smoothing", {"eps": 0.1})
    Traceback (most recent call last):
    deft.core.errors.InputError: loss.options: label_smoothing has no eps; it has epsilon
    """
    options = options or {}
    if registry.is_own(name):
        if options:
            raise InputError(f"loss.options: {name} is your own function and takes none; give it defaults")
        own = OwnObjective(name, registry.own(name, "loss.name"))
        _check_linear(own)
        return own
    make = registry.load(loss, name, "loss.name").make
    known = signature(make).parameters
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"loss.options: {name} has no {option}; {there}")
    found: Objective = make(**options)
    return found


@dataclass(frozen=True, slots=True)
class OwnObjective:
    """A user's function (logits_KV, targets_K, weights_K) -> scalar, as an objective.

    The scalar is a sum over the targets, linear in weights_K; means and normalizers are in the weights. logits_KV are
    final, in fp32 (fp64 where the model is), and whole: unlike deft's own loss, this one needs memory for all of them.

    What the function raises, or its backward pass, is a UserCodeError.

    >>> own = OwnObjective(
    ...     "my:loss", lambda logits_KV, targets_K, weights_K: (weights_K * logits_KV.logsumexp(1)).sum()
    ... )
    >>> tally = own(torch.zeros(2, 3), Head(torch.ones(1, 3)), torch.tensor([0, 0]), torch.tensor([1.0, 0.5]))
    >>> float(tally.nll_sum), float(tally.weight_sum)
    (0.0, 1.5)
    """

    name: str
    function: Function
    uses_start: ClassVar[bool] = False

    def __call__(
        self,
        hidden_KH: Tensor,
        head: Head,
        targets_K: Tensor,
        weights_K: Tensor,
        start: tuple[Tensor, Head] | None = None,
    ) -> Tally:
        """From hidden states, through the head."""
        bias = None if head.bias is None else head.bias.to(hidden_KH.dtype)
        logits_KV = head.scale * _wide(functional.linear(hidden_KH, head.weight.to(hidden_KH.dtype), bias))
        if head.softcap is not None:
            logits_KV = head.softcap * torch.tanh(logits_KV / head.softcap)
        return self.from_logits(logits_KV, targets_K, weights_K)

    def from_logits(
        self, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor, start_KV: Tensor | None = None
    ) -> Tally:
        """From final logits. InputError where the function gives no scalar, or one without a gradient."""
        logits_KV = _wide(logits_KV)
        has_graph = torch.is_grad_enabled() and logits_KV.requires_grad
        arguments = logits_KV, targets_K, weights_K
        total = _OwnLoss.apply(*arguments, self) if has_graph else self.total(*arguments)
        return Tally(total, weights_K.double().sum())

    def total(self, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        """What the function gives, once it has been checked."""
        with user_code(self.name):
            total = self.function(logits_KV, targets_K, weights_K)
        if not isinstance(total, Tensor) or total.ndim != 0:
            shape = f"a tensor of shape {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise InputError(f"loss.name: {self.name} gave {shape}; it must give the sum over all targets, a scalar")
        if logits_KV.requires_grad and not total.requires_grad:
            raise InputError(f"loss.name: {self.name} gave a number without a gradient; compute it from the logits")
        return total


@torch.no_grad()
def _check_linear(own: OwnObjective) -> None:
    """Weights times 2 must give 2 times the sum: a mean would make each micro-batch count alike, whatever is in it.

    A function that raises on these few numbers is named where it is first used.
    """
    logits_KV, weights_K = torch.linspace(-1.0, 1.0, 15).view(3, 5), torch.tensor([1.0, 0.5, 2.0])
    try:
        targets_K = torch.tensor([0, 2, 4])
        one, two = (float(own.function(logits_KV.clone(), targets_K, factor * weights_K)) for factor in (1, 2))
    except Exception:
        return
    if not math.isclose(two, 2 * one, rel_tol=1e-4, abs_tol=1e-6):
        fix = "give the sum over targets of weights_K times each one's loss; weights hold all means and normalizers"
        what = f"{own.name} is not linear in weights_K: {one:g} became {two:g} with twice the weights"
        raise InputError(f"loss.name: {what}; {fix}")


class _OwnLoss(torch.autograd.Function):
    """A user's function with a graph of its own, so that an error in its backward pass is known to be the user's."""

    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor, own: OwnObjective) -> Tensor:
        leaf_KV = logits_KV.detach().requires_grad_()
        with torch.enable_grad():
            total = own.total(_Alias.apply(leaf_KV), targets_K, weights_K)
        ctx.graph = own.name, leaf_KV, total
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (name, leaf_KV, total), ctx.graph = ctx.graph, None
        with user_code(name):
            torch.autograd.backward(total, grad)
        return leaf_KV.grad, None, None, None


class _Alias(torch.autograd.Function):
    """The same tensor as a result, which a user's function may change in place; torch forbids that for a leaf."""

    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor) -> Tensor:
        return logits_KV.detach()

    @staticmethod
    def backward(ctx: Any, grad_KV: Tensor) -> Tensor:
        return grad_KV


def _wide(logits_KV: Tensor) -> Tensor:
    return logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
