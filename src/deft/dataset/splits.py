"""Encoded rows -> their last fate: held out, drawn, repeated; computed from arrays, nothing is encoded again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deft.core.types import Fate, Origin
from deft.dataset.data_warnings import BIT
from deft.dataset.source import SourceSpec
from deft.dataset.store import FATES, RowGroup, Selection, Stage, Store
from deft.encoding.rows import OUT_OF_FP32, is_fp32

_NUMBER = {fate: place for place, fate in enumerate(FATES)}


@dataclass(frozen=True, slots=True)
class SplitRule:
    """What decides over the rows of a source beside their words.

    share      of its rows that is held out by content, or all with `is_eval`
    times      how often a row is learnt in an epoch; a share of them where it is no whole number, drawn by seed
    number     of the source among those of the run
    stop_ids   tokens that stop the exported model
    """

    share: float = 0.0
    is_eval: bool = False
    times: float = 1.0
    loss_weight: float = 1.0
    seed: int = 0
    number: int = 0
    stop_ids: frozenset[int] = frozenset()

    def of(self, source: SourceSpec, number: int) -> SplitRule:
        """The rule of a source, the `number`th of the run."""
        return replace(self, times=source.times, loss_weight=source.loss_weight, number=number)


@dataclass(frozen=True)
class ContentIndex:
    """The contents of the encoded rows of several stores. digests: uint64, ascending."""

    stores: tuple[Store, ...]
    digests: np.ndarray

    @classmethod
    def of(cls, stores: Sequence[Store] = ()) -> ContentIndex:
        return cls(tuple(stores), np.sort(_digests(stores)))

    def has(self, digests: np.ndarray) -> np.ndarray:
        """bool: which of `digests`, uint64, are among them."""
        return _among(digests, self.digests)

    def origin(self, digest: int) -> Origin:
        """Where the last row with a digest stands."""
        for store in reversed(self.stores):
            for group in reversed(store.groups):
                rows = np.flatnonzero((group.arrays["digest"] == np.uint64(digest)) & _is_encoded(group))
                if len(rows):
                    return group.origin(int(rows[-1]))
        raise KeyError(digest)

    def repeated(self) -> list[np.ndarray]:
        """bool [rows] of each store: the row has the words of an earlier one of any."""
        digests = _digests(self.stores)
        groups = (group for store in self.stores for group in store.groups)
        is_encoded = np.concatenate([np.zeros(0, bool), *map(_is_encoded, groups)])
        twice = np.unique(self.digests[1:][self.digests[1:] == self.digests[:-1]])
        copies = np.flatnonzero(_among(digests, twice))
        is_later = np.ones(len(copies), bool)
        is_later[np.unique(digests[copies], return_index=True)[1]] = False
        flags = np.zeros(len(is_encoded), bool)
        flags[np.flatnonzero(is_encoded)[copies[is_later]]] = True
        return np.split(flags, np.cumsum([len(store) for store in self.stores])[:-1]) if self.stores else []


def _is_encoded(group: RowGroup) -> np.ndarray:
    return np.asarray(group.arrays["stage"] == Stage.ENCODED)


def _digests(stores: Sequence[Store]) -> np.ndarray:
    """uint64: of all encoded rows, in order."""
    found = [group.arrays["digest"][_is_encoded(group)] for store in stores for group in store.groups]
    return np.concatenate([np.zeros(0, np.uint64), *found], dtype=np.uint64)


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), bool)
    found = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[found] == values)


@dataclass(frozen=True)
class SplitRows:
    """The rows of a source with their last fates.

    fate      uint8 [rows]: an index of FATES
    passes    uint16 [rows]: how often each is learnt in an epoch
    kept      bool [rows]: it has examples that are trained or evaluated
    warnings  uint32 [rows]: a bit for each name of WARNINGS
    """

    store: Store
    rule: SplitRule
    evaluated: ContentIndex
    fate: np.ndarray
    passes: np.ndarray
    kept: np.ndarray
    warnings: np.ndarray

    def reason(self, row: int) -> str:
        """Why a row is not trained whole."""
        fate = FATES[self.fate[row]]
        if fate == Fate.REFUSED and self.store.value(row, "fate") != self.fate[row]:
            return f"loss_weight: {self.rule.loss_weight:g} of its source times its own weights is {OUT_OF_FP32}"
        if fate == Fate.HELD_OUT and not self.kept[row]:
            return f"stands in the evaluation data too: {self.evaluated.origin(self.store.value(row, 'digest'))}"
        if fate == Fate.LEFT_OUT and self.store.value(row, "stage") == Stage.ENCODED:
            return f"not among the {self.rule.times:g} of the source's rows that seed {self.rule.seed} draws"
        return str(self.store.value(row, "reason"))

    def warnings_of(self, row: int) -> list[str]:
        """The names of a row's warnings."""
        return [name for name, bit in BIT.items() if self.warnings[row] & bit]

    def train(self) -> Selection:
        """What an epoch learns, an example as often as it is learnt."""
        return self._selected(self.passes)

    def held_out(self) -> Selection:
        return self._selected((self.fate == _NUMBER[Fate.HELD_OUT]) & self.kept)

    def _selected(self, passes: np.ndarray) -> Selection:
        """The examples of each row as often as `passes` says, those of a row together each time."""
        dtype = np.int32 if self.store.examples < 2**31 else np.int64
        found = [np.zeros(0, dtype)]
        for group in self.store.groups:
            times = passes[group.rows]
            counts = np.repeat(group.counts("examples"), times)
            first = np.repeat(group.arrays["examples_offsets"][:-1].astype(np.int64), times) + group.examples.start
            index = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
            found.append(index.astype(dtype))
        return Selection(self.store, self.rule.loss_weight, np.concatenate(found))


