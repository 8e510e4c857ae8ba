"""What became of each row: one fate each, counted, and named by file and line where something was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deft.encoding.rows import EncodedRow
from deft.errors import Problem
from deft.types import Fate

NAMED_ROWS = 100
"""So many rows of each fate are named in ledger.json; the counts are of all."""


@dataclass(frozen=True, slots=True)
class SourceLedger:
    """The rows of one source.

    shape     the format that reads it
    fates     rows by fate; they sum to `rows`
    examples  what the batch counts; a long text gives several
    lost      (row, fate, reason) of rows that were not trained whole
    literal   rows with special tokens in their text, encoded as text
    apart     rows whose prompt and answer had to be encoded apart
    """

    source: str
    shape: str
    rows: int
    fates: dict[str, int]
    examples: int
    tokens: int
    target_tokens: int
    longest: int
    literal: int
    apart: int
    lost: tuple[tuple[str, str, str], ...]

    def as_json(self) -> dict[str, Any]:
        named = {fate: [row for row in self.lost if row[1] == fate][:NAMED_ROWS] for fate in self.fates}
        lost = [{"row": row, "fate": fate, "reason": why} for rows in named.values() for row, fate, why in rows]
        fields = ("source", "shape", "rows", "fates", "examples", "tokens", "target_tokens", "longest")
        counts = {name: getattr(self, name) for name in fields}
        return {**counts, "special_tokens_as_text": self.literal, "encoded_apart": self.apart, "lost": lost}


def account(source: str, shape: str, rows: Sequence[EncodedRow], unread: Iterable[Problem]) -> SourceLedger:
    """The ledger of a source: `rows` as encoded, `unread` what its format refused."""
    unread = list(unread)
    fates = Counter({fate.value: 0 for fate in Fate})
    fates.update(row.fate.value for row in rows)
    fates[Fate.REFUSED.value] += len(unread)
    parts = [part for row in rows for example in row.examples for part in example]
    lost = [(str(row.conversation.origin), row.fate.value, row.reason) for row in rows if row.fate != Fate.TRAINED]
    lost += [(problem.where, Fate.REFUSED.value, _why(problem)) for problem in unread]
    return SourceLedger(
        source=source,
        shape=shape,
        rows=len(rows) + len(unread),
        fates=dict(fates),
        examples=sum(len(row.examples) for row in rows),
        tokens=sum(len(part.tokens) for part in parts),
        target_tokens=sum(int((part.weights[1:] > 0).sum()) for part in parts),
        longest=max((len(part.tokens) for part in parts), default=0),
        literal=sum(row.literal > 0 for row in rows),
        apart=sum(row.apart for row in rows),
        lost=tuple(lost),
    )


def named(ledgers: Iterable[SourceLedger], fate: Fate) -> list[Problem]:
    """The rows of all sources that met a fate, with the reason."""
    return [Problem(row, reason) for ledger in ledgers for row, met, reason in ledger.lost if met == fate.value]


def _why(problem: Problem) -> str:
    return f"{problem.what}; {problem.fix}" if problem.fix else problem.what
