"""Stochastic gradient descent with momentum: torch's SGD."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deft.training.masters import Masters
from deft.training.per_parameter import PerParameter

IS_ELEMENTWISE = True
"""A number's update depends on that number and its own gradients alone."""


def make(
    masters: Masters,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    rates: Mapping[str, float] | None = None,
) -> PerParameter:
    """Weight decay acts on matrices only, as adamw's does."""
    return PerParameter(
        masters,
        lambda name, parameter: torch.optim.SGD(
            [parameter], momentum=momentum, weight_decay=weight_decay if parameter.ndim >= 2 else 0.0, fused=False
        ),
        rates,
    )
