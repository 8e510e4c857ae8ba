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
    """The contents of rows of several stores, and where they stand."""

    stores: tuple[Store, ...]
    digests: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, stores: Sequence[Store] = ()) -> Contents:
        digests = np.concatenate([np.zeros(0, np.uint64), *(store.columns["digest"] for store in stores)])
        encoded = [store.columns["stage"] == Stage.ENCODED for store in stores]
        places = np.flatnonzero(np.concatenate([np.zeros(0, bool), *encoded]))
        order = places[np.argsort(digests[places], kind="stable")]
        return cls(tuple(stores), digests[order], order)

    def has(self, digests: np.ndarray) -> np.ndarray:
        """bool: which of `digests` are among them."""
        if not len(self.digests):
            return np.zeros(len(digests), bool)
        found = np.minimum(np.searchsorted(self.digests, digests), len(self.digests) - 1)
        return np.asarray(self.digests[found] == digests)

    def origin(self, digest: int) -> Origin:
        """Where the last row with a digest stands."""
        place = int(self.places[np.searchsorted(self.digests, np.uint64(digest), side="right") - 1])
        for store in self.stores:
            if place < len(store):
                return store.origin(place)
            place -= len(store)
        raise KeyError(digest)

    def repeated(self) -> list[np.ndarray]:
        """bool [rows] of each store: the row says the same as an earlier one."""
        again = np.concatenate([np.zeros(min(1, len(self.digests)), bool), self.digests[1:] == self.digests[:-1]])
        flags = np.zeros(sum(map(len, self.stores)), bool)
        flags[self.places[again]] = True
        ends = np.cumsum([len(store) for store in self.stores])
        return np.split(flags, ends[:-1]) if len(ends) else []


@dataclass(frozen=True)
class Settled:
    """The rows of a source with their last fates.

    fate      uint8 [rows]: place in FATES
    passes    int64 [rows]: how often each is learnt in an epoch
    kept      bool [rows]: it has examples that are trained or evaluated
    symptoms  uint32 [rows]: a bit for each name of SYMPTOMS
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
        return self._picked(((self.fate == _NUMBER[Fate.HELD_OUT]) & self.kept).astype(np.int64))

    def _picked(self, passes: np.ndarray) -> Picked:
        rows = np.repeat(np.arange(len(passes)), passes)
        counts = self.store.counts("row_examples")[rows]
        first = self.store.columns["row_examples"][rows] - counts
        index = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        small = len(self.store.columns["example_parts"]) < 2**31
        return Picked(self.store, self.setting.loss_weight, index.astype(np.int32 if small else np.int64))


def settle(store: Store, setting: Setting, taken: Contents, repeated: np.ndarray) -> Settled:
    """The last fates of a source's rows.

    taken     rows of the evaluation data: the same row here is held out
    repeated  bool [rows]: it says the same as an earlier one
    """
    columns = store.columns
    digest, is_encoded = columns["digest"], columns["stage"] == Stage.ENCODED
    is_taken = is_encoded & taken.has(digest)
    has_examples = (store.counts("row_examples") > 0) & ~is_taken
    apart = has_examples & (setting.is_eval | split.held_out(digest, setting.share))
    trained = has_examples & ~apart
    passes = np.zeros(len(store), np.int64)
    passes[trained] = mixture.passes(int(trained.sum()), setting.times, setting.seed, setting.number)
    undrawn = trained & (passes == 0)
    fate = np.array(columns["fate"])
    fate[is_taken | apart] = _NUMBER[Fate.HELD_OUT]
    fate[undrawn] = _NUMBER[Fate.LEFT_OUT]
    kept = has_examples & ~undrawn
    found = columns["symptoms"] | np.where(_without_stop(store, setting.stop_ids), np.uint32(BIT["no_stop"]), 0)
    found = np.where(kept, found, 0) | np.where(is_taken, np.uint32(BIT["in_evaluation"]), 0)
    found = found | np.where(repeated, np.uint32(BIT["duplicate"]), 0)
    return Settled(store, setting, taken, fate, passes, kept, found.astype(np.uint32))


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
