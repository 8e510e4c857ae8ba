"""Label smoothing: (1 - epsilon) * -log p(target) + epsilon * mean over the vocabulary of -log p(v).

Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567, section 7; transformers' LabelSmoother.
"""

from __future__ import annotations

from torch import Tensor

from deft.training.chunked import Chunked


def make(epsilon: float = 0.1) -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        log_p_SV = logits_SV.log_softmax(1)
        target_S = log_p_SV.gather(1, targets_S[:, None])[:, 0]
        return -(1.0 - epsilon) * target_S - epsilon * log_p_SV.mean(1)

    return Chunked(row_loss)
