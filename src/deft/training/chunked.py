"""Head and loss in row chunks, gradients in the forward pass: what every objective is computed by.

The weighted negative log-likelihood is differentiated by hand, equal to the reference (law 7); any other loss of a row
of logits by torch. There is no [K, V] tensor of all logits: a block of rows is projected, turned in place into the
gradient of its logits, a few rows at a time in fp32, and spent on the gradients of hidden states, weight and bias.
Three matrix products in all, the least there is without keeping logits. The idea is Liger's fused linear cross-entropy
(linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py).

The gradient of the head's weight is summed over blocks where it will lie, of many blocks in fp32, some rows at a time,
and narrowed in place. At no time are there two tensors of its size.

Shape suffixes: K targets, B rows of a block, S of a slice in fp32, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn import functional

from deft.core.hardware import round_up_rows
from deft.core.types import Head, Tally

CPU_BLOCK, GPU_BLOCK, LEAST_ROWS = 2**26, 2**29, 512
"""Bytes of a block's logits, twice as many where that saves a sum in fp32, and its least rows. Each block costs a pass
over the gradient of the weight; a larger one more memory, which in the first steps is slow to come by."""

NARROW_BLOCKS = 3
"""This many blocks are summed in the dtype of the weight. Each product is added before it is rounded, so that three are
no less exact than three rounded ones that are summed in fp32, and need neither their memory nor their passes."""

CPU_PIECE, GPU_PIECE = 2**12, 2**15
"""Rows of the head's weight whose gradient is summed at a time: on CPUs their product stays in the cache."""

CPU_SLICE, GPU_SLICE = 2**18, 2**26
"""Logits that are in fp32 at a time, on CPUs by each thread: they stay in its cache."""

NARROWED = 2**20
"""Elements that change their dtype at a time."""


RowLoss = Callable[..., Tensor]
"""(logits_SV, targets_S) -> loss_S, each in fp32 at least, in torch operations that can be differentiated. One that
uses the start is given as a third argument start_SV, the logits of the model that the run began with."""

Start = tuple[Tensor, Head]
"""Hidden states [K, H] of the model that the run began with, without a graph, and its head."""


@dataclass(frozen=True)
class Chunked:
    """The objective of a loss of single rows: sum over k of weights[k] * row_loss(logits[k], targets[k]).

    row_loss    None is the negative log-likelihood, whose gradient is written by hand
    uses_start  whether row_loss takes the logits of the model that the run began with

    >>> tally = Chunked(lambda logits_SV, targets_S: logits_SV.logsumexp(1))(
    ...     torch.zeros(2, 3), Head(torch.ones(1, 3)), torch.tensor([0, 0]), torch.tensor([1.0, 0.5])
    ... )
    >>> float(tally.nll_sum), float(tally.weight_sum)
    (0.0, 1.5)
    """

    row_loss: RowLoss | None = None
    uses_start: bool = False

    def __call__(
        self, hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor, start: Start | None = None
    ) -> Tally:
        arguments = hidden_KH, head, targets_K, weights_K
        total = loss(*arguments) if self.row_loss is None else _apply(*arguments, None, self.row_loss, start)
        return Tally(total, _total(weights_K))

    def from_logits(
        self, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor, start_KV: Tensor | None = None
    ) -> Tally:
        total = _LogitsLoss.apply(logits_KV, targets_K, weights_K, self.row_loss, start_KV)
        return Tally(total, _total(weights_K))


NLL = Chunked()
"""The weighted negative log-likelihood."""


