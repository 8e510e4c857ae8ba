"""Label smoothing: (1 - epsilon) * -log p(target) + epsilon * mean over the vocabulary of -log p(v).

Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567, section 7; transformers' LabelSmoother.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from deft.training.chunked import Chunked


def make(epsilon: float = 0.1) -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        return functional.cross_entropy(logits_SV, targets_S, reduction="none", label_smoothing=epsilon)

    return Chunked(row_loss)
