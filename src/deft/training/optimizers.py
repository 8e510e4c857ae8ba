"""`optimizer` in the configuration -> the update rule: of a module in the folder `optim`, or a torch optimizer's class.

A class is named by its import path: torch.optim:NAdam, torchao.optim:AdamW8bit, or a user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from torch import nn
from torch.optim import Optimizer as TorchOptimizer

from deft.core import registry
from deft.core.errors import InputError, user_code
from deft.training import optim
from deft.training.config import OptimizerConfig
from deft.training.masters import Masters
from deft.training.per_parameter import PerParameter
from deft.training.state import Optimizer

_COMMON = ("betas", "eps", "weight_decay")
"""Settings that most rules have. One that is changed for a rule without it is an error, not passed over."""


def check(settings: OptimizerConfig) -> None:
    """Raises InputError for a rule that is not there, and for a setting that it does not have."""
    _arguments(settings, _maker(settings))


def is_elementwise(settings: OptimizerConfig) -> bool:
    """Whether the rule looks at each number of a parameter alone, so that some of its rows can be updated elsewhere."""
    return not registry.is_own(settings.name) and getattr(
        registry.load(optim, settings.name, "optimizer.name"), "IS_ELEMENTWISE", False
    )


def make(settings: OptimizerConfig, masters: Masters) -> Optimizer:
    """The update rule over all trained masters. Raises InputError as `check` does."""
    maker = _maker(settings)
    arguments = _arguments(settings, maker)
    if not registry.is_own(settings.name):
        made: Optimizer = maker(masters, rates=settings.rates, **arguments)
        return made
    undecayed = {**arguments, **({"weight_decay": 0.0} if "weight_decay" in arguments else {})}

    def rule(name: str, parameter: nn.Parameter) -> TorchOptimizer:
        made: TorchOptimizer = maker([parameter], **(arguments if parameter.ndim >= 2 else undecayed))
        return made

    with user_code(settings.name):
        return PerParameter(masters, rule, settings.rates)


def _maker(settings: OptimizerConfig) -> Callable[..., Any]:
    if registry.is_own(settings.name):
        own = registry.own(settings.name, "optimizer.name")
        closure = signature(own.step).parameters.get("closure") if hasattr(own, "step") else None
        if closure is not None and closure.default is Parameter.empty:
            what = "computes the loss several times a step, which deft does not"
            raise InputError(f"optimizer.name: {settings.name} {what}; choose another")
        return own
    found: Callable[..., Any] = registry.load(optim, settings.name, "optimizer.name").make
    return found


def _arguments(settings: OptimizerConfig, maker: Callable[..., Any]) -> dict[str, Any]:
    """The common settings that the rule has, and its own."""
    parameters = signature(maker).parameters
    known = {name for name in parameters if name not in ("masters", "params", "lr", "rates", "self")}
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
    there = f"it has {', '.join(sorted(known))}" if known else "it has none"
    for name in settings.options:
        if name in _COMMON or (name not in known and not takes_any):
            where = f"say optimizer.{name}" if name in _COMMON else there
            raise InputError(f"optimizer.options: {settings.name} has no option {name}; {where}")
    usual = OptimizerConfig()
    for name in _COMMON:
        if name not in known and getattr(settings, name) != getattr(usual, name):
            raise InputError(f"optimizer.{name}: {settings.name} has no such setting; {there}")
    return {name: getattr(settings, name) for name in _COMMON if name in known} | dict(settings.options)
