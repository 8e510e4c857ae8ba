"""Strings that remember where their characters came from, through everything that a chat template does to them.

A `Traced` is a str made of runs: (owner, length). The owner is the index of the message that a character belongs to, or
TEMPLATE. Operators and the string methods that templates use keep it; whatever loses it yields characters that belong
to the template, which the prompt law then notices as words of a message that are missing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

TEMPLATE = -1
"""The owner of characters that no message wrote."""

Run = tuple[int, int]


class Traced(str):
    """A string with the owner of each character.

    >>> text = "<user>" + Traced.of("  hello ", owner=3).strip() + "</user>"
    >>> text, text.runs
    ('<user>hello</user>', ((-1, 6), (3, 5), (-1, 7)))
    """

    __slots__ = ("runs",)
    runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run]) -> Traced:
        self = super().__new__(cls, text)
        self.runs = _merged(runs)
        return self

    @classmethod
    def of(cls, text: str, owner: int) -> Traced:
        return cls(text, ((owner, len(text)),))

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Traced:
        return Traced(str.__add__(self, other), (*self.runs, *_runs(other)))

    def __radd__(self, other: str) -> Traced:
        return Traced(str.__add__(other, self), (*_runs(other), *self.runs))

    def __mul__(self, times: SupportsIndex) -> Traced:
        return Traced(str.__mul__(self, times), self.runs * int(times))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Traced:
        return _format(self, values)

    def __rmod__(self, pattern: str) -> Traced:
        return _format(pattern, self)

    def __getitem__(self, key: Any) -> Traced:
        start, stop, step = _bounds(key, len(self))
        if step != 1:
            owners = self.owners()
            return Traced(str.__getitem__(self, key), ((owner, 1) for owner in owners[key]))
        return Traced(str.__getitem__(self, key), _cut(self.runs, start, stop))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def owners(self) -> list[int]:
        """The owner of each character."""
        return [owner for owner, length in self.runs for _ in range(length)]

    def lstrip(self, chars: str | None = None, /) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> Traced:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Traced:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        if not old:
            return Traced.of(str.replace(self, old, new, count), TEMPLATE)
        return join(new, self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._located(str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._located(str.rsplit(self, sep, maxsplit), sep or "")

    def splitlines(self, keepends: bool = False) -> list[Traced]:  # type: ignore[override]
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[Traced, Traced, Traced]:
        return self._three(len(str.partition(self, sep)[0]), len(str.partition(self, sep)[1]))

    def rpartition(self, sep: str, /) -> tuple[Traced, Traced, Traced]:
        return self._three(len(str.rpartition(self, sep)[0]), len(str.rpartition(self, sep)[1]))

    def _three(self, head: int, middle: int) -> tuple[Traced, Traced, Traced]:
        return self[:head], self[head : head + middle], self[head + middle :]

    def lower(self) -> Traced:
        return self._same_length(str.lower(self))

    def upper(self) -> Traced:
        return self._same_length(str.upper(self))

    def capitalize(self) -> Traced:
        return self._same_length(str.capitalize(self))

    def title(self) -> Traced:
        return self._same_length(str.title(self))

    def _same_length(self, text: str) -> Traced:
        return Traced(text, self.runs) if len(text) == len(self) else Traced.of(text, TEMPLATE)

    def _located(self, pieces: list[str], sep: str = "") -> list[Traced]:
        """Pieces that stand in this string in their order, cut out of it again with their owners."""
        found, at = [], 0
        for index, piece in enumerate(pieces):
            start = self.find(piece, at + (len(sep) if index else 0)) if piece else at
            found.append(self[start : start + len(piece)])
            at = start + len(piece)
        return found


def join(separator: str, pieces: Iterable[Any]) -> Traced:
    """`separator.join(map(str, pieces))`, with the owners kept.

    >>> join(", ", ["a", Traced.of("b", 0)]).runs
    ((-1, 3), (0, 1))
    """
    texts = [str(piece) for piece in pieces]
    runs: list[Run] = []
    for index, text in enumerate(texts):
        if index:
            runs.extend(_runs(separator))
        runs.extend(_runs(text))
    return Traced(str.join(separator, texts), runs)


def _runs(text: str) -> tuple[Run, ...]:
    return text.runs if isinstance(text, Traced) else ((TEMPLATE, len(text)),)


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    merged: list[Run] = []
    for owner, length in runs:
        if merged and merged[-1][0] == owner:
            merged[-1] = (owner, merged[-1][1] + length)
        elif length:
            merged.append((owner, length))
    return tuple(merged)


def _cut(runs: tuple[Run, ...], start: int, stop: int) -> Iterator[Run]:
    at = 0
    for owner, length in runs:
        inside = min(stop, at + length) - max(start, at)
        if inside > 0:
            yield owner, inside
        at += length


def _bounds(key: Any, length: int) -> tuple[int, int, int]:
    if isinstance(key, slice):
        return key.indices(length)
    index = operator.index(key)
    index += length if index < 0 else 0
    return index, index + 1, 1


def _format(pattern: str, values: Any) -> Traced:
    """`pattern % values`; owners are kept where the pattern is plain %s, else the result is the template's."""
    text = str.__mod__(str.__str__(pattern), values)
    filled = values if isinstance(values, tuple) else (values,)
    literals = str.split(pattern, "%s")
    if "%%" in pattern or len(literals) != len(filled) + 1:
        return Traced.of(text, TEMPLATE)
    pieces = [piece for pair in zip(literals, (*map(str, filled), ""), strict=True) for piece in pair]
    traced = join("", pieces)
    return traced if str.__eq__(traced, text) else Traced.of(text, TEMPLATE)