def assign_splits(store: Store, rule: SplitRule, evaluated: ContentIndex, repeated: np.ndarray) -> SplitRows:
    """The last fates of a source's rows.

    evaluated  rows of the evaluation data: the same row here is held out
    repeated   bool [rows]: it has the words of an earlier one
    """
    fate = store.column("fate")
    is_evaluated, trained, kept, stops = (np.zeros(len(store), bool) for _ in range(4))
    for group in store.groups:
        rows, digest = group.rows, group.arrays["digest"]
        is_evaluated[rows] = _is_encoded(group) & evaluated.has(digest)
        is_weighed = _is_weighed(group, rule.loss_weight)
        fate[rows][~is_weighed] = _NUMBER[Fate.REFUSED]
        kept[rows] = (group.counts("examples") > 0) & is_weighed & ~is_evaluated[rows]
        trained[rows] = kept[rows] & ~(rule.is_eval | held_out(digest, rule.share))
        stops[rows] = _stops(group, rule.stop_ids)
    fate[is_evaluated | (kept & ~trained)] = _NUMBER[Fate.HELD_OUT]
    passes = np.zeros(len(store), np.uint16)
    passes[trained] = passes_of(int(trained.sum()), rule.times, rule.seed, rule.number)
    undrawn = trained & (passes == 0)
    fate[undrawn] = _NUMBER[Fate.LEFT_OUT]
    kept &= ~undrawn
    warnings = store.column("warnings")
    warnings[~stops] |= BIT["no_stop"]
    warnings[~kept] = 0
    warnings[is_evaluated] |= BIT["in_evaluation"]
    warnings[repeated] |= BIT["duplicate"]
    return SplitRows(store, rule, evaluated, fate, passes, kept, warnings)


def held_out(digests: np.ndarray, share: float) -> np.ndarray:
    """bool [rows]: true for about `share` of all digests, uint64; the same words always fall on the same side.

    >>> held_out(np.array([2**62, 2**63], np.uint64), 0.5).tolist()
    [True, False]
    """
    limit = math.ceil(share * 2**64)
    return np.full(len(digests), True) if limit >= 2**64 else digests < np.uint64(limit)


def passes_of(rows: int, times: float, seed: int, source: int) -> np.ndarray:
    """uint16 [rows]: how often each row is learnt per epoch: floor(times), and once more for a share drawn by seed.

    The share is exact to half a row, and the same in every epoch. `source` counts the sources, so that equal files draw
    apart.

    >>> passes_of(4, 1.5, seed=0, source=0).tolist(), passes_of(4, 3.0, seed=0, source=0).tolist()
    ([1, 2, 2, 1], [3, 3, 3, 3])
    """
    whole = int(times)
    found = np.full(rows, whole, np.uint16)
    if times > whole:
        order = np.random.Generator(np.random.Philox(key=[seed, source])).permutation(rows)
        found[order[: round((times - whole) * rows)]] += 1
    return found


def _is_weighed(group: RowGroup, loss_weight: float) -> np.ndarray:
    """bool [rows]: every weight of the row that is not 0 is still none under the `loss_weight` of its source."""
    found = np.ones(len(group.counts("examples")), bool)
    if loss_weight == 1.0:
        return found  # weights of rows were looked at when they were encoded
    of_part = np.repeat(np.arange(len(group.counts("parts"))), group.counts("parts"))
    of_run = np.repeat(of_part, group.counts("runs"))
    weight, scale = group.arrays["weight"].astype(np.float64), group.arrays["scale"][of_run] * loss_weight
    lost = of_run[~is_fp32(weight, scale)]
    found[np.searchsorted(group.arrays["examples_offsets"], lost, side="right") - 1] = False
    return found


def _stops(group: RowGroup, stop_ids: frozenset[int]) -> np.ndarray:
    """bool [rows]: every text of the row ends with a token that stops the model."""
    rows = np.repeat(np.arange(len(group.counts("tails"))), group.counts("tails"))
    found = np.ones(len(group.counts("tails")), bool)
    starts = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(group.arrays["text"], prepend=-1))
    if len(starts):
        is_stop = np.isin(group.arrays["token"], np.array(sorted(stop_ids), np.int64))
        found[rows[starts][~np.logical_or.reduceat(is_stop, starts)]] = False
    return found
