"""Digests of the rows that a run learns, and what differs between two starts of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from deft.dataset.store import Examples

SHOWN_ROWS = 5


@dataclass(frozen=True)
class RowDigests:
    """A digest of each example that is trained, in order, and where it comes from. Arrays are [E].

    digest  int64    line  int64    source  int32, an index into `sources`
    """

    sources: tuple[str, ...]
    digest: np.ndarray
    line: np.ndarray
    source: np.ndarray

    @classmethod
    def of(cls, examples: Examples) -> RowDigests:
        names, lines, numbers = examples.origins()
        return cls(names, examples.digests(), lines, numbers)

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name; with `sources` they are the whole."""
        return {"digest": self.digest, "line": self.line, "source": self.source}

    def differences(self, now: RowDigests) -> dict[str, str]:
        """Source -> what is different in it now, by line.

        >>> def rows(*texts):
        ...     arrays = np.array([hash(text) for text in texts]), np.arange(1, len(texts) + 1)
        ...     return RowDigests(("a.jsonl",), *arrays, np.zeros(len(texts), np.int32))
        >>> rows("a", "b", "c").differences(rows("a", "x", "c"))
        {'a.jsonl': 'line 2'}
        >>> rows("a", "b", "c").differences(rows("a", "c"))
        {'a.jsonl': 'line 2 removed'}
        >>> rows("a", "b", "c").differences(rows("a", "c", "b", "d"))
        {'a.jsonl': 'line 4 added'}
        >>> rows("a", "b", "c").differences(rows("a", "c", "b"))
        {'a.jsonl': 'other order from line 2 on'}
        """
        if np.array_equal(self.digest, now.digest):
            return {}
        found: dict[str, str] = {}
        for number in range(max(len(self.sources), len(now.sources))):
            name = (now.sources if number < len(now.sources) else self.sources)[number]
            if difference := _difference(self._part(number), now._part(number)):
                found[name] = difference
        return found or {", ".join(now.sources): "the sources come in another order"}

    def _part(self, number: int) -> list[tuple[int, int]]:
        chosen = self.source == number
        return list(zip(self.digest[chosen].tolist(), self.line[chosen].tolist(), strict=True))


def _difference(before: list[tuple[int, int]], now: list[tuple[int, int]]) -> str:
    """What became of the rows (digest, line) of a source."""
    if [digest for digest, _ in before] == [digest for digest, _ in now]:
        return ""
    lost, new = _missing(before, now), _missing(now, before)
    if not lost and not new:
        first = next(line for (old, _), (mine, line) in zip(before, now, strict=True) if old != mine)
        return f"other order from line {first} on"
    edited = sorted(set(lost) & set(new)) if len(before) == len(now) else []
    told = [
        _lines(edited),
        _lines(sorted(set(lost) - set(edited)), " removed"),
        _lines(sorted(set(new) - set(edited)), " added"),
    ]
    return ", ".join(filter(None, told))


def _missing(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[int]:
    """The lines of those of `some` that are not among the others, as often as they are not."""
    left = Counter(digest for digest, _ in others)
    lines = []
    for digest, line in some:
        left[digest] -= 1
        if left[digest] < 0:
            lines.append(line)
    return lines


def _lines(lines: list[int], what: str = "") -> str:
    if not lines:
        return ""
    shown = ", ".join(map(str, lines[:SHOWN_ROWS])) + (
        f" and {len(lines) - SHOWN_ROWS} more" if len(lines) > SHOWN_ROWS else ""
    )
    return f"line{'s' if len(lines) > 1 else ''} {shown}{what}"
