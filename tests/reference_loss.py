"""The definition of the loss: plain torch, the logits whole. Each module of `loss` is held to it by law 7.

Shape suffixes: K targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deft.core.types import Head


def loss(hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """Sum over k of weights[k] * -log softmax(logits)[k, targets[k]], in nats.

    The matrix product is in the dtype of hidden_KH; all that follows is in fp32 (fp64 where hidden_KH is fp64), and so
    is the scalar that comes back. Nothing is divided: means are for display.
    """
    bias = None if head.bias is None else head.bias.to(hidden_KH.dtype)
    logits_KV = functional.linear(hidden_KH, head.weight.to(hidden_KH.dtype), bias)
    logits_KV = head.scale * logits_KV.to(_wide(hidden_KH.dtype))
    if head.softcap is not None:
        logits_KV = head.softcap * torch.tanh(logits_KV / head.softcap)
    return loss_from_logits(logits_KV, targets_K, weights_K)


def loss_from_logits(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """The same sum, from final logits: no scale or softcap is applied here."""
    logp_KV = torch.log_softmax(logits_KV.to(_wide(logits_KV.dtype)), dim=-1)
    logp_K = logp_KV.gather(1, targets_K[:, None])[:, 0]
    return -(weights_K.to(logp_K.dtype) * logp_K).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