def loss(hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """Sum over k of weights[k] * -log softmax(logits)[k, targets[k]], in nats: a scalar in fp32 (fp64 for fp64).

    hidden_KH float [K, H], targets_K int64 [K], weights_K float [K]. K = 0 gives 0, with gradients of zero.
    Matrix products are in the dtype of hidden_KH, softmax in fp32. Gradients come in the dtype of each parameter, and
    only for what requires one; targets_K and weights_K get none. Differentiable once, in one backward pass.
    """
    return _apply(hidden_KH, head, targets_K, weights_K, None, None)


def loss_and_statistics(
    hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and beside it from the same products two sums over k without gradients, in its dtype: weights[k] where
    no token is likelier than the target, and weights[k] times the entropy of the softmax, in nats."""
    statistics = torch.zeros(2, dtype=_wide(hidden_KH.dtype), device=hidden_KH.device)
    total = _apply(hidden_KH, head, targets_K, weights_K, statistics, None)
    return total, statistics[0], statistics[1]


def _apply(
    hidden_KH: Tensor,
    head: Head,
    targets_K: Tensor,
    weights_K: Tensor,
    statistics: Tensor | None,
    row_loss: RowLoss | None,
    start: Start | None = None,
) -> Tensor:
    missing = round_up_rows(len(hidden_KH)) - len(hidden_KH)
    hidden_KH = functional.pad(hidden_KH, (0, 0, 0, missing))
    start = start and (functional.pad(start[0], (0, 0, 0, missing)), start[1])
    weights_K = functional.pad(weights_K, (0, missing))
    targets_K = torch.cat([targets_K, targets_K[-1:].expand(missing)])  # others may have a bias of -inf
    leaves = (hidden_KH, head.weight, head.bias)
    is_needed = tuple(torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves)
    settings = head.scale, head.softcap, is_needed, statistics, row_loss, start
    return _HeadLoss.apply(*leaves, targets_K, weights_K, *settings)


def loss_from_logits(logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
    """The same sum, from final logits: no scale or softcap is applied here. Holds one [K, V] gradient in backward."""
    return _LogitsLoss.apply(logits_KV, targets_K, weights_K, None, None)


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
        statistics: Tensor | None,
        row_loss: RowLoss | None,
        start: Start | None,
    ) -> Tensor:
        wide = _wide(hidden_KH.dtype)
        weight = weight_VH.to(hidden_KH.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_KH.dtype)
        total = hidden_KH.new_zeros((), dtype=wide)
        row_bytes, is_narrow = len(weight) * weight.element_size(), weight.dtype != wide
        blocks = _blocks(len(hidden_KH), row_bytes, hidden_KH.device, is_narrow)
        d_hidden = torch.empty_like(hidden_KH) if is_needed[0] else None
        d_weight = torch.empty_like(weight, dtype=_dtype_of_sums(blocks, weight.dtype)) if is_needed[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if is_needed[2] else None
        logits = hidden_KH.new_empty(blocks[0].stop, len(weight))
        slice_rows = _slice_rows(len(weight), logits.device)
        scratch = None if logits.dtype == wide else logits.new_empty(slice_rows, len(weight), dtype=wide)
        for rows in blocks:
            hidden_BH, weights_B = hidden_KH[rows], weights_K[rows].to(wide)
            logits_BV = _project(hidden_BH, weight, bias, logits[: len(hidden_BH)])
            if row_loss is None:
                arguments = targets_K[rows], weights_B, scale, softcap, statistics, d_bias, scratch
                total += _logits_gradient(logits_BV, *arguments)
            else:
                start_BV = None if start is None else _start_logits(start, rows)
                settings = scale, softcap, d_bias, row_loss, start_BV
                total += _gradient_by_torch(logits_BV, targets_K[rows], weights_B, *settings)
            if d_hidden is not None:
                torch.mm(logits_BV, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, logits_BV, hidden_BH, is_first=rows.start == 0)
        d_weight = None if d_weight is None else _narrowed(d_weight, weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (hidden_KH, weight_VH, bias_V))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else _spent(gradient, grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, *[None] * 8)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_KV: Tensor,
        targets_K: Tensor,
        weights_K: Tensor,
        row_loss: RowLoss | None,
        start_KV: Tensor | None,
    ) -> Tensor:
        if row_loss is not None:
            gradient_KV = logits_KV.clone()
            total = _gradient_by_torch(gradient_KV, targets_K, weights_K, 1.0, None, None, row_loss, start_KV)
            ctx.save_for_backward(gradient_KV)
            return total
        rows = _SoftmaxRows.of(targets_K, weights_K.to(_wide(logits_KV.dtype)))
        for own_SV, slice_S in rows.slices(logits_KV):
            # A copy even of wide logits: the caller's are not ours to write to.
            slice_S.softmax_gradient_in_place(own_SV.to(rows.weights.dtype, copy=True))
        ctx.save_for_backward(logits_KV, targets_K, weights_K)
        return rows.loss()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits_KV, *rest = ctx.saved_tensors
        if not rest:
            return logits_KV * grad_output, None, None, None, None
        targets_K, weights_K = rest
        rows = _SoftmaxRows.of(targets_K, weights_K.to(_wide(logits_KV.dtype)))
        gradient_KV = torch.empty_like(logits_KV)
        own = gradient_KV.split(_slice_rows(logits_KV.shape[1], logits_KV.device))
        for (logits_SV, slice_S), gradient_SV in zip(rows.slices(logits_KV), own, strict=True):
            slice_SV = logits_SV.to(rows.weights.dtype, copy=True)
            slice_S.softmax_gradient_in_place(slice_SV)
            torch.mul(slice_SV, grad_output, out=gradient_SV)
        return gradient_KV, None, None, None, None


def _project(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out_CV: Tensor | None) -> Tensor:
    if bias_V is None:
        return torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    return torch.addmm(bias_V, hidden_CH, weight_VH.T, out=out_CV)


def _start_logits(start: Start, rows: slice) -> Tensor:
    """float [B, V], before scale and softcap."""
    hidden_KH, head = start
    bias = None if head.bias is None else head.bias.to(hidden_KH.dtype)
    return _project(hidden_KH[rows], head.weight.to(hidden_KH.dtype), bias, None)


def _logits_gradient(
    logits_BV: Tensor,
    targets_B: Tensor,
    weights_B: Tensor,
    scale: float,
    softcap: float | None,
    statistics: Tensor | None,
    d_bias: Tensor | None,
    scratch: Tensor | None,
) -> Tensor:
    """The loss of these rows; logits_BV, as the weight gave them, becomes the gradient before scale and softcap.

    d_bias gets what these rows add to it; scratch holds a slice in fp32, where logits are narrower.
    """
    rows = _SoftmaxRows.of(targets_B, weights_B)
    for own_SV, slice_S in rows.slices(logits_BV):
        slice_SV = own_SV if scratch is None else scratch[: len(own_SV)].copy_(own_SV)
        tanh_SV = _cap_in_place(slice_SV, scale, softcap)
        slice_S.softmax_gradient_in_place(slice_SV, statistics)
        _uncap_in_place(slice_SV, tanh_SV, scale)
        if d_bias is not None:
            d_bias += slice_SV.sum(0)
        if scratch is not None:
            own_SV.copy_(slice_SV)
    return rows.loss()


@torch.enable_grad()
def _gradient_by_torch(
    logits_BV: Tensor,
    targets_B: Tensor,
    weights_B: Tensor,
    scale: float,
    softcap: float | None,
    d_bias: Tensor | None,
    row_loss: RowLoss,
    start_BV: Tensor | None = None,
) -> Tensor:
    """The loss of these rows; logits_BV, as the weight gave them, becomes its gradient. d_bias as above.

    start_BV  logits of the model that the run began with, likewise, which row_loss gets as well
    """
    total = weights_B.new_zeros((), dtype=_wide(logits_BV.dtype))
    tensors = [logits_BV, targets_B, weights_B, *([] if start_BV is None else [start_BV])]
    parts = (each.detach().split(_slice_rows(logits_BV.shape[1], logits_BV.device)) for each in tensors)
    for own_SV, targets_S, weights_S, *start_S in zip(*parts, strict=True):
        leaf_SV = own_SV.to(total.dtype, copy=True).requires_grad_()
        logits_SV, *start_S = (_final(each, scale, softcap) for each in (leaf_SV, *start_S))
        loss = (weights_S.to(total.dtype) * row_loss(logits_SV, targets_S, *start_S)).sum()
        (gradient_SV,) = torch.autograd.grad(loss, leaf_SV)
        own_SV.copy_(gradient_SV)
        if d_bias is not None:
            d_bias += gradient_SV.sum(0)
        total += loss.detach()
    return total


class _SoftmaxRows(NamedTuple):
    """Rows of logits, and what their softmax tells of the loss. Each [B, 1], all but the targets wide.

    What needs no logits is computed for all slices at once: each operation costs its start, and far more in a forecast.

    peak    the largest logit
    target  the target's
    total   sum(exp(logits - peak)), which is known on the way to the gradient: the loss needs no pass of its own
    """

    targets: Tensor
    weights: Tensor
    peak: Tensor
    target: Tensor
    total: Tensor

    @staticmethod
    def of(targets_B: Tensor, weights_B: Tensor) -> _SoftmaxRows:
        return _SoftmaxRows(targets_B[:, None], weights_B[:, None], *weights_B.new_empty(3, len(weights_B), 1).unbind())

    def slices(self, logits_BV: Tensor) -> Iterator[tuple[Tensor, _SoftmaxRows]]:
        """Some logits at a time, and the rows that they are of."""
        rows = _slice_rows(logits_BV.shape[1], logits_BV.device)
        parts = zip(*(each.split(rows) for each in (logits_BV, *self)), strict=True)
        return ((logits_SV, _SoftmaxRows(*own)) for logits_SV, *own in parts)

    def softmax_gradient_in_place(self, logits_BV: Tensor, statistics: Tensor | None = None) -> None:
        """logits_BV becomes weights * (softmax(logits) - onehot(targets)).

        `statistics`, where given, gets what `loss_and_statistics` sums.
        """
        torch.amax(logits_BV, 1, keepdim=True, out=self.peak)
        torch.gather(logits_BV, 1, self.targets, out=self.target)
        torch.sum(logits_BV.sub_(self.peak).exp_(), 1, keepdim=True, out=self.total)
        if statistics is not None:
            statistics[0] += self.weights[self.target >= self.peak].sum()
            statistics[1] += (self.weights * torch.special.entr(logits_BV / self.total).sum(1, keepdim=True)).sum()
        logits_BV.mul_(self.weights / self.total)
        logits_BV.scatter_add_(1, self.targets, -self.weights)

    def loss(self) -> Tensor:
        """The sum of weights * -log softmax(logits)[targets]."""
        nll_B1 = self.total.log() - (self.target - self.peak)
        return (self.weights * nll_B1).sum()


def _cap_in_place(logits_SV: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and softcap; returns tanh(scaled / softcap), which the derivative needs, or None without a softcap."""
    if scale != 1.0:
        logits_SV.mul_(scale)
    if softcap is None:
        return None
    tanh_SV = torch.tanh(logits_SV / softcap)
    torch.mul(tanh_SV, softcap, out=logits_SV)
    return tanh_SV


def _uncap_in_place(d_logits_SV: Tensor, tanh_SV: Tensor | None, scale: float) -> None:
    """The chain rule through `_cap_in_place`; tanh_SV is overwritten."""
    if tanh_SV is not None:
        d_logits_SV.mul_(tanh_SV.square_().neg_().add_(1.0))
    if scale != 1.0:
        d_logits_SV.mul_(scale)


def _add_product(total_VH: Tensor, logits_BV: Tensor, hidden_BH: Tensor, *, is_first: bool) -> None:
    """total += logits^T hidden; the first product is the total, whatever is in it."""
    if total_VH.dtype == logits_BV.dtype:
        total_VH.addmm_(logits_BV.T, hidden_BH, beta=0.0 if is_first else 1.0)
        return
    for piece in _slices(len(total_VH), _on(total_VH.device, CPU_PIECE, GPU_PIECE)):
        product = logits_BV[:, piece].T @ hidden_BH
        if is_first:
            total_VH[piece] = product
        else:
            total_VH[piece] += product


def _narrowed(total_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in a dtype of at most its width, in its own memory, which it loses.

    >>> _narrowed(torch.tensor([[1.0, 2.0], [3.0, 1.01]]), torch.bfloat16)
    tensor([[1.0000, 2.0000],
            [3.0000, 1.0078]], dtype=torch.bfloat16)
    """
    wide = total_VH.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    for piece in _slices(len(wide), NARROWED) if narrow.dtype != wide.dtype else ():
        narrow[piece] = wide[piece].to(dtype)
    return narrow.view(total_VH.shape)


def _blocks(rows: int, row_bytes: int, device: torch.device, is_narrow: bool) -> list[slice]:
    """Blocks of nearly equal size, and of few different sizes.

    is_narrow  whether a sum over more than NARROW_BLOCKS would be in a wider dtype

    >>> _blocks(4160, 64000, torch.device("cpu"), is_narrow=True)
    [slice(0, 1408, None), slice(1408, 2816, None), slice(2816, 4160, None)]
    >>> len(_blocks(4160, 64000, torch.device("cpu"), is_narrow=False))
    4
    """
    size = _on(device, CPU_BLOCK, GPU_BLOCK)
    least, most = (-(-rows // max(LEAST_ROWS, limit // row_bytes)) for limit in (2 * size, size))
    count = max(least, NARROW_BLOCKS) if is_narrow and most > NARROW_BLOCKS else most
    return _slices(rows, max(1, round_up_rows(-(-rows // max(1, count)))))


def room(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """Rows of the largest block of these targets; those of a slice, which is in fp32 as well where `dtype` is
    narrower; and bytes of each element of the sum that becomes the gradient of the head's weight.

    >>> room(4096, 128256, torch.bfloat16, torch.device("cuda"))
    (2048, 523, 2)
    """
    blocks = _blocks(round_up_rows(rows), vocabulary * dtype.itemsize, device, dtype != _wide(dtype))
    return blocks[0].stop, _slice_rows(vocabulary, device), _dtype_of_sums(blocks, dtype).itemsize


def _dtype_of_sums(blocks: list[slice], dtype: torch.dtype) -> torch.dtype:
    return _wide(dtype) if len(blocks) > NARROW_BLOCKS else dtype


def _slice_rows(vocabulary: int, device: torch.device) -> int:
    rows = max(1, _on(device, CPU_SLICE, GPU_SLICE) // vocabulary)
    return rows * _on(device, torch.get_num_threads(), 1)


def _on(device: torch.device, on_cpu: int, elsewhere: int) -> int:
    return on_cpu if device.type == "cpu" else elsewhere


def _slices(rows: int, step: int) -> list[slice]:
    """Slices that cover rows in order; one empty slice where rows is 0.

    >>> _slices(1000, 512)
    [slice(0, 512, None), slice(512, 1000, None)]
    """
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def _spent(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor * gradient, in its own memory: torch then refuses to give the gradient to a second backward pass.

    In training the factor is 1. On CPUs that is seen without a wait; of a forecast's tensors nothing is known.
    """
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1.0:
        increment_version(gradient)
        return gradient
    return gradient.mul_(factor)


def _total(weights_K: Tensor) -> Tensor:
    """Their sum: fp64, but on MPS, which has none."""
    return (weights_K if weights_K.device.type == "mps" else weights_K.double()).sum()


def _final(logits_SV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scale and softcap, in fp32 at least, with a graph."""
    logits_SV = logits_SV.to(_wide(logits_SV.dtype))
    logits_SV = logits_SV if scale == 1.0 else logits_SV * scale
    return logits_SV if softcap is None else softcap * torch.tanh(logits_SV / softcap)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
