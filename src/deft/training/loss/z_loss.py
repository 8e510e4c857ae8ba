"""Negative log-likelihood + strength * (log Z)^2, which keeps logits near 0; Z is the softmax's denominator.

PaLM, arXiv 2204.02311, section 5.
"""

from __future__ import annotations

from torch import Tensor

from deft.training.chunked import Chunked


def make(strength: float = 1e-4) -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        log_z_S = logits_SV.logsumexp(1)
        return log_z_S - logits_SV.gather(1, targets_S[:, None])[:, 0] + strength * log_z_S.square()

    return Chunked(row_loss)
