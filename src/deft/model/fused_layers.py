"""What stands in for parts of a model: the hand-written layers of `cpu/`, and embedding lookups.

Left to autograd, a matrix that is both embedding and head gets two gradients of its whole size, one of them nearly all
zeros, and their sum is a third; and the rows of a token that occurs often are added in bf16, one by one. `embed` adds
the gradient of the rows to that of the head where it lies, summed in fp32.

Shape suffixes: M tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.model.cpu import llama


def install(model: nn.Module) -> int:
    """Gives each layer on a CPU that `cpu/` computes exactly that forward; returns the number of these layers.

    Modules, parameters and their names stay what they are. A call that is not about packed documents goes to the
    layer's own forward.
    """
    remove(model)
    if next(model.parameters()).device.type != "cpu":
        return 0
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    forms = {layer: form for layer in layers if (form := llama.form_of(layer)) is not None}
    for layer, form in forms.items():
        exact = replace(form, is_last=layer is layers[-1])
        layer.forward = partial(llama.forward, layer, exact, layer.forward)
    return len(forms)


def trims(model: nn.Module) -> bool:
    """Whether the last layer is fused, and so can be told the rows that the head is applied to."""
    forwards = [layer.__dict__["forward"] for layer in model.modules() if "forward" in layer.__dict__]
    return bool(forwards) and forwards[-1].args[1].is_last


def remove(model: nn.Module) -> None:
    """Each layer is its own again."""
    for layer in model.modules():
        layer.__dict__.pop("forward", None)


def is_plain_embedding(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether `embed` is all that a call of this module does."""
    if type(embedding) is not nn.Embedding or "forward" in embedding.__dict__:
        return False
    has_options = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return not has_options and not embedding._forward_hooks and not embedding._forward_pre_hooks


def embed(embedding: nn.Embedding, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' embeddings [M, H], and the matrix [V, H] for a head that is tied to it to go on with.

    The padding token's own embedding gets no gradient, as torch has it. The gradient that arrives for the matrix is
    written to: it must be referenced nowhere else, as where one matrix product made it.

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
