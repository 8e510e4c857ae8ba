"""Plain text: the whole file is one document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from deft.core.errors import Problem
from deft.core.types import Origin, Row
from deft.data.readers.jsonl import BOM


def read(stream: BinaryIO, source: str) -> Iterator[Row | Problem]:
    """
    >>> import io
    >>> [row.value for row in read(io.BytesIO(b"One.\\r\\nTwo."), "a.txt")]
    ['One.\\nTwo.']
    """
    text = decoded(stream.read(), source)
    if isinstance(text, Problem):
        yield text
    elif text.strip():
        yield Row(Origin(source, 1), text.replace("\r\n", "\n"))


def decoded(content: bytes, source: str) -> str | Problem:
    """A whole file as text, without its byte order mark."""
    content = content.removeprefix(BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Problem(f"{source}:{line}", "a byte is not UTF-8", "save the file as UTF-8")
