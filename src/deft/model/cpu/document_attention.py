"""Causal attention of documents on CPUs: matrix products over blocks of queries, with a backward pass of its own.

A block of queries meets only the keys that it sees, so half of the products are never made, and the query heads that
share a key head are rows of one product, so keys and values are never repeated. Documents of nearly equal length are
one batch.

Shape suffixes: B documents times key heads, T tokens of a document, S = T * R rows of queries (R query heads for each
key head, token by token), K keys that a block sees, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Given = ParamSpec("Given")
Made = TypeVar("Made")

BLOCK = 192
"""Queries of a block. Smaller ones waste less on keys that most of them do not see, and keep fewer probabilities;
larger ones are fewer calls."""

KEPT_LENGTH = 1024
"""Documents up to this long keep their probabilities for the backward pass. Those of longer ones are computed again:
what is kept grows with the tokens, not with their square."""

TOGETHER = 512
"""Tokens of documents that are one batch, where it is more than one."""


@dataclass(frozen=True, slots=True)
class DocumentOrder:
    """How rows of (token, key head) are put in order so that documents of nearly equal length are one batch.

    Documents are padded at their end to few different lengths, as each new shape costs a kernel. That is exact: no
    token sees a later one, and what padding computes is dropped and gets no gradient.

    runs    (documents, padded length), by length
    forth   int64 [P]: which of the M * G rows comes next, by run, document, key head, token
    back    int64 [M * G]: where each row went
    pads    int64: the places among P that hold a row for the second time, as padding
    groups  key heads
    """

    runs: tuple[tuple[int, int], ...]
    forth: Tensor
    back: Tensor
    pads: Tensor
    groups: int

    def order(self, rows: Tensor) -> Tensor:
        """[M * G, ...] -> [P, ...]"""
        return rows.index_select(0, self.forth)

    def order_gradient(self, rows: Tensor) -> Tensor:
        """The same, with zeros in the padding."""
        ordered = self.order(rows)
        return ordered.index_fill_(0, self.pads, 0.0) if len(self.pads) else ordered

    def restore(self, rows: Tensor) -> Tensor:
        """[P, ...] -> [M * G, ...]"""
        return rows.index_select(0, self.back)

    def batches(self, rows: Tensor) -> list[Tensor]:
        """Ordered rows [P, ...] -> for each run a view [B, T, ...]."""
        parts = rows.split([count * self.groups * length for count, length in self.runs])
        return [
            part.unflatten(0, (count * self.groups, length))
            for (count, length), part in zip(self.runs, parts, strict=True)
        ]


def _table(size: int) -> Callable[[Callable[Given, Made]], Callable[Given, Made]]:
    """Keeps what a function returned; real tensors, also where everything else is only its shape (forecast.py)."""

    def keeping(make: Callable[Given, Made]) -> Callable[Given, Made]:
        @wraps(make)
        def real(*arguments: Given.args, **more: Given.kwargs) -> Made:
            with _disable_current_modes():
                return make(*arguments, **more)

        return lru_cache(maxsize=size)(real)  # type: ignore[return-value]

    return keeping


@_table(8)
def document_order(documents: tuple[int, ...], groups: int, device: torch.device) -> DocumentOrder:
    """For documents that lie end to end, and for `groups` key heads.

    >>> made = document_order((16, 9, 16), 1, torch.device("cpu"))
    >>> made.runs, made.forth[16:27].tolist(), made.pads.tolist()
    (((2, 16), (1, 16)), [16, 17, 18, 19, 20, 21, 22, 23, 24, 24, 24], [25, 26, 27, 28, 29, 30, 31])
    """
    alike: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in documents:
        alike.setdefault(_padded(length), []).append((start, length))
        start += length
    runs = [(padded, run) for padded in sorted(alike) for run in _batched(alike[padded], padded)]
    parts, are_pads = [], []
    for padded, run in runs:
        starts_N, lengths_N = torch.tensor(run).unbind(1)
        places_T = torch.arange(padded)
        tokens_NT = starts_N[:, None] + torch.minimum(places_T, lengths_N[:, None] - 1)
        parts.append((tokens_NT[:, None] * groups + torch.arange(groups)[:, None]).flatten())
        are_pads.append((places_T >= lengths_N[:, None])[:, None].expand(-1, groups, -1).flatten())
    forth, is_pad = torch.cat(parts), torch.cat(are_pads)
    back = torch.empty(start * groups, dtype=torch.int64)
    back[forth[~is_pad]] = torch.arange(len(forth))[~is_pad]
    sizes = tuple((len(run), padded) for padded, run in runs)
    return DocumentOrder(sizes, forth.to(device), back.to(device), is_pad.nonzero()[:, 0].to(device), groups)


def _batched(documents: list[tuple[int, int]], length: int) -> Iterator[list[tuple[int, int]]]:
    """Documents of a length a power of two at a time, of at most TOGETHER tokens where it is more than one.

    >>> [len(run) for run in _batched([(0, 0)] * 7, 32)], [len(run) for run in _batched([(0, 0)] * 4, 192)]
    ([4, 2, 1], [2, 2])
    """
    while documents:
        most = max(1, min(len(documents), TOGETHER // length))
        count = 1 << (most.bit_length() - 1)
        yield documents[:count]
        documents = documents[count:]


def _padded(length: int) -> int:
    step = 16 if length <= 64 else 32
    return -(-length // step) * step


def products(documents: tuple[int, ...]) -> int:
    """How many sizes of matrix products attention on these documents has, forward and backward.

    >>> products((30, 31, 400))
    24
    """
    runs = set(document_order(documents, 1, torch.device("cpu")).runs)
    return 6 * sum(-(-length // BLOCK) for _, length in runs)


def forward(
    query: Tensor, key: Tensor, value: Tensor, order: DocumentOrder, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Rows that `order` has ordered -> rows of the output, and the probabilities that `backward` is given back.

    query [P, R, D], already scaled; key [P, D]; value [P, E]; output [P, R, E].
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    kept: list[Tensor] = []
    for (_, length), query_BTRD, key_BTD, value_BTE, out_BTRE in zip(
        order.runs, *(order.batches(rows) for rows in (query, key, value, out)), strict=True
    ):
        query_BSD, out_BSE = query_BTRD.flatten(1, 2), out_BTRE.flatten(1, 2)
        repeat = query_BTRD.shape[2]
        for block in _blocks(length, window):
            probs_BSK = _probabilities(query_BSD, key_BTD, block, repeat)
            torch.bmm(probs_BSK, value_BTE[:, block.keys], out=out_BSE[:, block.rows(repeat)])
            if length <= KEPT_LENGTH:
                kept.append(probs_BSK)
    return out, kept


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
    order: DocumentOrder,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query (in its dtype), key and value (both summed in fp32), from that of the output.

    Without `kept` all probabilities are computed again.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    d_query = torch.empty_like(query)
    d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    probabilities = iter(kept)
    for (_, length), *batches in zip(
        order.runs, *(order.batches(rows) for rows in (grad, query, d_query, key, value, d_key, d_value)), strict=True
    ):
        repeat = batches[0].shape[2]
        grad_BSE, query_BSD, d_query_BSD = (batch.flatten(1, 2) for batch in batches[:3])
        key_BTD, value_BTE, d_key_BTD, d_value_BTE = batches[3:]
        for block in _blocks(length, window):
            rows, keys = block.rows(repeat), block.keys
            is_kept = kept and length <= KEPT_LENGTH
            probs_BSK = next(probabilities) if is_kept else _probabilities(query_BSD, key_BTD, block, repeat)
            d_value_BTE[:, keys].add_(torch.bmm(probs_BSK.transpose(1, 2), grad_BSE[:, rows]))
            d_probs_BSK = torch.bmm(grad_BSE[:, rows], value_BTE[:, keys].transpose(1, 2))
            d_scores_BSK = torch.ops.aten._softmax_backward_data.out(
                d_probs_BSK, probs_BSK, -1, probs_BSK.dtype, grad_input=d_probs_BSK
            )
            torch.bmm(d_scores_BSK, key_BTD[:, keys], out=d_query_BSD[:, rows])
            d_key_BTD[:, keys].add_(torch.bmm(d_scores_BSK.transpose(1, 2), query_BSD[:, rows]))
    return d_query, d_key, d_value


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries [start, end) of a document, and the keys [first, end) that any of them sees."""

    first: int
    start: int
    end: int
    window: int | None

    @property
    def keys(self) -> slice:
        return slice(self.first, self.end)

    def rows(self, repeat: int) -> slice:
        return slice(self.start * repeat, self.end * repeat)


