"""What became of each row: one fate each, counted, and named by file and line where something was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deft.errors import Problem
from deft.fates import BIT, Settled
from deft.store import FATES
from deft.symptoms import SYMPTOMS, Finding
from deft.types import Fate

NAMED_ROWS = 100
"""So many rows of each fate are named in ledger.json; the counts are of all."""
FIRST_ROWS = 5
"""So many rows are named beside a symptom, and so many of the longest."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is true of `rows` rows of a source; `first` are the first of them."""

    name: str
    rows: int
    first: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "first": list(self.first)}


@dataclass(frozen=True, slots=True)
class SourceLedger:
    """The rows of one source.

    shape         the format that reads it
    fates         rows by fate; they sum to `rows`
    examples      what the batch counts; a long text gives several
    lengths       texts that the model is shown, by tokens: ("17-32", 7); a row that had to be split has several
    longest_rows  (row, tokens of its longest text), the longest first
    symptoms      what may be wrong with rows that are trained
    fallbacks     other ways to hand a row to the chat template that its proof needed
    lost          (row, fate, reason) of the first rows of each fate but trained
    """

    source: str
    shape: str
    rows: int
    fates: dict[str, int]
    examples: int
    tokens: int
    target_tokens: int
    lengths: tuple[tuple[str, int], ...]
    longest_rows: tuple[tuple[str, int], ...]
    symptoms: tuple[Seen, ...]
    fallbacks: tuple[Seen, ...]
    lost: tuple[tuple[str, str, str], ...]

    def __post_init__(self) -> None:
        assert sum(self.fates.values()) == self.rows, f"{self.source}: {self.fates} are not {self.rows} rows"

    @property
    def longest(self) -> int:
        return self.longest_rows[0][1] if self.longest_rows else 0

    @property
    def target_share(self) -> float:
        return self.target_tokens / max(1, self.tokens)

    def count(self, symptom: str) -> int:
        """The rows that have a symptom."""
        return next((seen.rows for seen in self.symptoms if seen.name == symptom), 0)

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("source", "shape", "rows", "fates", "examples", "tokens")},
            "target_tokens": self.target_tokens,
            "target_share": round(self.target_share, 4),
            "longest": self.longest,
            "lengths": dict(self.lengths),
            "longest_rows": [{"row": row, "tokens": tokens} for row, tokens in self.longest_rows],
            "symptoms": {seen.name: seen.as_json() for seen in self.symptoms},
            "fallbacks": {seen.name: seen.as_json() for seen in self.fallbacks},
            "lost": [{"row": row, "fate": fate, "reason": why} for row, fate, why in self.lost],
        }


def account(source: str, shape: str, rows: Settled) -> SourceLedger:
    """The ledger of a source."""
    store = rows.store
    ends = np.concatenate([[0], store.columns["example_parts"]])[store.columns["row_examples"]]
    lengths, kept_parts = store.counts("part_tokens"), np.repeat(rows.kept, np.diff(ends, prepend=0))
    learnt = store.columns["part_targets"]
    fates = np.bincount(rows.fate, minlength=len(FATES))
    return SourceLedger(
        source=source,
        shape=shape,
        rows=len(store),
        fates={fate.value: int(count) for fate, count in zip(FATES, fates, strict=True)},
        examples=int(store.counts("row_examples")[rows.kept].sum()),
        tokens=int(lengths[kept_parts].sum()),
        target_tokens=int(learnt[kept_parts].sum(dtype=np.int64)),
        lengths=histogram(lengths[kept_parts]),
        longest_rows=_longest(rows, lengths, ends),
        symptoms=_symptoms(rows),
        fallbacks=_fallbacks(rows),
        lost=tuple(_lost(rows)),
    )


def _longest(rows: Settled, lengths: np.ndarray, ends: np.ndarray) -> tuple[tuple[str, int], ...]:
    """The rows with the longest texts, of equal ones the first."""
    kept = np.flatnonzero(rows.kept)
    if not len(kept):
        return ()
    # Rows between two that are kept have no part, or parts that are not kept.
    begins = ends[kept] - np.diff(ends, prepend=0)[kept]
    edges = np.stack([begins, ends[kept]], axis=1).ravel()
    longest = np.maximum.reduceat(np.concatenate([lengths, [0]]), edges)[::2]
    first = np.argsort(-longest, kind="stable")[:FIRST_ROWS].tolist()
    return tuple((str(rows.store.origin(int(kept[place]))), int(longest[place])) for place in first)


