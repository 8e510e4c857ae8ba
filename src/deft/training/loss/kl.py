"""-log p(target) + beta * KL(start || p): what the model knew, it is held to, where demonstrations say nothing of it.

start is the softmax of the model that the run began with, without a gradient. Learning without Forgetting, arXiv
1606.09282, at temperature 1, on the tokens that are learnt.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deft.training.chunked import Chunked


def make(beta: float = 0.1) -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor, start_SV: Tensor) -> Tensor:
        log_p_SV, log_start_SV = logits_SV.log_softmax(1), start_SV.log_softmax(1)
        start_p_SV = log_start_SV.exp()
        kl_S = torch.linalg.vecdot(start_p_SV, log_start_SV) - torch.linalg.vecdot(start_p_SV, log_p_SV)
        return beta * kl_S + functional.nll_loss(log_p_SV, targets_S, reduction="none")

    return Chunked(row_loss, uses_start=True)
