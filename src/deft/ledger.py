"""What became of each row: one fate each, counted, and named by file and line where something was lost."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deft.encoding.rows import EncodedRow
from deft.errors import Problem
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
    lost          (row, fate, reason) of rows that were not trained whole
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
        named = {fate: [row for row in self.lost if row[1] == fate][:NAMED_ROWS] for fate in self.fates}
        return {
            **{name: getattr(self, name) for name in ("source", "shape", "rows", "fates", "examples", "tokens")},
            "target_tokens": self.target_tokens,
            "target_share": round(self.target_share, 4),
            "longest": self.longest,
            "lengths": dict(self.lengths),
            "longest_rows": [{"row": row, "tokens": tokens} for row, tokens in self.longest_rows],
            "symptoms": {seen.name: seen.as_json() for seen in self.symptoms},
            "fallbacks": {seen.name: seen.as_json() for seen in self.fallbacks},
            "lost": [{"row": row, "fate": fate, "reason": why} for rows in named.values() for row, fate, why in rows],
        }


def account(
    source: str,
    shape: str,
    rows: Iterable[EncodedRow],
    unread: Iterable[Problem],
    symptoms: Callable[[EncodedRow], Sequence[str]] = lambda row: (),
) -> SourceLedger:
    """The ledger of a source: `rows` as encoded, read once; `unread` what its format refused.

    symptoms  names what may be wrong with a row
    """
    added = _Account()
    for row in rows:
        added.add(row, symptoms(row))
    refused = [(problem.where, Fate.REFUSED.value, _why(problem)) for problem in unread]
    added.fates[Fate.REFUSED.value] += len(refused)
    return SourceLedger(
        source=source,
        shape=shape,
        rows=added.fates.total(),
        fates=dict(added.fates),
        examples=added.examples,
        tokens=sum(added.lengths),
        target_tokens=added.target_tokens,
        lengths=histogram(added.lengths),
        longest_rows=tuple((origin, length) for length, _, origin in sorted(added.longest, reverse=True)),
        symptoms=added.symptoms.seen(),
        fallbacks=added.fallbacks.seen(),
        lost=tuple(added.lost + refused),
    )


@dataclass
class _Account:
    """Adds up rows as they come. `longest` is a heap of (tokens, -place, row), the shortest of the longest on top."""

    fates: Counter[str] = field(default_factory=lambda: Counter({fate.value: 0 for fate in Fate}))
    examples: int = 0
    target_tokens: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    longest: list[tuple[int, int, str]] = field(default_factory=list)
    symptoms: _Names = field(default_factory=lambda: _Names())
    fallbacks: _Names = field(default_factory=lambda: _Names())
    lost: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, row: EncodedRow, symptoms: Sequence[str]) -> None:
        origin = str(row.conversation.origin)
        parts = [part for example in row.examples for part in example]
        if parts:
            longest = (max(len(part.tokens) for part in parts), -self.fates.total(), origin)
            (heapq.heappush if len(self.longest) < FIRST_ROWS else heapq.heappushpop)(self.longest, longest)
        self.fates[row.fate.value] += 1
        self.examples += len(row.examples)
        self.target_tokens += sum(int((part.weights[1:] > 0).sum()) for part in parts)
        self.lengths.extend(len(part.tokens) for part in parts)
        if row.fate != Fate.TRAINED:
            self.lost.append((origin, row.fate.value, row.reason))
        self.symptoms.add(symptoms, origin)
        self.fallbacks.add(row.notes, origin)


@dataclass
class _Names:
    """Counts names, and keeps the first rows of each."""

    rows: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, names: Iterable[str], origin: str) -> None:
        for name in names:
            self.rows[name] += 1
            if self.rows[name] <= FIRST_ROWS:
                self.first[name].append(origin)

    def seen(self) -> tuple[Seen, ...]:
        return tuple(Seen(name, rows, tuple(self.first[name])) for name, rows in self.rows.items())


def histogram(lengths: Iterable[int]) -> tuple[tuple[str, int], ...]:
    """How many lengths lie between two powers of two, from the shortest to the longest.

    >>> histogram([5, 8, 17, 64])
    (('5-8', 2), ('9-16', 0), ('17-32', 1), ('33-64', 1))
    """
    counts = Counter((length - 1).bit_length() for length in lengths)
    if not counts:
        return ()
    bits = range(min(counts), max(counts) + 1)
    return tuple((f"{(1 << bit >> 1) + 1}-{1 << bit}", counts[bit]) for bit in bits)


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
    """The rows of all sources that met a fate, with the reason."""
    return [Problem(row, reason) for ledger in ledgers for row, met, reason in ledger.lost if met == fate.value]


def _why(problem: Problem) -> str:
    return f"{problem.what}; {problem.fix}" if problem.fix else problem.what
