"""Strings that know where their characters came from, through everything that a chat template does to them.

A `Traced` is a str made of runs: (owner, length). An owner names the message, and the part of it, that a character
belongs to; or it is TEMPLATE, or TOOLS. Operators and the string methods that templates use keep it; whatever loses it
yields characters that belong to the template, which the proof then notices as words of a message that are missing.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from string import Formatter
from typing import Any, Self, SupportsIndex

TEMPLATE = -1
"""The owner of characters that neither a message nor a tool wrote."""

TOOLS = -2
"""The owner of what the conversation's tools say."""

Run = tuple[int, int]

_MESSAGE, _LEAF = 24, 4
"""Bits: an owner is message << 24 | leaf << 4 | part."""


class MessagePart(IntEnum):
    """The part of a message that a character belongs to."""

    CONTENT = 0
    REASONING = 1
    CALL_NAME = 2
    ARGUMENT = 3
    CALL_ID = 4
    SPEAKER = 5


def owner_of(message: int, part: MessagePart = MessagePart.CONTENT, leaf: int = 0) -> int:
    """The owner's number; `leaf` tells the keys and values of a message's tool calls apart.

    >>> owner = owner_of(3, MessagePart.ARGUMENT, leaf=2)
    >>> message_of(owner), part_of(owner)
    (3, <MessagePart.ARGUMENT: 3>)
    """
    return message << _MESSAGE | leaf << _LEAF | part


def message_of(owner: int) -> int:
    """The index of the message that an owner belongs to; negative for TEMPLATE and TOOLS."""
    return owner >> _MESSAGE


def part_of(owner: int) -> MessagePart:
    """The part of a message that an owner is; not for TEMPLATE and TOOLS."""
    return MessagePart(owner & (1 << _LEAF) - 1)


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
        return percent(self, values)

    def __rmod__(self, pattern: str) -> Traced:
        return percent(pattern, self)

    def __getitem__(self, key: Any) -> Traced:
        start, stop, step = _bounds(key, len(self))
        if step != 1:
            return Traced(str.__getitem__(self, key), ((owner, 1) for owner in self.owners()[key]))
        inside = ((owner, min(stop, end) - max(start, at)) for owner, at, end in self.ranges())
        return Traced(str.__getitem__(self, key), ((owner, length) for owner, length in inside if length > 0))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def owners(self) -> list[int]:
        """The owner of each character."""
        return [owner for owner, length in self.runs for _ in range(length)]

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Of each run: its owner, its first character, and one past its last."""
        end = 0
        for owner, length in self.runs:
            start, end = end, end + length
            yield owner, start, end

    def plain(self, start: int, end: int | None = None) -> str:
        """self[start:end] without owners."""
        return str.__getitem__(self, slice(start, end))

    def lstrip(self, chars: str | None = None, /) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> Traced:
        return self + fillchar * max(0, operator.index(width) - len(self))

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> Traced:
        return fillchar * max(0, operator.index(width) - len(self)) + self

    def removeprefix(self, prefix: str, /) -> Traced:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Traced:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def join(self, pieces: Iterable[Any], /) -> Traced:
        return join(self, pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        if not old:
            return Traced.of(str.replace(self, old, new, count), TEMPLATE)
        return join(new, self.split(old, count)) if old in self else self

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


class _TracedNumber:
    """A number from a row: written out, it has an owner."""

    owner: int

    def __new__(cls, value: float, owner: int) -> Self:
        self = super().__new__(cls, value)  # type: ignore[call-arg]
        self.owner = owner
        return self

    def __str__(self) -> str:
        return Traced.of(super().__repr__(), self.owner)


class TracedInt(_TracedNumber, int): ...


class TracedFloat(_TracedNumber, float): ...


class TracedList(list[Any]):
    """A list from a row: written out, its texts and numbers have owners."""

    def __str__(self) -> str:
        return _represented(self)


class TracedDict(dict[Any, Any]):
    """An object from a row: written out, its texts and numbers have owners."""

    def __str__(self) -> str:
        return _represented(self)


def _represented(value: Any) -> str:
    """`repr(value)` as some templates write arguments, with the owners kept.

    >>> _represented({"a": [Traced.of("b", 0)]}).runs
    ((-1, 8), (0, 1), (-1, 3))
    """
    if isinstance(value, Traced) and len(value.runs) == 1:
        quoted = repr(str.__str__(value))
        return quoted[0] + Traced.of(quoted[1:-1], value.runs[0][0]) + quoted[0]
    if isinstance(value, dict):
        return "{" + join(", ", (join(": ", map(_represented, item)) for item in value.items())) + "}"
    if isinstance(value, list):
        return "[" + join(", ", map(_represented, value)) + "]"
    return str(value) if isinstance(value, _TracedNumber) else repr(value)


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


def _bounds(key: Any, length: int) -> tuple[int, int, int]:
    if isinstance(key, slice):
        return key.indices(length)
    index = operator.index(key)
    index += length if index < 0 else 0
    return index, index + 1, 1


def percent(pattern: str, values: Any) -> Traced:
    """`pattern % values`; owners are kept where the pattern is plain %s, else the result is the template's."""
    text = str.__mod__(str.__str__(pattern), values)
    filled = values if isinstance(values, tuple) else (values,)
    literals = str.split(pattern, "%s")
    if "%%" in pattern or len(literals) != len(filled) + 1:
        return Traced.of(text, TEMPLATE)
    return _checked(join("", [piece for pair in zip(literals, (*filled, ""), strict=True) for piece in pair]), text)