def _symptoms(rows: Settled) -> tuple[Seen, ...]:
    return _seen(rows, {name: np.flatnonzero(rows.symptoms & bit) for name, bit in BIT.items()})


def _fallbacks(rows: Settled) -> tuple[Seen, ...]:
    notes, codes = rows.store.notes, np.where(rows.kept, rows.store.columns["notes"], -1)
    having = {note: [code for code, each in enumerate(notes) if note in each] for each in notes for note in each}
    return _seen(rows, {note: np.flatnonzero(np.isin(codes, found)) for note, found in having.items()})


def _seen(rows: Settled, found: Mapping[str, np.ndarray]) -> tuple[Seen, ...]:
    """What is true of some rows, in the order in which they come."""
    met = sorted((places[0], name) for name, places in found.items() if len(places))
    return tuple(
        Seen(name, len(found[name]), tuple(str(rows.store.origin(int(row))) for row in found[name][:FIRST_ROWS]))
        for _, name in met
    )


def _lost(rows: Settled) -> Iterator[tuple[str, str, str]]:
    """The first rows of each fate but trained, those that were encoded before those that could not be read."""
    for number, fate in enumerate(FATES):
        if fate != Fate.TRAINED:
            found = np.flatnonzero(rows.fate == number)
            found = found[np.argsort(rows.store.columns["stage"][found], kind="stable")]
            yield from (
                (str(rows.store.origin(row)), fate.value, rows.reason(row)) for row in found[:NAMED_ROWS].tolist()
            )


def histogram(lengths: np.ndarray) -> tuple[tuple[str, int], ...]:
    """How many lengths lie between two powers of two, from the shortest to the longest.

    >>> histogram(np.array([5, 8, 17, 64]))
    (('5-8', 2), ('9-16', 0), ('17-32', 1), ('33-64', 1))
    """
    if not len(lengths):
        return ()
    counts = np.bincount(np.searchsorted(2 ** np.arange(62), lengths))
    bits = range(int(np.flatnonzero(counts)[0]), len(counts))
    return tuple((f"{(1 << bit >> 1) + 1}-{1 << bit}", int(counts[bit])) for bit in bits)


def findings(ledgers: Sequence[SourceLedger]) -> list[Finding]:
    """The symptoms of all sources together, one finding each, in the order of SYMPTOMS; then the fallbacks."""
    symptoms = _merged([seen for ledger in ledgers for seen in ledger.symptoms])
    found = [
        Finding(symptom.level, symptom.of(symptoms[name].rows), symptom.fix, _first(symptoms[name]))
        for name, symptom in SYMPTOMS.items()
        if name in symptoms
    ]
    for how, seen in _merged([seen for ledger in ledgers for seen in ledger.fallbacks]).items():
        fix = "proven like the others: the prompt is what the template shows at inference"
        found.append(Finding("note", f"masks of {seen.rows} rows needed a fallback: {how}", fix, _first(seen)))
    return found


def _merged(seen: Iterable[Seen]) -> dict[str, Seen]:
    """What was seen in several sources, by name."""
    merged: dict[str, Seen] = {}
    for each in seen:
        so_far = merged.get(each.name, Seen(each.name, 0, ()))
        merged[each.name] = Seen(each.name, so_far.rows + each.rows, (*so_far.first, *each.first)[:FIRST_ROWS])
    return merged


def _first(seen: Seen) -> tuple[str, ...]:
    return seen.first if seen.rows == len(seen.first) else (*seen.first, "...")


def named(ledgers: Iterable[SourceLedger], fate: Fate) -> list[Problem]:
    """The first rows of all sources that met a fate, with the reason."""
    return [Problem(row, reason) for ledger in ledgers for row, met, reason in ledger.lost if met == fate.value]


def met(ledgers: Iterable[SourceLedger], fate: Fate) -> int:
    """How many rows of all sources met a fate."""
    return sum(ledger.fates[fate.value] for ledger in ledgers)