def _blocks(length: int, window: int | None) -> Iterator[_Block]:
    """
    >>> [(block.first, block.start, block.end) for block in _blocks(400, None)]
    [(0, 0, 192), (0, 192, 384), (0, 384, 400)]
    >>> [(block.first, block.start, block.end) for block in _blocks(400, 10)]
    [(0, 0, 192), (183, 192, 384), (375, 384, 400)]
    """
    for start in range(0, length, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(first, start, min(start + BLOCK, length), window)


def _probabilities(query_BSD: Tensor, key_BTD: Tensor, block: _Block, repeat: int) -> Tensor:
    """[B, S, K] in the dtype of the query, its softmax in fp32."""
    count = block.end - block.start
    later = _later(count, repeat, query_BSD.dtype, query_BSD.device)
    queries, keys = query_BSD[:, block.rows(repeat)], key_BTD[:, block.keys].transpose(1, 2)
    if block.first == block.start:
        scores_BSK = torch.baddbmm(later, queries, keys)
    else:
        scores_BSK = torch.bmm(queries, keys)
        scores_BSK[:, :, -count:].add_(later)
    if block.window is not None and block.end - block.first > block.window:
        too_far = _too_far(count, block.start - block.first - block.window, repeat, scores_BSK.dtype, scores_BSK.device)
        scores_BSK[:, :, :count].add_(too_far)
    return torch.softmax(scores_BSK, -1, out=scores_BSK)


@_table(512)
def _later(count: int, repeat: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count * repeat, count]: -inf where the key comes after the query, else 0; each query is `repeat` rows.

    >>> _later(2, 2, torch.float32, torch.device("cpu"))
    tensor([[0., -inf],
            [0., -inf],
            [0., 0.],
            [0., 0.]])
    """
    return _masked(torch.ones(count, count, dtype=torch.bool).triu(1), repeat, dtype, device)


@_table(512)
def _too_far(count: int, ahead: int, repeat: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for the first keys of a block, where the first query has left `ahead` + 1 of them behind its window.

    >>> _too_far(2, 0, 1, torch.float32, torch.device("cpu"))
    tensor([[-inf, 0.],
            [-inf, -inf]])
    """
    return _masked(torch.ones(count, count, dtype=torch.bool).tril(ahead), repeat, dtype, device)


def _masked(hidden: Tensor, repeat: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
    return mask.repeat_interleave(repeat, 0).to(device)
