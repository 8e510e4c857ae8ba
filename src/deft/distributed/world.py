"""The ranks that compute one run together, and what they share. A world of one rank is a world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of all ranks. So far there is one.

    rank  from 0
    mesh  how the ranks share weights; None where each has them whole

    >>> world = World()
    >>> world.rank, world.size, world.sum(2.5), world.from_first(lambda: "runs/today")
    (0, 1, 2.5, 'runs/today')
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        if (self.rank, self.size) != (0, 1):
            raise NotImplementedError("a world of several ranks")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, on every rank."""
        return values

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank: for what depends on the moment or on the machine."""
        return make()

    def wait(self) -> None:
        """Returns once every rank has come here."""
