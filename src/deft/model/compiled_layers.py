"""Layers compiled for micro-batches of a few sizes, the buckets: for CUDA, where small operations wait for Python.

A micro-batch is padded to the next bucket with documents of which nothing is learnt; law 6 holds for them as for any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.core.types import MicroBatch
from deft.model.multimodal import text_body

FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
    }
)
"""Model types whose layers are known to compile without values, each tested: none routes tokens by them."""

MULTIPLE = 128
"""Buckets have a multiple of this many tokens; padding documents have at most four times as many."""
MOST_BUCKETS = 3
"""Each is compiled. A layer that differs in its window is compiled again, and torch stops after eight times."""
WASTE = 0.02
"""Another bucket is worth its compilation while filling up costs more than this share."""


@dataclass(frozen=True)
class CompiledLayers:
    """The compiled forward of each layer of a model, and the tokens, ascending, that micro-batches are filled up to.

    is_warm  every bucket has been seen: whatever would be compiled again from here on runs as it is
    """

    forwards: Mapping[nn.Module, Callable[..., Any]]
    buckets: tuple[int, ...]
    is_warm: bool = False

    def bucket(self, tokens: int) -> int | None:
        """The least that takes this many tokens; None where none does, and they run as they are."""
        return next((bucket for bucket in self.buckets if bucket >= tokens), None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the model's layers are the compiled ones; their backward pass may come later."""
        own = {layer: layer.__dict__["forward"] for layer in self.forwards if "forward" in layer.__dict__}
        for layer, forward in self.forwards.items():
            layer.forward = forward
        try:
            with torch.compiler.set_stance("eager_on_recompile" if self.is_warm else "default"):
                yield
        finally:
            for layer in self.forwards:
                del layer.forward
                if layer in own:
                    layer.forward = own[layer]


def compiled(
    model: PreTrainedModel, buckets: Sequence[int], backend: str | Callable[..., Any] = "inductor"
) -> CompiledLayers:
    """Layers that are compiled when they first meet a micro-batch of a bucket's size. Layers that are alike share that.

    Attention, whose work depends on the documents' lengths, stays outside (`attention.attend`).
    """
    own = {layer: type(layer).forward.__get__(layer) for layer in text_body(model).layers}
    return CompiledLayers(
        {layer: torch.compile(forward, backend=backend, dynamic=False) for layer, forward in own.items()},
        tuple(sorted(buckets)),
    )


def choose_buckets(sizes: Sequence[int], largest: int) -> tuple[int, ...]:
    """As few buckets as waste little on micro-batches of these sizes, `MOST_BUCKETS` at most; one takes `largest`.

    >>> choose_buckets([1000, 1020, 990], largest=1024), choose_buckets([1000, 500, 900, 1024, 10], largest=1024)
    ((1024,), (128, 512, 1024))
    """
    counts: dict[int, int] = {}
    for size in sizes:
        counts[_rounded(size)] = counts.get(_rounded(size), 0) + 1
    top = max(_rounded(largest), *counts)
    candidates = _thinned(sorted(counts.keys() - {top}))
    best: tuple[int, ...] = (top,)
    for count in range(MOST_BUCKETS):
        ways = [(*lower, top) for lower in combinations(candidates, count)]
        best = min(ways, key=lambda buckets: _filled(counts, buckets), default=best)
        if _filled(counts, best) <= (1 + WASTE) * sum(size * number for size, number in counts.items()):
            break
    return best


def _thinned(candidates: list[int], most: int = 40) -> list[int]:
    """At most `most` of them, evenly spread: pairs of them are tried."""
    return candidates[:: -(-len(candidates) // most)] if candidates else []


def _filled(counts: Mapping[int, int], buckets: Sequence[int]) -> int:
    """The tokens of all micro-batches once they are filled up."""
    return sum(number * min(bucket for bucket in buckets if bucket >= size) for size, number in counts.items())


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def pad(batch: MicroBatch, bucket: int) -> MicroBatch:
    """The micro-batch with padding documents behind it, so that it has as many tokens as the bucket.

    >>> batch = MicroBatch(torch.tensor([5, 6]), torch.tensor([0, 1]), (2,), *(torch.tensor([1]),) * 3)
    >>> filled = pad(batch, 6)
    >>> filled.documents, filled.tokens.tolist(), filled.positions.tolist()
    ((2, 4), [5, 6, 0, 0, 0, 0], [0, 1, 0, 1, 2, 3])
    """
    rest, longest = bucket - len(batch.tokens), 4 * MULTIPLE
    assert rest >= 0, "more tokens than the bucket has"
    padding = (*(longest,) * (rest // longest), *((rest % longest,) if rest % longest else ()))
    positions = torch.arange(rest, device=batch.positions.device) % longest
    return replace(
        batch,
        tokens=torch.cat([batch.tokens, batch.tokens.new_zeros(rest)]),
        positions=torch.cat([batch.positions, positions]),
        documents=(*batch.documents, *padding),
    )


def smallest(device: torch.device | str = "cpu") -> MicroBatch:
    """A micro-batch of one token and one target, which fits into every bucket."""
    zero: Tensor = torch.zeros(1, dtype=torch.int64, device=device)
    return MicroBatch(zero, zero, (1,), zero, zero, torch.ones(1, device=device))
