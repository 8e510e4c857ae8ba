"""(entropy of the softmax / log V) * -log p(target), where the entropy has no gradient: what the model is sure of,
right or wrong, is learnt less.

The gate of Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, over the whole vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from deft.training.chunked import Chunked


def make() -> Chunked:
    def row_loss(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        log_p_SV = logits_SV.log_softmax(1)
        entropy_S = -torch.linalg.vecdot(log_p_SV.exp(), log_p_SV).detach()
        return functional.nll_loss(log_p_SV, targets_S, reduction="none") * entropy_S / math.log(logits_SV.shape[1])

    return Chunked(row_loss)
