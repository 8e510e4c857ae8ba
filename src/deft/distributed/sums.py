"""Gradients of several ranks, added one by one in the order of their micro-batches: the bits that one rank has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deft.distributed.world import World

BUCKET = 2**24
"""Elements that are sent at a time, or a whole gradient that has more."""


@dataclass
class OrderedSums:
    """Sums in fp32 of gradients over rounds, in each of which every rank has computed at most one micro-batch.

    Each rank keeps a part of every sum, to which the ranks' gradients are added in order. Where a rank has no gradient
    it sends -0.0, which changes no bit of a sum; and one element a parameter says who had one.

    like  the parameters, by name
    """

    world: World
    like: Mapping[str, Tensor]
    _sums: list[Tensor] = field(default_factory=list)

    def add(self, gradients: dict[str, Tensor], ranks: int) -> None:
        """Adds the next round's gradients, by name, of this rank; they are used up.

        ranks  that have computed a micro-batch in this round: the first ones
        """
        for index, names in enumerate(self._buckets()):
            received = self.world.exchange(self._flat(names, gradients))
            for part in received[:ranks]:
                if index == len(self._sums):
                    self._sums.append(part.to(torch.float32, copy=True))
                else:
                    self._sums[index] += part

    def take(self) -> dict[str, Tensor]:
        """The sums by name, whole and in fp32, of the parameters that any rank had a gradient of."""
        found: dict[str, Tensor] = {}
        for names in self._buckets():
            flat = self.world.gather(self._sums.pop(0))
            sizes = [self.like[name].numel() for name in names]
            *sums, counts, _ = flat.split([*sizes, len(names), len(flat) - sum(sizes) - len(names)])
            for name, total, count in zip(names, sums, counts.tolist(), strict=True):
                if count:
                    found[name] = total.view(self.like[name].shape)
        return found

    def _flat(self, names: list[str], gradients: dict[str, Tensor]) -> Tensor:
        """[ranks, n]: gradients end to end, then how many there are of each; what fills up the rest is never read."""
        first = self.like[names[0]]
        size = sum(self.like[name].numel() for name in names)
        width = -(-(size + len(names)) // self.world.size)
        flat, end = torch.full((self.world.size * width,), -0.0, dtype=first.dtype, device=first.device), 0
        for index, name in enumerate(names):
            gradient, start = gradients.pop(name, None), end
            end += self.like[name].numel()
            if gradient is not None:
                flat[start:end] = gradient.reshape(-1)
                flat[size + index] = 1.0
        return flat.view(self.world.size, width)

    def _buckets(self) -> Iterator[list[str]]:
        """Names of parameters of one dtype that are sent together."""
        names: list[str] = []
        size = 0
        for name, each in self.like.items():
            if names and (size + each.numel() > BUCKET or each.dtype != self.like[names[0]].dtype):
                yield names
                names, size = [], 0
            names.append(name)
            size += each.numel()
        if names:
            yield names
