"""Muon for the matrices of layers, AdamW for embeddings, head, norms and biases. torch's, github.com/KellerJordan/Muon.

Updates of matrices are scaled to the size that AdamW's have (arXiv 2502.16982), so that one rate serves both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from deft.training.masters import Masters
from deft.training.per_parameter import PerParameter

_ENDS = re.compile(r"embed|lm_head|embed_out|\bwte\b|\bwpe\b|output_layer")


def make(
    masters: Masters,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    rates: Mapping[str, float] | None = None,
) -> PerParameter:
    """betas and eps are AdamW's."""

    def rule(name: str, parameter: nn.Parameter) -> Optimizer:
        if parameter.ndim == 2 and not _ENDS.search(name):
            return torch.optim.Muon(
                [parameter], momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        return torch.optim.AdamW([parameter], betas=betas, eps=eps, weight_decay=decay)

    return PerParameter(masters, rule, rates)
