"""Dynamic fine-tuning: p(target) * -log p(target), where p has no gradient: what is unlikely is learnt less.

On the Generalization of SFT, arXiv 2508.05629, equation 9.
"""

from __future__ import annotations

from torch import Tensor

from deft.training.chunked import Chunked


def make() -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        log_p_S = logits_SV.gather(1, targets_S[:, None])[:, 0] - logits_SV.logsumexp(1)
        return -log_p_S.detach().exp() * log_p_S

    return Chunked(row_loss)
