"""Weighted negative log-likelihood, fast: head and loss in row chunks, gradients in the forward pass.

Equal to `reference.py` (law 7), but never holds a [K, V] tensor: each chunk of rows is projected, turned in place into
the gradient of its logits, and spent at once on the gradients of hidden states, weight and bias. Three matrix products
in all, the least there is without keeping logits. The idea is Liger's fused linear cross-entropy
(linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py); the weight gradient here is summed in fp32.

Shape suffixes: K targets, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from deft.types import Head

CHUNK_ELEMENTS = 2**26
"""At most so many logits at once (256 MiB in fp32) ..."""
CHUNK_ROWS = 128
"""... but never fewer rows than keep a matrix product busy."""


def loss(hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """Sum over k of weights[k] * -log softmax(logits)[k, targets[k]], in nats: a scalar in fp32 (fp64 for fp64).

    hidden_KH float [K, H], targets_K int64 [K], weights_K float [K]. K = 0 gives 0, with gradients of zero.
    Matrix products are in the dtype of hidden_KH, softmax in fp32. Gradients come in the dtype of each parameter, and
    only for what requires one; targets_K and weights_K get none. Differentiable once.
    """
    leaves = (hidden_KH, head.weight, head.bias)
    is_needed = tuple(torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves)
    return _HeadLoss.apply(*leaves, targets_K, weights_K, head.scale, head.softcap, is_needed)


def loss_from_logits(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """The same sum, from final logits: no scale or softcap is applied here. Holds one [K, V] gradient in backward."""
    return _LogitsLoss.apply(logits_KV, targets_K, weights_K)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        weights_K: Tensor,
        scale: float,
        softcap: float | None,
        is_needed: tuple[bool, bool, bool],
    ) -> Tensor:
        wide = _wide(hidden_KH.dtype)
        weight = weight_VH.to(hidden_KH.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_KH.dtype)
        weights_K = weights_K.to(wide)
        total = hidden_KH.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden_KH) if is_needed[0] else None
        d_weight = d_bias = None
        chunks = _chunks(len(hidden_KH), len(weight))
        sum_dtype = wide if len(chunks) > 1 else hidden_KH.dtype
        for rows in chunks:
            hidden_CH = hidden_KH[rows]
            logits_CV = functional.linear(hidden_CH, weight, bias).to(wide)
            tanh_CV = _cap_in_place(logits_CV, scale, softcap)
            total += _softmax_gradient_in_place(logits_CV, targets_K[rows], weights_K[rows])
            if not any(is_needed):
                continue
            _uncap_in_place(logits_CV, tanh_CV, scale)
            d_logits_CV = logits_CV.to(hidden_KH.dtype)
            if d_hidden is not None:
                torch.mm(d_logits_CV, weight, out=d_hidden[rows])
            if is_needed[1]:
                d_weight = _add(d_weight, d_logits_CV.T @ hidden_CH, sum_dtype)
            if is_needed[2]:
                d_bias = _add(d_bias, logits_CV.sum(0), wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (hidden_KH, weight_VH, bias_V))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else _times(gradient, grad_output, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        wide = _wide(logits_KV.dtype)
        total = logits_KV.new_zeros((), dtype=wide)
        for rows in _chunks(*logits_KV.shape):
            # A copy even of wide logits: the caller's are not ours to write to.
            chunk_CV = logits_KV[rows].to(wide, copy=True)
            total += _softmax_gradient_in_place(chunk_CV, targets_K[rows], weights_K[rows].to(wide))
        ctx.save_for_backward(logits_KV, targets_K, weights_K)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits_KV, targets_K, weights_K = ctx.saved_tensors
        wide = _wide(logits_KV.dtype)
        gradient_KV = torch.empty_like(logits_KV)
        for rows in _chunks(*logits_KV.shape):
            chunk_CV = logits_KV[rows].to(wide, copy=True)
            _softmax_gradient_in_place(chunk_CV, targets_K[rows], weights_K[rows].to(wide))
            torch.mul(chunk_CV, grad_output, out=gradient_KV[rows])
        return gradient_KV, None, None


def _softmax_gradient_in_place(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
    """The loss of these rows; logits_CV becomes weights * (softmax(logits) - onehot(targets))."""
    targets_C1 = targets_C[:, None]
    peak_C1 = logits_CV.amax(1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C1) - peak_C1
    sums_C1 = logits_CV.sub_(peak_C1).exp_().sum(1, keepdim=True)
    nll_C = (sums_C1.log() - target_C1)[:, 0]
    logits_CV.mul_(weights_C[:, None] / sums_C1)
    logits_CV.scatter_add_(1, targets_C1, -weights_C[:, None])
    return (weights_C * nll_C).sum()


def _cap_in_place(logits_CV: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and softcap; returns tanh(scaled / softcap), which the derivative needs, or None without a softcap."""
    if scale != 1.0:
        logits_CV.mul_(scale)
    if softcap is None:
        return None
    tanh_CV = torch.tanh(logits_CV / softcap)
    torch.mul(tanh_CV, softcap, out=logits_CV)
    return tanh_CV


def _uncap_in_place(d_logits_CV: Tensor, tanh_CV: Tensor | None, scale: float) -> None:
    """The chain rule through `_cap_in_place`; tanh_CV is overwritten."""
    if tanh_CV is not None:
        d_logits_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
    if scale != 1.0:
        d_logits_CV.mul_(scale)


def _times(gradient: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * grad_output, rounded once: the fp32 sum of a weight's gradient is never held twice."""
    return torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=dtype))


def _add(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices that cover rows in order, each as large as the two limits allow; one empty slice where rows is 0.

    >>> _chunks(1000, 2**17)
    [slice(0, 512, None), slice(512, 1000, None)]
    """
    step = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
