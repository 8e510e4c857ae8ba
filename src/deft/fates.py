"""Encoded rows -> their last fate: held out, drawn, repeated; arrays alone, nothing is encoded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deft.data import mixture, split
from deft.store import FATES, Picked, Stage, Store
from deft.symptoms import SYMPTOMS
from deft.types import Fate, Origin

BIT: Mapping[str, int] = {name: 1 << place for place, name in enumerate(SYMPTOMS)}
"""The bit of each symptom in the column `symptoms`."""
_NUMBER = {fate: place for place, fate in enumerate(FATES)}


@dataclass(frozen=True, slots=True)
class Setting:
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


@dataclass(frozen=True)
class Contents:
    """The contents of the rows of several stores: `digests`, uint64, ascending; 8 bytes a row."""

    stores: tuple[Store, ...]
    digests: np.ndarray

    @classmethod
    def of(cls, stores: Sequence[Store] = ()) -> Contents:
        found = [store.columns["digest"][store.columns["stage"] == Stage.ENCODED] for store in stores]
        digests = np.concatenate([np.zeros(0, np.uint64), *found])
        digests.sort()
        return cls(tuple(stores), digests)

    def has(self, digests: np.ndarray) -> np.ndarray:
        """bool: which of `digests` are among them."""
        return _among(digests, self.digests)

    def origin(self, digest: int) -> Origin:
        """Where the last row with a digest stands."""
        for store in reversed(self.stores):
            rows = np.flatnonzero((store.columns["digest"] == digest) & (store.columns["stage"] == Stage.ENCODED))
            if len(rows):
                return store.origin(int(rows[-1]))
        raise KeyError(digest)

    def repeated(self) -> list[np.ndarray]:
        """bool [rows] of each store: the row says the same as an earlier one of any."""
        twice = np.unique(self.digests[1:][self.digests[1:] == self.digests[:-1]])
        flags = [np.zeros(len(store), bool) for store in self.stores]
        seen = np.zeros(len(twice), bool)
        for store, flag in zip(self.stores, flags, strict=True):
            for rows in store.slabs() if len(twice) else ():
                digests = store.columns["digest"][rows]
                is_copy = (store.columns["stage"][rows] == Stage.ENCODED) & _among(digests, twice)
                which = np.searchsorted(twice, digests[is_copy])
                first = np.unique(which, return_index=True)[1]
                is_new = np.zeros(len(which), bool)
                is_new[first] = ~seen[which[first]]
                seen[which] = True
                flag[rows.start + np.flatnonzero(is_copy)[~is_new]] = True
        return flags


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), bool)
    found = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[found] == values)


@dataclass(frozen=True)
class Settled:
    """The rows of a source with their last fates.

    fate      uint8 [rows]: place in FATES
    passes    uint16 [rows]: how often each is learnt in an epoch
    kept      bool [rows]: it has examples that are trained or evaluated
    symptoms  uint16 [rows]: a bit for each name of SYMPTOMS
    """

    store: Store
    setting: Setting
    taken: Contents
    fate: np.ndarray
    passes: np.ndarray
    kept: np.ndarray
    symptoms: np.ndarray

    def reason(self, row: int) -> str:
        """Why a row is not trained whole."""
        columns, fate = self.store.columns, FATES[self.fate[row]]
        if fate == Fate.HELD_OUT and not self.kept[row]:
            return f"stands in the evaluation data too: {self.taken.origin(int(columns['digest'][row]))}"
        if fate == Fate.LEFT_OUT and columns["stage"][row] == Stage.ENCODED:
            setting = self.setting
            return f"not among the {setting.times:g} of the source's rows that seed {setting.seed} draws"
        return self.store.reason(row)

    def named(self, row: int) -> list[str]:
        """The names of a row's symptoms."""
        return [name for name, bit in BIT.items() if self.symptoms[row] & bit]

    def train(self) -> Picked:
        """What an epoch learns, an example as often as it is learnt."""
        return self._picked(self.passes)

    def held_out(self) -> Picked:
        return self._picked((self.fate == _NUMBER[Fate.HELD_OUT]) & self.kept)

    def _picked(self, passes: np.ndarray) -> Picked:
        is_small = len(self.store.columns["example_parts"]) < 2**31
        found = [np.zeros(0, np.int32 if is_small else np.int64)]
        for rows in self.store.slabs():
            times, ends = passes[rows], self.store.columns["row_examples"][rows]
            counts = np.repeat(self.store.counts("row_examples", rows), times)
            first = np.repeat(ends, times) - counts
            index = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
            found.append(index.astype(found[0].dtype))
        return Picked(self.store, self.setting.loss_weight, np.concatenate(found))


def settle(store: Store, setting: Setting, taken: Contents, repeated: np.ndarray) -> Settled:
    """The last fates of a source's rows.

    taken     rows of the evaluation data: the same row here is held out
    repeated  bool [rows]: it says the same as an earlier one
    """
    columns, fate = store.columns, np.array(store.columns["fate"])
    is_taken, trained, kept = (np.zeros(len(store), bool) for _ in range(3))
    for rows in store.slabs():
        digest = columns["digest"][rows]
        is_taken[rows] = (columns["stage"][rows] == Stage.ENCODED) & taken.has(digest)
        kept[rows] = (store.counts("row_examples", rows) > 0) & ~is_taken[rows]
        trained[rows] = kept[rows] & ~(setting.is_eval | split.held_out(digest, setting.share))
    fate[is_taken | (kept & ~trained)] = _NUMBER[Fate.HELD_OUT]
    passes = np.zeros(len(store), np.uint16)
    passes[trained] = mixture.passes(int(trained.sum()), setting.times, setting.seed, setting.number)
    undrawn = trained & (passes == 0)
    fate[undrawn] = _NUMBER[Fate.LEFT_OUT]
    kept &= ~undrawn
    symptoms = np.array(columns["symptoms"])
    symptoms[_without_stop(store, setting.stop_ids)] |= BIT["no_stop"]
    symptoms[~kept] = 0
    symptoms[is_taken] |= BIT["in_evaluation"]
    symptoms[repeated] |= BIT["duplicate"]
    return Settled(store, setting, taken, fate, passes, kept, symptoms)


def _without_stop(store: Store, stop_ids: frozenset[int]) -> np.ndarray:
    """bool [rows]: a text of the row does not end with a token that stops the model."""
    rows, parts = store.columns["tail_row"], store.columns["tail_part"]
    stops = np.isin(store.columns["tail_token"], np.array(sorted(stop_ids), np.int64))
    begins = np.concatenate([np.full(min(1, len(rows)), True), (rows[1:] != rows[:-1]) | (parts[1:] != parts[:-1])])
    at = np.flatnonzero(begins)
    found = np.zeros(len(store), bool)
    if len(at):
        found[rows[at][~np.logical_or.reduceat(stops, at)]] = True
    return found