def braces(pattern: str, args: Sequence[Any], kwargs: Mapping[str, Any], text: str) -> Traced:
    """`pattern.format(*args, **kwargs)`, whose text is `text`; owners are kept where the fields are plain.

    >>> braces("{}: {name}", ["a"], {"name": Traced.of("b", 0)}, "a: b").runs
    ((-1, 3), (0, 1))
    """
    pieces: list[Any] = []
    unnamed = 0
    for literal, name, spec, conversion in Formatter().parse(pattern):
        pieces.append(literal)
        if name is None:
            continue
        key = name or str(unnamed)
        unnamed += not name
        if spec or conversion or not (key in kwargs or (key.isdigit() and int(key) < len(args))):
            return Traced.of(text, TEMPLATE)
        pieces.append(kwargs[key] if key in kwargs else args[int(key)])
    return _checked(join("", pieces), text)


def _escaped(text: Traced, escape: Callable[[str], str]) -> Traced:
    """`text` with each run escaped on its own by `escape`, so that the owners stay."""
    return join("", (Traced.of(escape(text.plain(start, end)), owner) for owner, start, end in text.ranges()))


def _checked(traced: Traced, text: str) -> Traced:
    return traced if str.__eq__(traced, text) else Traced.of(text, TEMPLATE)


_LEAF_MARK = re.compile(r'"@leaf-(\d+)@"')


def to_json(value: Any, **style: Any) -> Traced:
    r"""`json.dumps(value, **style)`; keys and values keep their owners, all else is the template's.

    >>> text = to_json({"city": Traced.of('a "b"', 7), "n": [1, None]})
    >>> text, text.runs
    ('{"city": "a \\"b\\"", "n": [1, null]}', ((-1, 10), (7, 7), (-1, 18)))
    """
    leaves: list[Any] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Traced | _TracedNumber):
            leaves.append(value)
            return f"@leaf-{len(leaves) - 1}@"
        if isinstance(value, Mapping):
            items = sorted(value.items()) if style.get("sort_keys") else value.items()
            return {marked(key): marked(item) for key, item in items}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    def written(leaf: Any) -> str:
        is_text = isinstance(leaf, Traced)
        return '"' + _escaped(leaf, lambda text: json.dumps(text, **style)[1:-1]) + '"' if is_text else str(leaf)

    pieces = _LEAF_MARK.split(json.dumps(marked(value), **{**style, "sort_keys": False}))
    found = (written(leaves[int(piece)]) if index % 2 else piece for index, piece in enumerate(pieces))
    return _checked(join("", found), json.dumps(value, **style))


def last_character(text: Traced, index: int) -> int | None:
    """One past the last character that messages[index] wrote; None if it wrote none."""
    return max((end for owner, _, end in text.ranges() if message_of(owner) == index), default=None)


def first_character(text: Traced, index: int, parts: Sequence[MessagePart], start: int = 0) -> int | None:
    """The first character from `start` on that one of these parts of messages[index] wrote; None if there is none."""
    for owner, first, end in text.ranges():
        if end > start and message_of(owner) == index and part_of(owner) in parts:
            return max(first, start)
    return None


def written_ranges(text: Traced) -> tuple[tuple[int, int], ...]:
    """The ranges of characters that messages and tools wrote.

    >>> written_ranges("<" + Traced.of("ab", 5) + ">")
    ((1, 3),)
    """
    return tuple((start, end) for owner, start, end in text.ranges() if owner != TEMPLATE)
