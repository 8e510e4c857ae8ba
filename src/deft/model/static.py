"""Micro-batches of one shape, and layers compiled for it once: for CUDA, where small operations wait for Python.

What fills a micro-batch up are documents of their own, of which nothing is learnt: attention does not cross into them,
no gradient comes out of them. Law 6 holds for them as for any document.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deft.model.towers import text_body
from deft.types import Batch


@dataclass(frozen=True, slots=True)
class Room:
    """The tokens and the documents that every micro-batch is filled up to."""

    tokens: int
    documents: int

    @classmethod
    def for_all(cls, batches: Iterable[Batch], multiple: int = 128) -> Room:
        """The least that takes each of them, tokens as a multiple of `multiple`: what fills up is a token at least."""
        sizes = [(len(batch.tokens), len(batch.documents)) for batch in batches]
        documents = 1 + max(count for _, count in sizes)
        tokens = max(tokens + documents - count for tokens, count in sizes)
        return cls(-(-tokens // multiple) * multiple, documents)


def fill(batch: Batch, room: Room) -> Batch:
    """The micro-batch with dead documents behind it: of one token each, the last with all that is left.

    >>> batch = Batch(torch.tensor([5, 6]), torch.tensor([0, 1]), (2,), *(torch.tensor([1]),) * 3)
    >>> filled = fill(batch, Room(tokens=6, documents=3))
    >>> filled.documents, filled.tokens.tolist(), filled.positions.tolist()
    ((2, 1, 3), [5, 6, 0, 0, 0, 0], [0, 1, 0, 0, 1, 2])
    """
    singles = room.documents - len(batch.documents) - 1
    rest = room.tokens - len(batch.tokens) - singles
    assert singles >= 0, "more documents than there is room for"
    assert rest > 0, "more tokens than there is room for"
    return replace(
        batch,
        tokens=_longer(batch.tokens, batch.tokens.new_zeros(singles + rest)),
        positions=_longer(batch.positions, batch.positions.new_zeros(singles), torch.arange(rest)),
        documents=(*batch.documents, *(1,) * singles, rest),
    )


def _longer(*parts: Tensor) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts])


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compiles each decoder layer of a model for the shape of the first micro-batch that it meets; how many.

    Attention, whose work depends on the documents' lengths, stays outside (`attention.attend`), so that none of them is
    compiled again for a micro-batch that was filled to the same room.
    """
    layers = text_body(model).layers
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
    return len(layers)
