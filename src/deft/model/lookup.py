"""Embedding lookups whose gradient joins that of a tied head where it lies.

Left to autograd, a tied matrix gets two gradients of its whole size, one of them nearly all zeros, and their sum is a
third. And the rows of a token that occurs often are added in bf16, one by one: on 16 answers of GSM8K the matrix's
gradient is 2.6 % off in a model of 40 M parameters, here 0.5 %.

Shape suffixes: M tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def fits(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether `embed` is all that a call of this module does."""
    if type(embedding) is not nn.Embedding or "forward" in embedding.__dict__:
        return False
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return is_plain and not embedding._forward_hooks and not embedding._forward_pre_hooks


def embed(embedding: nn.Embedding, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' embeddings [M, H], and the matrix [V, H] for a head that is tied to it to go on with.

    The padding token's own embedding gets no gradient, as torch has it. The gradient that arrives for the matrix is
    written to: nobody else may hold it, as nobody does where one matrix product made it.

    >>> embedding, tokens = nn.Embedding(4, 1), torch.tensor([2, 0, 2])
    >>> rows, matrix = embed(embedding, tokens)
    >>> (rows.sum() + 10 * matrix.sum()).backward()
    >>> embedding.weight.grad.tolist()
    [[11.0], [10.0], [12.0], [10.0]]
    """
    return _Lookup.apply(embedding.weight, tokens_M, embedding.padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, tokens_M: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens_M)
        ctx.padding = padding
        return functional.embedding(tokens_M, weight_VH), weight_VH.view_as(weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor, total_VH: Tensor) -> tuple[Tensor, None, None]:
        (tokens_M,) = ctx.saved_tensors
        rows_M, sums_MH = _sums(tokens_M, grad_MH)
        if ctx.padding is not None:
            sums_MH *= (rows_M != ctx.padding).to(sums_MH.dtype)[:, None]
        return total_VH.contiguous().index_add_(0, rows_M, sums_MH.to(total_VH.dtype)), None, None


def _sums(tokens_M: Tensor, grad_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Different tokens, and the sum of each one's rows in fp32 at least; the places left over add nothing to token 0.

    As many as there are tokens, so that shapes depend on shapes alone (forecast.py).

    >>> _sums(torch.tensor([7, 5, 7]), torch.tensor([[1.0], [2.0], [3.0]]))
    (tensor([5, 7, 0]), tensor([[2.],
            [4.],
            [0.]]))
    """
    sorted_M, order_M = tokens_M.sort(stable=True)
    place_M = functional.pad(sorted_M[1:] != sorted_M[:-1], (1, 0)).cumsum(0)
    wide_MH = grad_MH[order_M].to(torch.promote_types(grad_MH.dtype, torch.float32))
    sums_MH = torch.zeros_like(wide_MH).index_add_(0, place_M, wide_MH)
    return torch.zeros_like(sorted_M).scatter_(0, place_M, sorted_M), sums_MH
