"""JSON lines: a row a line; blank lines are passed over. Memory holds a chunk of lines, for any process to read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from deft.core.errors import Problem
from deft.core.types import Origin, Row
from deft.data import json_text
from deft.data.chunks import sizes

BOM = b"\xef\xbb\xbf"
FIRST_BYTES, MOST_BYTES = 1 << 14, 1 << 19
"""The first chunk is small, so that the first rows are soon there."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a file, from line `first` on; no line comes after `last`, which has no items."""

    source: str
    first: int
    last: tuple[int, int]
    data: bytes

    def read(self) -> Iterator[Row | Problem]:
        """
        >>> [row.value for row in Lines("a.jsonl", 1, (3, 0), b'{"a": 1}\\n\\n{"a": 2}').read()]
        [{'a': 1}, {'a': 2}]
        """
        return from_lines(io.BytesIO(self.data), self.source, self.first)


def chunks(stream: BinaryIO, source: str, begun: bytes = b"") -> Iterator[Lines]:
    """The lines of a stream, of which `begun` was read before."""
    first = 1
    for size in sizes(FIRST_BYTES, MOST_BYTES):
        data = begun + stream.read(size)
        if not data:
            return
        begun = b""
        if not data.endswith(b"\n"):
            data += stream.readline()
        found = data.removeprefix(BOM) if first == 1 else data
        following = first + data.count(b"\n")
        if found and not found.isspace():
            yield Lines(source, first, (following - data.endswith(b"\n"), 0), found)
        first = following


def from_lines(lines: Iterable[bytes], source: str, first: int = 1) -> Iterator[Row | Problem]:
    """The rows of lines that are already apart, of which one has the number `first`."""
    for number, line in enumerate(lines, start=first):
        if line and not line.isspace():
            yield _row(Origin(source, number), line)


def _row(origin: Origin, line: bytes) -> Row | Problem:
    try:
        return Row(origin, json_text.decode(line.rstrip(b"\r\n").decode("utf-8"), nan=True))
    except UnicodeDecodeError as error:
        return Problem(str(origin), f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")
    except json_text.NotJson as error:
        return Problem(str(origin), error.what, error.fix)
