"""Rows that a caller holds: a list, a generator, a data set of `datasets`, a table of pandas, polars or pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deft.core.errors import InputError, user_code


def rows(value: Any, name: str, file_fix: str = "read its rows first") -> tuple[Any, ...]:
    """The rows of whatever holds rows, in order. InputError, with the fix, for what holds none.

    name      what the caller calls them; an error of the iterable itself is a UserCodeError under this name
    file_fix  what to do with a file

    >>> rows(({"text": text} for text in "ab"), "rows")
    ({'text': 'a'}, {'text': 'b'})
    >>> rows({"text": "a"}, "rows")
    Traceback (most recent call last):
    deft.core.errors.InputError: rows: one row, not a list of rows; put it in a list: [row]
    """
    if what := _no_rows(value, file_fix):
        raise InputError(f"{name}: {what}")
    found = tuple(_read(value, name))
    if not found:
        raise InputError(f"{name}: no rows; the list is empty, or its iterator was used up before")
    if is_conversation(found):
        raise InputError(f"{name}: the messages of one conversation, not a list of rows; put it in a list: [messages]")
    return found


def is_conversation(values: Sequence[Any]) -> bool:
    """Whether these are messages, each with its role, and not rows.

    >>> is_conversation([{"role": "user", "content": "Hi"}]), is_conversation([{"messages": []}])
    (True, False)
    """
    return any(
        all(isinstance(each, Mapping) and role in each for each in values) and words in values[0]
        for role, words in (("role", "content"), ("from", "value"))
    )


def _no_rows(value: Any, file_fix: str) -> str:
    """What a value is that holds no rows, and what to do; nothing where it may hold some."""
    if isinstance(value, Path) or (isinstance(value, str) and os.path.exists(value)):
        return f"{str(value)!r} is a path, not a list of rows; {file_fix}"
    if isinstance(value, str):
        return f"text, not a list of rows; a text to learn: put it in a list, [text]; a file: {file_fix}"
    if isinstance(value, Mapping):
        splits = [str(key) for key, each in value.items() if _library(each) == "datasets"]
        if splits:
            return f"several data sets, not a list of rows; give one of them, such as data[{splits[0]!r}]"
        return "one row, not a list of rows; put it in a list: [row]"
    if isinstance(value, bytes) or not (isinstance(value, Iterable) or _is_table(value)):
        return f"{type(value).__name__}, not a list of rows; give a list"
    return ""


def _read(value: Any, name: str) -> Iterable[Any]:
    if _is_table(value):
        return _records(value, name)
    with user_code(name):
        return tuple(value)


def _is_table(value: Any) -> bool:
    """Whether it is a table of pandas, or of a library whose tables speak Arrow."""
    return hasattr(value, "__arrow_c_stream__") or _library(value) == "pandas"


def _records(table: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a table; the index of a pandas one is no column of it."""
    import pyarrow as pa

    try:
        is_pandas = _library(table) == "pandas"
        found = pa.Table.from_pandas(table, preserve_index=False) if is_pandas else pa.table(table)
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        what = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: not a table with one type a column ({what}); give a list of dicts") from error
    columns = found.column_names
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise InputError(f"{name}: two columns named {twice!r}; rename or drop one of them")
    records: list[dict[str, Any]] = found.to_pylist()
    return records


def _library(value: Any) -> str:
    """The package that a value's type is of.

    >>> _library(Path())
    'pathlib'
    """
    return type(value).__module__.partition(".")[0]
