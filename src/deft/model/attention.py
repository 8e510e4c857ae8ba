"""Attention on documents that lie end to end: one function behind transformers' AttentionInterface, named "deft".

The documents' lengths travel as a forward keyword, from `packing_arguments` through the model's own **kwargs to
`attend`. A model that drops keywords on the way is found by the self-test. Any forward without them (generation,
somebody else's code) gets ordinary attention under transformers' own mask, so the model stays usable as it is.

No mask is built for packed documents: transformers hands on a mask of four dimensions as it is, and `attend` ignores
it. A registered mask function that returns None would cost a host sync in each forward (transformers 5.23).

Shape suffixes: M tokens of a micro-batch, N documents of equal length T, Q query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from deft.core.hardware import to_device
from deft.model.cpu import document_attention

NAME = "deft"
HALF = (torch.bfloat16, torch.float16)

_VARLEN_TAKES_GQA = "enable_gqa" in signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class _Rules:
    """What one layer asks of its attention. sinks [Q]: logits that take part in the softmax and carry no value."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True, slots=True)
class PackedDocuments:
    """Documents' lengths and their edges, int32 [N + 1], in one value that compiled layers hand on.

    They would be compiled again for a tuple of another length, or a tensor of another shape.
    """

    lengths: tuple[int, ...]
    edges: Tensor


def packing_arguments(documents: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Forward keywords for documents that lie end to end in one row, all that padding-free models ask for.

    cu_seq_lens_* int32 [N + 1], max_length_* int, seq_idx int32 [1, M]; `documents` is for `attend`.
    """
    edges = _edges(documents, device)
    lengths = torch.tensor(documents)
    numbers = torch.arange(len(documents), dtype=torch.int32)
    seq_idx = numbers.repeat_interleave(lengths, output_size=sum(documents))[None]
    return {
        "attention_mask": _no_mask(device),
        "documents": documents,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(documents),
        "max_length_k": max(documents),
        "seq_idx": to_device(seq_idx, device),
    }


def compiled_arguments(documents: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The same for layers that are compiled, of models that pad nothing and need no more than attention does."""
    return {"attention_mask": _no_mask(device), "documents": PackedDocuments(documents, _edges(documents, device))}


def _no_mask(device: torch.device) -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _edges(documents: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(documents)], dtype=torch.int32), device)


