"""Dynamic fine-tuning: p(target) * -log p(target), where p has no gradient: what is unlikely is learnt less.

On the Generalization of SFT, arXiv 2508.05629, equation 9.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from deft.training.chunked import Chunked


def make() -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        nll_S = functional.cross_entropy(logits_SV, targets_S, reduction="none")
        return (-nll_S).exp().detach() * nll_S

    return Chunked(row_loss)
