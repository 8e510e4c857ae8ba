"""Rows inside one JSON document: in a list under a field, or as a table of columns, as pandas writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

WRAPPERS = ("data", "train", "rows", "instances", "examples", "samples", "items", "records", "dataset")
"""Fields of a document that its rows stand under."""
SPLITS = ("test", "validation")
_OF_ROWS = {"instruction", "prompt", "messages", "conversations", "question", "query", "text", "input"}


def is_rows(value: Any) -> bool:
    """Whether a value is a list of rows: objects that are no messages.

    >>> is_rows([{"prompt": "a"}]), is_rows([{"role": "user"}]), is_rows(["a"])
    (True, False, False)
    """
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(each, Mapping) and {"role", "from"}.isdisjoint(each) for each in value)


def rows_under(value: Any) -> list[str]:
    """The fields of a document that hold lists of rows; none where it is a row itself.

    >>> rows_under({"version": "1.1", "data": [{"prompt": "a", "completion": "b"}]})
    ['data']
    >>> rows_under({"instruction": "Add.", "instances": [{"input": "2 and 2", "output": "4"}]})
    []
    """
    if not isinstance(value, dict) or not _OF_ROWS.isdisjoint(value):
        return []
    return [key for key in value if key in (*WRAPPERS, *SPLITS) and is_rows(value[key])]


def of_table(value: Any) -> list[dict[str, Any]]:
    """The rows of a table: columns of lists, or pandas' columns, rows by number, or rows apart from their columns.

    Nothing where it is none: messages in lists are those of one row.

    >>> of_table({"prompt": ["2+2=", "3+2="], "completion": ["4", "5"]})
    [{'prompt': '2+2=', 'completion': '4'}, {'prompt': '3+2=', 'completion': '5'}]
    >>> of_table({"0": {"text": "a"}, "1": {"text": "b"}}) == of_table({"text": {"0": "a", "1": "b"}})
    True
    >>> of_table({"columns": ["text"], "index": [0, 1], "data": [["a"], ["b"]]})
    [{'text': 'a'}, {'text': 'b'}]
    """
    if not isinstance(value, dict) or not value:
        return []
    if value.keys() == {"columns", "index", "data"}:
        return _rows(value["columns"], value["data"])
    every = list(value.values())
    if all(isinstance(each, Mapping) for each in every):
        if _are_numbers(value):
            return [dict(each) for each in every]
        is_table = _are_numbers(every[0]) and all(each.keys() == every[0].keys() for each in every)
        return _rows(value, zip(*(each.values() for each in every), strict=True)) if is_table else []
    if not all(isinstance(each, list) and len(each) == len(every[0]) for each in every):
        return []
    is_row = any(isinstance(each, Mapping) for column in every for each in column)
    return [] if is_row or (len(value) < 2 and "text" not in value) else _rows(value, zip(*every, strict=True))


def _rows(columns: Iterable[str], values: Iterable[Iterable[Any]]) -> list[dict[str, Any]]:
    names = list(columns)
    return [dict(zip(names, each, strict=False)) for each in values]


def _are_numbers(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(key.isdecimal() for key in value)
