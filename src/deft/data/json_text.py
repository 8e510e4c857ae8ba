"""JSON text -> its value, strictly: no key twice in one object, no NaN, no half characters.

The standard library accepts all three in silence. Rows may hold NaN, as pandas writes it, where nobody reads it: a
field that is read refuses it.
"""

from __future__ import annotations

import json
from typing import Any

_MEND = "write the row with a JSON library"


class NotJson(ValueError):
    """Text that is not JSON: what is wrong with it, what to do, and the line of the text where it is wrong."""

    def __init__(self, what: str, fix: str = _MEND, line: int = 1) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.line = line


def decode(text: str, nan: bool = False) -> Any:
    """The one value that `text` holds; raises NotJson.

    nan  NaN and Infinity are numbers

    >>> decode('{"a": [1, "b"]}')
    {'a': [1, 'b']}
    >>> decode('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    deft.data.json_text.NotJson: the key 'a' stands twice in one object
    """
    try:
        value = (_ROWS if nan else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg} at column {error.colno}"
        raise NotJson(what, _hint(text, error), error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise _other(error, 1) from error
    _check_characters(value, text, 0, len(text))
    return value


def decode_at(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at `position`, and where it ends, NaN being a number; raises NotJson."""
    try:
        value, end = _ROWS.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise NotJson(f"not valid JSON: {error.msg} at column {error.colno}", _MEND, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise _other(error, line_of(text, position)) from error
    _check_characters(value, text, position, end)
    return value, end


def end_of(text: str, position: int) -> int | None:
    """Where a value ends that `decode_at` refuses; None where it is no JSON at all, so that nobody can say.

    >>> end_of('[{"a": 1, "a": NaN}, 2]', 1), end_of('[{"a": }, 2]', 1)
    (19, None)
    """
    try:
        return _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
_LENIENT = json.JSONDecoder(parse_int=str)
_ROWS = json.JSONDecoder(object_pairs_hook=_object)


def _check_characters(value: Any, text: str, start: int, end: int) -> None:
    """Raises NotJson where the text holds half a character (a lone surrogate escape)."""
    if text.find("\\ud", start, end) < 0 and text.find("\\uD", start, end) < 0:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        what = "a lone surrogate escape (\\ud800 to \\udfff) is not a character"
        raise NotJson(what, line=line_of(text, start)) from error


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _other(error: Exception, line: int) -> NotJson:
    if isinstance(error, RecursionError):
        return NotJson("nested too deeply", "flatten the row", line)
    if "integer string conversion" in str(error):
        return NotJson("a number of more than 4,300 digits", "write it as text", line)
    return NotJson(str(error), line=line)


def _hint(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return "one row a line"
    if text.strip() in "[]{}":
        return "this looks like one JSON document: name the file .json"
    if "'" in text[error.pos : error.pos + 1] or "True" in text or "None" in text:
        return "this looks like Python's repr: write it with json.dumps"
    return _MEND
