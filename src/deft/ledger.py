"""What became of each row: one fate each, counted, and named by file and line where something was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deft.errors import Problem
from deft.fates import BIT, Settled
from deft.store import FATES, last
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
    fates = np.bincount(rows.fate, minlength=len(FATES))
    counted = _Counted()
    for slab in rows.store.slabs():
        counted.add(rows, slab)
    return SourceLedger(
        source=source,
        shape=shape,
        rows=len(rows.store),
        fates={fate.value: int(count) for fate, count in zip(FATES, fates, strict=True)},
        examples=counted.examples,
        tokens=counted.tokens,
        target_tokens=counted.targets,
        lengths=histogram(counted.bits),
        longest_rows=tuple((str(rows.store.origin(row)), length) for length, row in counted.longest),
        symptoms=_seen(rows, {name: np.flatnonzero(rows.symptoms & bit) for name, bit in BIT.items()}),
        fallbacks=_fallbacks(rows),
        lost=tuple(_lost(rows)),
    )


@dataclass
class _Counted:
    """Adds up rows as they come.

    bits     texts by the bits that their tokens less one have
    longest  (tokens of its longest text, row), the longest first, of equal ones the first
    """

    examples: int = 0
    tokens: int = 0
    targets: int = 0
    bits: np.ndarray = field(default_factory=lambda: np.zeros(64, np.int64))
    longest: list[tuple[int, int]] = field(default_factory=list)

    def add(self, rows: Settled, slab: slice) -> None:
        store, kept = rows.store, rows.kept[slab]
        examples = store.columns["row_examples"][slab]
        first = store.start("example_parts", store.start("row_examples", slab.start))
        ends = last(store.columns["example_parts"], examples)
        counts = np.diff(ends, prepend=first)
        places = slice(first, int(ends[-1]))
        is_kept = np.repeat(kept, counts)
        lengths = store.counts("part_tokens", places)
        self.examples += int(store.counts("row_examples", slab)[kept].sum())
        self.tokens += int(lengths[is_kept].sum())
        self.targets += int(store.columns["part_targets"][places][is_kept].sum(dtype=np.int64))
        self.bits += np.bincount(np.searchsorted(_POWERS, lengths[is_kept]), minlength=64)
        whole = np.flatnonzero(kept & (counts > 0))
        if len(whole):
            longest = np.maximum.reduceat(lengths, (ends - counts)[whole] - first)
            best = np.argsort(-longest, kind="stable")[:FIRST_ROWS]
            found = [(int(longest[place]), slab.start + int(whole[place])) for place in best]
            self.longest = sorted([*self.longest, *found], key=lambda each: (-each[0], each[1]))[:FIRST_ROWS]


_POWERS = 2 ** np.arange(62)


def _fallbacks(rows: Settled) -> tuple[Seen, ...]:
    notes, codes = rows.store.notes, rows.store.columns["notes"]
    having = {note: [code for code, each in enumerate(notes) if note in each] for each in notes for note in each}
    return _seen(rows, {note: np.flatnonzero(np.isin(codes, found) & rows.kept) for note, found in having.items()})


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


def histogram(bits: np.ndarray) -> tuple[tuple[str, int], ...]:
    """How many lengths lie between two powers of two, from the shortest to the longest.

    bits  how many lengths, less one, have 0 bits, 1 bit, ...

    >>> histogram(np.array([0, 0, 0, 2, 0, 1, 1, 0]))
    (('5-8', 2), ('9-16', 0), ('17-32', 1), ('33-64', 1))
    """
    met = np.flatnonzero(bits)
    between = range(int(met[0]), int(met[-1]) + 1) if len(met) else range(0)
    return tuple((f"{(1 << bit >> 1) + 1}-{1 << bit}", int(bits[bit])) for bit in between)


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
