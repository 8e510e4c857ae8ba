"""What the formats share: reading a field of a row, with an error that names the field and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from deft.types import Message


class RowError(Exception):
    """A row that its format cannot read: which field, what is wrong, what to do."""

    def __init__(self, field: str, what: str, fix: str = "") -> None:
        super().__init__(f"{field}: {what}" if field else what)
        self.what = str(self)
        self.fix = fix


def kind_of(value: Any) -> str:
    """The JSON name of a value's type.

    >>> kind_of(None), kind_of([1]), kind_of("a")
    ('null', 'a list', 'text')
    """
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def text_of(value: Any, field: str) -> str:
    """`value` if it is text; RowError names the field otherwise."""
    if not isinstance(value, str):
        raise RowError(field, f"{kind_of(value)}, not text", "give text, or remove the row")
    return value


def list_of(value: Any, field: str) -> list[Any]:
    """`value` as a list that is not empty; RowError otherwise."""
    if not isinstance(value, list | tuple):
        raise RowError(field, f"{kind_of(value)}, not a list", "give a list of messages")
    if not value:
        raise RowError(field, "the list is empty", "remove the row")
    return list(value)


def role_of(value: Any, field: str, roles: Mapping[str, str]) -> str:
    """The chat role that `value` stands for; RowError with the closest name otherwise."""
    if not isinstance(value, str):
        raise RowError(field, f"{kind_of(value)}, not a role", f"one of {', '.join(roles)}")
    if value in roles:
        return roles[value]
    near = get_close_matches(value.lower(), roles, n=1)
    known = ", ".join(roles)
    raise RowError(field, f"{value!r} is not a role ({known})", f"did you mean {near[0]!r}?" if near else "")


def weight_of(value: Any, field: str) -> float | None:
    """How much a message is learnt, None where the row does not say; RowError unless a finite number >= 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise RowError(field, f"{value!r} is not a weight", "give a number of 0 or more")
    return float(value)


def as_chat(messages: list[Message], field: str) -> tuple[Message, ...]:
    """The messages of a chat that has something to learn.

    RowError where no assistant speaks, or where an assistant message has no words.
    """
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise RowError(f"{field}[{index}]", "an assistant message without words", "fill it in or remove the row")
    if not any(message.role == "assistant" for message in messages):
        raise RowError(field, "no assistant message: nothing to learn", "add the answer or remove the row")
    return tuple(messages)
