"""Rows of a source that stand side by side: what one process reads, and what travels to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from deft.core.errors import Problem
from deft.core.types import Origin, Row

FIRST_ROWS, MOST_ROWS = 16, 512


class Chunk(Protocol):
    """Rows of one file. Where a file is cut depends on its content alone.

    last  the line of the last row, and its item
    """

    @property
    def source(self) -> str: ...

    @property
    def last(self) -> tuple[int, int]: ...

    def read(self) -> Iterator[Row | Problem]: ...


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows that are read already."""

    source: str
    rows: tuple[Row | Problem, ...]

    @property
    def last(self) -> tuple[int, int]:
        row = self.rows[-1]
        origin = row.origin if isinstance(row, Row) else Origin.at(row.where)
        return origin.line, origin.item

    def read(self) -> Iterator[Row | Problem]:
        return iter(self.rows)


def of(rows: Iterable[Row | Problem], source: str) -> Iterator[HeldRows]:
    """The rows of one file in chunks.

    >>> [len(chunk.rows) for chunk in of([Problem("a:1", "bad")] * 50, "a")]
    [16, 32, 2]
    """
    rows = iter(rows)
    for size in sizes(FIRST_ROWS, MOST_ROWS):
        chunk = tuple(islice(rows, size))
        if not chunk:
            return
        yield HeldRows(source, chunk)


def limited(chunks: Iterable[Chunk], rows: int) -> Iterator[HeldRows]:
    """The first `rows` rows."""
    for chunk in chunks:
        found = tuple(islice(chunk.read(), rows))
        rows -= len(found)
        yield HeldRows(chunk.source, found)
        if not rows:
            return


def sizes(first: int, most: int) -> Iterator[int]:
    """Sizes that double up to `most`, without end: the first rows are soon there, and later chunks cost little."""
    size = first
    while True:
        yield size
        size = min(2 * size, most)