@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: tuple[int, ...] | PackedDocuments | None = None,
    cu_seq_lens_q: Tensor | None = None,
    windows_seen: list[int | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: [1, M, Q, D], and None for the attention weights.

    query [1, Q, M, D], key and value [1, G, M, D]; `documents` sum to M. Token i of a document sees tokens j <= i,
    under a window W only those with i - j < W. `windows_seen` gets this layer's window appended, for the self-test.
    Without `documents`: query [B, Q, L, D], and attention_mask as transformers' SDPA mask builder makes it.
    """
    rules = _Rules(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    if documents is None:
        return _attend_under_mask(module, query, key, value, attention_mask, rules, kwargs), None
    if isinstance(documents, PackedDocuments):
        cu_seq_lens_q, documents = documents.edges, documents.lengths
    assert (query.shape[0], query.shape[2]) == (1, sum(documents)), "documents do not cover the micro-batch"
    if windows_seen is not None:
        windows_seen.append(sliding_window)
    if cu_seq_lens_q is not None and _fits_varlen(query, value, rules):
        return _attend_varlen(query, key, value, cu_seq_lens_q, max(documents), rules), None
    if query.device.type == "cpu" and rules.is_plain and rules.dropout == 0.0:
        return _DocumentAttention.apply(query, key, value, tuple(documents), rules.scaling, rules.window), None
    return _attend_per_document(query, key, value, documents, rules), None


def _fits_varlen(query: Tensor, value: Tensor, rules: _Rules) -> bool:
    fits_kernel = query.dtype in HALF and query.shape[-1] == value.shape[-1] <= 256
    return query.is_cuda and fits_kernel and rules.is_plain and rules.dropout == 0.0


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, rules: _Rules) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    arguments: dict[str, Any] = {"window_size": (-1, 0)}
    if groups > 1 and _VARLEN_TAKES_GQA:
        arguments["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if rules.window is not None:
        arguments["window_size"] = (rules.window - 1, 0)
    query_MQD, key_MGD, value_MGD = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = varlen_attn(
        query_MQD, key_MGD, value_MGD, edges, edges, longest, longest, scale=rules.scaling, **arguments
    )
    return out[None]


class _DocumentAttention(torch.autograd.Function):
    """`document_attention.forward` and `backward` on the tensors of the interface."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: tuple[int, ...],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        heads, groups = query.shape[1], key.shape[1]
        order = document_attention.document_order(documents, groups, query.device)
        query_rows = (query[0].transpose(0, 1) * scaling).reshape(-1, heads // groups, query.shape[-1])
        key_rows, value_rows = (x[0].transpose(0, 1).reshape(-1, x.shape[-1]) for x in (key, value))
        query, key, value = order.order(query_rows), order.order(key_rows), order.order(value_rows)
        out, kept = document_attention.forward(query, key, value, order, window)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rules = (order, scaling, window)
        return order.restore(out).reshape(1, -1, heads, value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        order, scaling, window = ctx.rules
        grad_rows = order.order_gradient(grad.reshape(-1, query.shape[1], value.shape[-1]))
        gradients = document_attention.backward(grad_rows, query, key, value, kept, order, window)
        d_query, d_key, d_value = (
            order.restore(x).view(grad.shape[1], -1, x.shape[-1]).transpose(0, 1)[None] for x in gradients
        )
        return d_query * scaling, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _attend_per_document(query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], rules: _Rules) -> Tensor:
    """Neighbours of equal length go together in one call, on views.

    Split, not sliced: the backward of one split is one concatenation, that of many slices a full-size zero tensor each.
    """
    runs = [(length, len(list(run))) for length, run in groupby(documents)]
    parts = zip(*(x[0].split([n * length for length, n in runs], dim=1) for x in (query, key, value)), strict=True)
    outs = []
    for (length, count), part in zip(runs, parts, strict=True):
        query_NQTD, key_NGTD, value_NGTD = (x.unflatten(1, (count, length)).transpose(0, 1) for x in part)
        outs.append(_attend_equal(query_NQTD, key_NGTD, value_NGTD, rules).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None]


def _attend_equal(query_NQTD: Tensor, key_NGTD: Tensor, value_NGTD: Tensor, rules: _Rules) -> Tensor:
    """[N, Q, T, D]: causal attention, each of the N documents by itself."""
    length, device = query_NQTD.shape[2], query_NQTD.device
    is_full = rules.window is None or rules.window >= length
    if not rules.is_plain:
        return _attend_by_matmul(query_NQTD, key_NGTD, value_NGTD, _visible(length, rules.window, device), rules)
    is_grouped = query_NQTD.shape[1] != key_NGTD.shape[1]
    if is_grouped and device.type == "cuda":
        # Grouped heads in fp32 or under a mask leave CUDA's SDPA only its quadratic kernel.
        groups = query_NQTD.shape[1] // key_NGTD.shape[1]
        key_NGTD, value_NGTD = (x.repeat_interleave(groups, dim=1) for x in (key_NGTD, value_NGTD))
        is_grouped = False
    return functional.scaled_dot_product_attention(
        query_NQTD,
        key_NGTD,
        value_NGTD,
        attn_mask=None if is_full else _visible(length, rules.window, device),
        dropout_p=rules.dropout,
        is_causal=is_full,
        scale=rules.scaling,
        enable_gqa=is_grouped,
    )


def _attend_by_matmul(
    query_NQTD: Tensor, key_NGSD: Tensor, value_NGSD: Tensor, visible: Tensor | None, rules: _Rules
) -> Tensor:
    """[N, Q, T, D] by definition, softmax in fp32: holds [N, Q, T, S]. `visible` bool, broadcast to [N, Q, T, S]."""
    n, q, t, d = query_NQTD.shape
    g, s = key_NGSD.shape[1:3]
    wide = torch.promote_types(query_NQTD.dtype, torch.float32)
    stacked = (query_NQTD * rules.scaling).reshape(n, g, q // g * t, d)
    scores_NQTS = (stacked @ key_NGSD.transpose(-1, -2)).view(n, q, t, s)
    if rules.softcap is not None:
        scores_NQTS = rules.softcap * torch.tanh(scores_NQTS.to(wide) / rules.softcap)
    if visible is not None:
        # Not -inf: a row of padding sees nothing, and would be NaN.
        scores_NQTS = scores_NQTS.masked_fill(~visible, torch.finfo(scores_NQTS.dtype).min)
    if rules.sinks is not None:
        sinks = rules.sinks.to(wide).view(1, q, 1, 1).expand(n, q, t, 1)
        scores_NQTS = torch.cat([scores_NQTS.to(wide), sinks], dim=-1)
    probs_NQTS = scores_NQTS.softmax(-1, dtype=wide)[..., :s].to(value_NGSD.dtype)
    probs_NQTS = functional.dropout(probs_NQTS, rules.dropout)
    return (probs_NQTS.reshape(n, g, q // g * t, s) @ value_NGSD).view(n, q, t, value_NGSD.shape[-1])


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T, T]: which tokens (columns) each token (row) of a document sees.

    >>> _visible(4, 2, torch.device("cpu")).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _attend_under_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rules: _Rules,
    kwargs: dict[str, Any],
) -> Tensor:
    """[B, L, Q, D]: transformers' own SDPA, or what it lacks (soft-cap, sinks) by matmul under the same mask."""
    if rules.is_plain:
        sdpa = AttentionInterface()["sdpa"]
        out = sdpa(module, query, key, value, mask, dropout=rules.dropout, scaling=rules.scaling, **kwargs)
        return out[0]
    if mask is None and query.shape[2] > 1:
        mask = _visible(query.shape[2], None, query.device)
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return _attend_by_matmul(query, key, value, mask, rules).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
