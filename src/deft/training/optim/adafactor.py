"""Adafactor: second moments by row and column, of which a matrix needs almost no memory. torch's, arXiv 1804.04235."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deft.training.masters import Masters
from deft.training.per_parameter import PerParameter


def make(
    masters: Masters, *, weight_decay: float = 0.0, beta2_decay: float = -0.8, rates: Mapping[str, float] | None = None
) -> PerParameter:
    """The rate of an update is lr times the size of the weights (`relative`), as in the paper."""
    return PerParameter(
        masters,
        lambda name, parameter: torch.optim.Adafactor(
            [parameter], beta2_decay=beta2_decay, weight_decay=weight_decay if parameter.ndim >= 2 else 0.0
        ),
        rates,
    )
