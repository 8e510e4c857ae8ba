"""Any torch optimizer as an update rule over `Masters`: one small instance of it for each parameter.

An instance owns an empty parameter, which is the fp32 master while its step lasts. So no second copy of the weights is
kept, and the masters stay what they are. Its state is saved as tensors, its numbers as tensors too: nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from deft.training.masters import Masters, copy_state, rates_of

MakeRule = Callable[[str, nn.Parameter], TorchOptimizer]
"""(name, parameter) -> the torch optimizer of that parameter alone."""


class PerParameter:
    """The update rule that `make_rule` gives for each trained parameter."""

    def __init__(self, masters: Masters, make_rule: MakeRule, rates: Mapping[str, float] | None = None) -> None:
        self._masters = masters
        self._make_rule = make_rule
        self._rates = rates_of(masters.parameters, rates or {})
        self._rules = {name: self._new(name) for name in masters.parameters}
        self._begun: set[TorchOptimizer] = set()

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """One update at rate `lr`, with gradients times `scale`, which are dropped."""
        for name, rule in self._rules.items():
            gradient = self._masters.gradient(name)
            if gradient is not None:
                gradient = gradient.float() if scale is None else gradient.float() * scale
                _set_rate(rule.param_groups[0], lr * self._rates[name])
                self._masters.assign(name, _stepped(rule, self._masters[name], gradient))
                self._masters.drop_gradient(name)
                self._begun.add(rule)

    def served(self) -> Iterator[tuple[str, Tensor]]:
        """The masters to evaluate and to hand over, of rules that train others: such a rule has eval() and train()."""
        for name, rule in self._rules.items():
            if rule in self._begun and hasattr(rule, "eval") and hasattr(rule, "train"):
                (parameter,) = rule.param_groups[0]["params"]
                parameter.data = self._masters[name].clone()
                rule.eval()
                served = parameter.detach().clone()
                rule.train()
                parameter.data = parameter.new_empty(0)
                yield name, served

    def state(self) -> dict[str, Tensor]:
        """The live tensors of all rules, `PLACE.NAME`, and their numbers.

        `begun`, int64 [parameters], is 1 for each whose rule has made a step, and so has a state.
        """
        begun = torch.tensor([int(rule in self._begun) for rule in self._rules.values()])
        return {"begun": begun} | dict(self._leaves(self._rules))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave, on any device.

        Rules make their state in their first step, so that one is made with gradients of zero, on weights of zero.
        Raises ValueError, with nothing changed, where it does not fit.
        """
        begun = state.get("begun", torch.zeros(0, dtype=torch.int64))
        rules = {name: self._new(name) for name in self._masters.parameters}
        stepped = [name for name, is_begun in zip(rules, begun.tolist(), strict=False) if is_begun]
        for name in stepped:
            zeros = torch.zeros_like(self._masters.parameters[name], dtype=torch.float32, requires_grad=False)
            _stepped(rules[name], zeros, torch.zeros_like(zeros))
        own_begun = torch.tensor([int(name in stepped) for name in rules])
        copy_state({"begun": own_begun} | dict(self._leaves(rules)), state)
        for name, rule in rules.items():
            _put_numbers(rule, name, state)
        self._rules, self._begun = rules, {rules[name] for name in stepped}

    def _new(self, name: str) -> TorchOptimizer:
        """A rule; while it is made its parameter has its shape, which some rules look at."""
        zeros = torch.zeros_like(self._masters.parameters[name], dtype=torch.float32)
        parameter = nn.Parameter(zeros)
        rule = self._make_rule(name, parameter)
        parameter.data = zeros.new_empty(0)
        getattr(rule, "train", lambda: None)()  # schedule-free rules cannot step before it
        return rule

    def _leaves(self, rules: Mapping[str, TorchOptimizer]) -> Iterator[tuple[str, Tensor]]:
        for name, rule in rules.items():
            for place, value in _values(rule):
                yield from ((f"{inner}.{name}", tensor) for inner, tensor in _tensors(place, value))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """A rate that is a tensor stays one: rules that compile their step compile it anew for every other number."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@torch.no_grad()
def _stepped(rule: TorchOptimizer, master: Tensor, gradient: Tensor) -> Tensor:
    """The master after one step of its rule, which holds it no longer."""
    (parameter,) = rule.param_groups[0]["params"]
    parameter.data, parameter.grad = master, gradient
    rule.step()
    stepped: Tensor = parameter.data
    parameter.data, parameter.grad = stepped.new_empty(0), None
    return stepped


def _values(rule: TorchOptimizer) -> Iterator[tuple[str, Any]]:
    """What a rule remembers: of its parameter, and the numbers of its group that it was not made with."""
    (group,) = rule.param_groups
    (parameter,) = group["params"]
    yield from sorted(rule.state.get(parameter, {}).items())
    makers = [each for each in type(rule).__mro__ if issubclass(each, TorchOptimizer)]
    settings = {name for maker in makers for name in signature(maker).parameters}
    for key in sorted(group.keys() - settings - {"params", "train_mode"}):
        if isinstance(group[key], bool | int | float | Tensor):
            yield f"group.{key}", group[key]


def _tensors(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, the tensors inside one of a quantised kind, or a number as a tensor."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for inner in value.__tensor_flatten__()[0]:
            yield from _tensors(f"{place}.{inner}", getattr(value, inner))
    elif isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, bool | int | float):
        yield place, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _put_numbers(rule: TorchOptimizer, name: str, state: Mapping[str, Tensor]) -> None:
    """Numbers, which cannot be copied into, take their values from `state`."""
    (group,) = rule.param_groups
    (parameter,) = group["params"]
    for place, value in list(_values(rule)):
        if not isinstance(value, Tensor) and f"{place}.{name}" in state:
            number = type(value)(state[f"{place}.{name}"].item())
            home = group if place.startswith("group.") else rule.state[parameter]
            home[place.removeprefix("group.")] = number
