"""CSV and TSV with a header: a row a record, every value text. A record is known by the line it begins on.

Memory holds one record. A header without a comma is read with its semicolons or tabs.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import BinaryIO

from deft.core.errors import InputError, Problem
from deft.core.types import Origin, Row
from deft.data.readers.jsonl import BOM

LONGEST_FIELD = 2**31 - 1


def read(stream: BinaryIO, source: str) -> Iterator[Row | Problem]:
    """
    >>> import io
    >>> [row.value for row in read(io.BytesIO(b"prompt,completion\\n2+2=,4\\n"), "a.csv")]
    [{'prompt': '2+2=', 'completion': '4'}]
    """
    first = stream.readline().removeprefix(BOM)
    if not first.strip():
        return
    delimiter = next((mark for mark in (b"\t", b",", b";", b"|") if mark in first), b",").decode()
    csv.field_size_limit(LONGEST_FIELD)
    records = csv.reader(_decoded(first, stream), delimiter=delimiter, strict=True)
    header = _header(records, source)
    while True:
        line = records.line_num + 1
        try:
            values = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield _broken(error, source, line, records.line_num)
            continue
        if values:
            yield _row(Origin(source, line), header, values, records.line_num)


def _broken(error: csv.Error, source: str, line: int, last: int) -> Problem:
    """What is wrong with a record. InputError where it reaches past its line: a quote has taken others with it."""
    what, fix = f"not valid CSV: {error}", "double the quotes inside a quoted field"
    if last > line:
        raise InputError(f"{source}:{line}: {what}; the record reaches to line {last}, with those between; {fix}")
    return Problem(f"{source}:{line}", what, fix)


def _header(records: Iterator[list[str]], source: str) -> list[str]:
    try:
        found = [name.strip() for name in next(records)]
    except csv.Error as error:
        raise InputError(f"{source}:1: the header is not valid CSV: {error}; mend it") from error
    if not all(map(_is_utf8, found)):
        raise InputError(f"{source}:1: the header is not UTF-8; save the file as UTF-8")
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None or "" in found:
        what = "a column without a name" if twice is None or not twice else f"two columns named {twice!r}"
        raise InputError(f"{source}:1: {what}; name every column once")
    return found


def _row(origin: Origin, header: list[str], values: list[str], last: int) -> Row | Problem:
    if len(values) != len(header):
        reaches = f" (the record reaches to line {last})" if last > origin.line else ""
        what = f"{len(values)} fields, the header has {len(header)}{reaches}"
        return Problem(str(origin), what, "quote fields that hold the separator or a line break")
    for name, value in zip(header, values, strict=True):
        if not _is_utf8(value):
            return Problem(str(origin), f"{name}: a byte is not UTF-8", "save the file as UTF-8")
    return Row(origin, dict(zip(header, values, strict=True)))


def _is_utf8(value: str) -> bool:
    """False where `_decoded` met a byte that is not UTF-8."""
    return value.isascii() or _ESCAPED.search(value) is None


_ESCAPED = re.compile("[\udc80-\udcff]")


def _decoded(first: bytes, stream: BinaryIO) -> Iterator[str]:
    """Lines as text; a byte that is not UTF-8 becomes a lone surrogate, so that its record can be named."""
    yield first.decode("utf-8", "surrogateescape")
    for line in stream:
        yield line.decode("utf-8", "surrogateescape")
