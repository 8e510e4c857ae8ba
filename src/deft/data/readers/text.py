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
    content = stream.read().removeprefix(BOM)
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Problem(f"{source}:{line}", "a byte is not UTF-8", "save the file as UTF-8")
        return
    if text.strip():
        yield Row(Origin(source, 1), text)
