"""What the formats share: reading a field of a row, with an error that names the field and the fix."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from deft.core.registry import closest
from deft.data import json_text

LARGEST_WEIGHT = 1e6
LONGEST_REPR = 1_000_000
"""Characters of Python's repr of a value that are read: its parser is slow, and takes much memory."""


class RowError(Exception):
    """A row that its format cannot read: which field, what is wrong, what to do."""

    def __init__(self, field: str, what: str, fix: str = "") -> None:
        super().__init__(f"{field}: {what}" if field else what)
        self.field = field
        self.what = what
        self.fix = fix


class LeftOut(Exception):
    """A sound row that is not trained on purpose; the text says why."""


def is_nan(value: Any) -> bool:
    """Whether a value is NaN or infinite: what writers of tables put where there is none, and no JSON.

    >>> is_nan(float("nan")), is_nan(0.5), is_nan("NaN")
    (True, False, False)
    """
    return isinstance(value, float) and not math.isfinite(value)


def refuse_nan(value: Any, field: str) -> None:
    """RowError where a value that is learnt or shown to the model is NaN, or holds it."""
    if is_nan(value):
        raise RowError(field, f"{value} is not JSON", "write null, or leave it out")
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            refuse_nan(each, field)


def kind_of(value: Any) -> str:
    """The JSON name of a value's type.

    >>> kind_of(None), kind_of([1]), kind_of("a")
    ('null', 'a list', 'text')
    """
    if is_nan(value):
        return "NaN"
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def described(value: Any) -> str:
    """What a row is, for an error about the whole of it.

    >>> described({"a": 1, "b": 2}), described(3)
    ("the keys 'a', 'b'", 'a number')
    """
    if isinstance(value, dict):
        return "the keys " + ", ".join(repr(shortened(str(key))) for key in list(value)[:8]) if value else "no keys"
    return kind_of(value)


def shortened(text: str, length: int = 60) -> str:
    """At most `length` characters of a text, for an error."""
    return text if len(text) <= length else text[:length] + "..."


def is_absent(value: Any) -> bool:
    """Whether a field says nothing.

    >>> [is_absent(value) for value in (None, " ", [], {}, float("nan"), 0, False)]
    [True, True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def unusable(field: str, what: str) -> RowError:
    """The refusal of a row because of a field, with the way out."""
    key = field.rpartition(".")[2]
    return RowError(field, what, f"mend or remove it, or say ignore: [{key}] of the source to do without it")


def text_of(value: Any, field: str) -> str:
    """`value` if it is text that can be written as UTF-8; RowError names the field otherwise."""
    if not isinstance(value, str):
        raise RowError(field, f"{kind_of(value)}, not text", "give text, or remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = "half a character (a lone surrogate, \\ud800 to \\udfff)"
            raise RowError(field, what, "write the row with a JSON library") from error
    return value


def json_of(value: Any, field: str) -> Any:
    """`value`, or what it says where it is JSON text; RowError where the text is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json_text.decode(value)
    except json_text.NotJson as error:
        raise RowError(field, error.what, "write it with json.dumps") from error


def value_of(value: Any, field: str) -> Any:
    """`json_of`, for text that may be Python's repr of the value as well, as tables written from lists hold it.

    >>> value_of("[{'name': 'f', 'strict': True}]", "tools")
    [{'name': 'f', 'strict': True}]
    """
    try:
        return json_of(value, field)
    except RowError:
        if not value.lstrip().startswith(("[", "{")) or len(value) > LONGEST_REPR:
            raise
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
        raise


def list_of(value: Any, field: str) -> list[Any]:
    """`value` as a list that is not empty, from its text too (as tables hold it); RowError otherwise.

    >>> list_of('[{"role": "user"}]', "messages")
    [{'role': 'user'}]
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = value_of(value, field)
    if not isinstance(value, list | tuple):
        raise RowError(field, f"{kind_of(value)}, not a list", "give a list of messages")
    if not value:
        raise RowError(field, "the list is empty", "remove the row")
    return list(value)


def object_of(value: Any, field: str, what: str) -> dict[str, Any]:
    """`value` if it is an object; RowError otherwise. `what` says what it should have been.

    >>> object_of({"a": 1}, "messages[0]", "a message")
    {'a': 1}
    """
    if not isinstance(value, dict):
        raise RowError(field, f"{kind_of(value)}, not {what}", "give an object, or remove the row")
    return value


def need(value: Mapping[str, Any], keys: tuple[str, ...], what: str, field: str = "") -> None:
    """RowError for the first of `keys` that is missing; the fix offers a `columns` mapping where it could help."""
    for key in keys:
        if key not in value:
            others = [other for other in value if other not in keys and isinstance(value[other], str)]
            fix = f"{what} needs {' and '.join(keys)}"
            if not field and others:
                fix += f"; if {shortened(others[0])!r} is it, say columns: {{{key}: {shortened(others[0])}}}"
            raise RowError(f"{field}.{key}" if field else key, "missing", fix)


def role_of(value: Any, field: str, roles: Mapping[str, str], meant: Mapping[str, str] | None = None) -> str:
    """The chat role that `value` stands for; RowError with the closest name otherwise.

    meant  names that other formats use -> the right one here
    """
    if not isinstance(value, str):
        raise RowError(field, f"{kind_of(value)}, not a role", f"one of {', '.join(roles)}")
    if value in roles:
        return roles[value]
    lower = value.strip().lower()[:60]
    near = f"did you mean {meant[lower]!r}?" if meant and lower in meant else closest(lower, roles)
    what = f"{shortened(value)!r} is not a role ({', '.join(roles)})"
    raise RowError(field, what, near or "name one of these roles")


def label_of(value: Any, field: str) -> bool:
    """Whether an answer is a good one: true or false, 1 or 0, or their names as tables write them; RowError otherwise.

    >>> label_of(1, "label"), label_of("False", "label")
    (True, False)
    """
    if isinstance(value, str) and value.lower() in _LABELS:
        return _LABELS[value.lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    shown = repr(value) if isinstance(value, str | bool) else kind_of(value)
    raise RowError(field, f"{shortened(shown)} is neither true nor false", "say true for a good answer")


_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def number_of(value: Any) -> float | None:
    """`value` if it is a finite number, None otherwise.

    >>> number_of(3), number_of("3"), number_of(float("nan"))
    (3.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
        return None
    return float(value)
