"""NEFTune: uniform noise on the embeddings of what is trained on. arXiv 2310.05914, algorithm 1.

A document of L tokens with H numbers each gets alpha / sqrt(L * H) times numbers from -1 to 1, drawn from a seed of its
own, so that they are the same whatever it is packed with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Noise:
    """documents: tokens and seed of each."""

    alpha: float
    documents: tuple[tuple[int, int], ...]

    def of(self, indices: Sequence[int]) -> Noise:
        """That of some of the documents alone."""
        return replace(self, documents=tuple(self.documents[index] for index in indices))

    def added(self, embedded: Tensor) -> Tensor:
        """embedded [..., H] holds the documents end to end, and then padding, which gets none.

        >>> noise = Noise(2.0, ((3, 1), (1, 2)))
        >>> one = noise.added(torch.zeros(5, 4))
        >>> one.abs().amax(1) <= 2.0 / torch.tensor([3 * 4, 3 * 4, 3 * 4, 1 * 4, torch.inf]).sqrt()
        tensor([True, True, True, True, True])
        >>> torch.equal(noise.of([1]).added(torch.zeros(1, 4)), one[3:4])
        True
        """
        drawn = [self._drawn(length, seed, embedded) for length, seed in self.documents]
        rest = embedded.shape[:-1].numel() - sum(length for length, _ in self.documents)
        noise = functional.pad(torch.cat(drawn), (0, 0, 0, rest))
        return embedded + noise.view(embedded.shape).to(embedded.dtype)

    def _drawn(self, length: int, seed: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        size, width = (length, like.shape[-1]), self.alpha / math.sqrt(length * like.shape[-1])
        return torch.empty(size, device=like.device).uniform_(-width, width, generator=generator)


@contextmanager
def on(embedding: nn.Module, noise: Noise | None) -> Iterator[None]:
    """While it lasts, what the embedding gives has noise."""
    if noise is None:
        yield
        return

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return noise.added(output)

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
