"""What became of each row: one fate each, counted, and named by file and line where something was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deft.core.errors import Problem, kind_of_problem
from deft.core.types import Fate
from deft.dataset.data_warnings import BIT, WARNINGS, Finding
from deft.dataset.splits import SplitRows
from deft.dataset.store import FATES, RowGroup

NAMED_ROWS = 100
"""The rows of each fate that are named in ledger.json; the counts are of all."""
FIRST_ROWS = 5
"""The rows that are named beside a warning, and as the longest."""


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
    warnings      what may be wrong with rows that are trained
    fallbacks     other template inputs that the proof of rows needed
    lost          (row, fate, reason) of the first rows of each fate but trained
    reasons       (kind, rows): how many are refused for each kind of reason
    unread        fields that nothing reads, and how many rows say something there
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
    warnings: tuple[Seen, ...]
    fallbacks: tuple[Seen, ...]
    lost: tuple[tuple[str, str, str], ...]
    unread: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        assert sum(self.fates.values()) == self.rows, f"{self.source}: {self.fates} are not {self.rows} rows"

    @property
    def longest(self) -> int:
        return self.longest_rows[0][1] if self.longest_rows else 0

    @property
    def target_share(self) -> float:
        return self.target_tokens / max(1, self.tokens)

    def count(self, warning: str) -> int:
        """The rows that have a warning."""
        return next((seen.rows for seen in self.warnings if seen.name == warning), 0)

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("source", "shape", "rows", "fates", "examples", "tokens")},
            "target_tokens": self.target_tokens,
            "target_share": round(self.target_share, 4),
            "longest": self.longest,
            "lengths": dict(self.lengths),
            "longest_rows": [{"row": row, "tokens": tokens} for row, tokens in self.longest_rows],
            "symptoms": {seen.name: seen.as_json() for seen in self.warnings},
            "fallbacks": {seen.name: seen.as_json() for seen in self.fallbacks},
            "not_read": dict(self.unread),
            "lost": [{"row": row, "fate": fate, "reason": why} for row, fate, why in self.lost],
        }


def account(source: str, shape: str, rows: SplitRows, unread: Mapping[str, int]) -> SourceLedger:
    """The ledger of a source."""
    fates = np.bincount(rows.fate, minlength=len(FATES))
    counted, reasons = _Counted(), _reasons(rows)
    for group in rows.store.groups:
        counted.add(group, rows.kept[group.rows])
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
        warnings=_seen(rows, {name: np.flatnonzero(rows.warnings & bit) for name, bit in BIT.items()}),
        fallbacks=_seen(rows, _fallbacks(rows)),
        lost=tuple(_lost(rows, reasons)),
        unread=unread,
        reasons=tuple((kind, count) for kind, (_, count) in reasons.items()),
    )


@dataclass
class _Counted:
    """Adds up row groups as they come.

    bits     texts by the bits that their tokens less one have
    longest  (tokens of its longest text, row), the longest first, of equal ones the first
    """

    examples: int = 0
    tokens: int = 0
    targets: int = 0
    bits: np.ndarray = field(default_factory=lambda: np.zeros(64, np.int64))
    longest: list[tuple[int, int]] = field(default_factory=list)

    def add(self, group: RowGroup, kept: np.ndarray) -> None:
        """kept: bool [R], the rows that have examples that are trained or evaluated."""
        lengths = group.counts("tokens")
        starts = group.arrays["parts_offsets"][group.arrays["examples_offsets"]]
        is_kept = np.repeat(kept, np.diff(starts))
        self.examples += int(group.counts("examples")[kept].sum())
        self.tokens += int(lengths[is_kept].sum())
        self.targets += int(group.arrays["targets"][is_kept].sum())
        self.bits += np.bincount(np.searchsorted(_POWERS, lengths[is_kept]), minlength=64)
        whole = np.flatnonzero(np.diff(starts) > 0)
        if len(whole):
            longest = np.maximum.reduceat(lengths, starts[whole])
            best = np.argsort(np.where(kept[whole], -longest, 1), kind="stable")[:FIRST_ROWS]
            self.longest += [(int(longest[i]), group.rows.start + int(whole[i])) for i in best if kept[whole[i]]]
            self.longest = sorted(self.longest, key=lambda each: (-each[0], each[1]))[:FIRST_ROWS]


_POWERS = 2 ** np.arange(62)


def _fallbacks(rows: SplitRows) -> dict[str, np.ndarray]:
    """The rows that needed each fallback."""
    found: dict[str, list[np.ndarray]] = {}
    for group in rows.store.groups:
        column = group.batch.column("fallbacks")
        codes = column.indices.fill_null(-1).to_numpy()
        for code, lines in enumerate(column.dictionary.to_pylist()):
            places = group.rows.start + np.flatnonzero((codes == code) & rows.kept[group.rows])
            for line in lines.splitlines():
                found.setdefault(line, []).append(places)
    return {line: np.sort(np.concatenate(places)) for line, places in found.items()}


def _seen(rows: SplitRows, found: Mapping[str, np.ndarray]) -> tuple[Seen, ...]:
    """What is true of some rows, in the order in which they come."""
    met = sorted((places[0], name) for name, places in found.items() if len(places))
    return tuple(
        Seen(name, len(found[name]), tuple(str(rows.store.origin(int(row))) for row in found[name][:FIRST_ROWS]))
        for _, name in met
    )


def _lost(rows: SplitRows, reasons: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, str, str]]:
    """The first rows of each fate but trained, those that were encoded before those that could not be read, and of the
    refused the first of each kind of reason before others."""
    stages = rows.store.column("stage")
    first = np.array([row for row, _ in reasons.values()], np.int64)
    for number, fate in enumerate(FATES):
        if fate != Fate.TRAINED:
            found = np.flatnonzero(rows.fate == number)
            found = found[np.lexsort((stages[found], ~np.isin(found, first)))]
            yield from (
                (str(rows.store.origin(row)), fate.value, rows.reason(row)) for row in found[:NAMED_ROWS].tolist()
            )


def _reasons(rows: SplitRows) -> dict[str, tuple[int, int]]:
    """The kinds of reasons for which rows are refused: the first row of each, and how many there are."""
    found: dict[str, tuple[int, int]] = {}
    for group in rows.store.groups:
        places = np.flatnonzero(rows.fate[group.rows] == FATES.index(Fate.REFUSED))
        texts = group.batch.column("reason").take(places).dictionary_encode()
        codes, index, counts = np.unique(texts.indices.to_numpy(), return_index=True, return_counts=True)
        for code, place, count in zip(codes.tolist(), places[index].tolist(), counts.tolist(), strict=True):
            kind = kind_of_problem(texts.dictionary[code].as_py())
            first, so_far = found.get(kind, (group.rows.start + place, 0))
            found[kind] = first, so_far + count
    return found


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
    """The warnings of all sources together, one finding each, in the order of WARNINGS; then the fallbacks."""
    warnings = _merged([seen for ledger in ledgers for seen in ledger.warnings])
    found = [
        Finding(warning.level, warning.of(warnings[name].rows), warning.fix, _first(warnings[name]))
        for name, warning in WARNINGS.items()
        if name in warnings
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
    """The first rows of all sources that met a fate, with the reason, and how many have the same beyond them."""
    return [problem for ledger in ledgers for problem in _named(ledger, fate)]


def _named(ledger: SourceLedger, fate: Fate) -> Iterator[Problem]:
    problems = [Problem(row, reason) for row, met, reason in ledger.lost if met == fate.value]
    unnamed = Counter(dict(ledger.reasons if fate == Fate.REFUSED else ()))
    unnamed.subtract(kind_of_problem(problem.what) for problem in problems)
    for problem in problems:
        yield replace(problem, others=max(0, unnamed.pop(kind_of_problem(problem.what), 0)))


def met(ledgers: Iterable[SourceLedger], fate: Fate) -> int:
    """How many rows of all sources met a fate."""
    return sum(ledger.fates[fate.value] for ledger in ledgers)
