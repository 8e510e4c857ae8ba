"""Of ranks that hold the same rows of a tensor, the lowest writes them and sends them: who that is, key by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deft.distributed.notes import Notes
from deft.distributed.shards import Rows
from deft.distributed.world import World

Owner = tuple[int, int, int]
"""A rank, and the rows [start, stop) that it is the one to write."""


@dataclass(frozen=True)
class Owners:
    """What this rank holds of tensors that no rank holds whole, and what it has to write of it.

    rows    by key
    own     keys whose rows this rank writes
    others  on rank 0: who writes which rows of each key, itself included
    """

    world: World = field(default_factory=World)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    others: Mapping[str, tuple[Owner, ...]] = field(default_factory=dict)

    def gather(self, key: str, part: Tensor) -> Tensor | None:
        """Every rank's rows of a tensor -> the whole, on rank 0, and None on the others; all have to ask for it.

        part  this rank's rows. It goes from rank to rank as it is: rank 0 takes no more room than the whole
        """
        if key not in self.rows:
            return part if self.world.is_first else None
        if not self.world.is_first:
            if key in self.own:
                self.world.send(part.contiguous())
            return None
        whole = part.new_empty(self.rows[key].shape)
        for rank, start, stop in self.others[key]:
            if rank == 0:
                whole[start:stop] = part
            elif stop > start:
                self.world.receive(whole[start:stop], rank)
        return whole

    def renamed(self, names: Mapping[str, str]) -> Owners:
        """The same of those in `names`: what a key is called from here on -> what it was called."""
        rows = {name: self.rows[old] for name, old in names.items() if old in self.rows}
        others = {name: self.others[old] for name, old in names.items() if old in self.others}
        own = frozenset(name for name, old in names.items() if old in self.own)
        return Owners(self.world, rows, own, others)


def agree(name: str, rows: Mapping[str, Rows], world: World) -> Owners:
    """What every rank has to write, from what each holds: to be called by all of them, or by none.

    name  of what is agreed on; no two are alike in a run
    """
    if world.watch is None:
        return Owners(world, rows, frozenset(rows), {key: ((0, each.start, each.stop),) for key, each in rows.items()})
    notes = Notes(world.watch, f"owners/{name}")
    notes.leave(f"rows/{world.rank}", {key: (each.start, each.stop) for key, each in rows.items()})
    if not world.is_first:
        return Owners(world, rows, frozenset(notes.take(f"own/{world.rank}")))
    every = [notes.take(f"rows/{rank}") for rank in range(world.size)]
    others = {key: owners(key, each.shape[0], (held.get(key) for held in every)) for key, each in rows.items()}
    own: defaultdict[int, list[str]] = defaultdict(list)
    for key, found in others.items():
        for rank, _, _ in found:
            own[rank].append(key)
    for rank in range(1, world.size):
        notes.leave(f"own/{rank}", own[rank])
    return Owners(world, rows, frozenset(own[0]), others)


def owners(key: str, count: int, held: Iterable[tuple[int, int] | None]) -> tuple[Owner, ...]:
    """Who writes which of `count` rows, in their order; `held` is what each rank holds. Each row has one owner.

    >>> owners("weight.a", 5, [(0, 3), (3, 5), (0, 3), (3, 5), (5, 5)])
    ((0, 0, 3), (1, 3, 5))
    """
    lowest: dict[tuple[int, int], int] = {}
    for rank, rows in enumerate(held):
        if rows is not None and (rows[1] > rows[0] or not (count or lowest)):
            lowest.setdefault((rows[0], rows[1]), rank)
    found = tuple((rank, *rows) for rows, rank in sorted(lowest.items()))
    ends = [0, *(stop for _, _, stop in found)]
    assert [*(start for _, start, _ in found), count] == ends, f"{key}: {count} rows, held {found}"
    return found
