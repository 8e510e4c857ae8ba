"""Plain text: a string, or {"text": "..."}. Every token is learnt."""

from __future__ import annotations

from typing import Any

from deft.data.fields import RowError, text_of
from deft.types import Conversation, Message, Row


def matches(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "text" in value)


def convert(row: Row) -> Conversation:
    """
    >>> from deft.types import Origin
    >>> (message,) = convert(Row(Origin("a.jsonl", 1), {"text": "Once upon a time"})).messages
    >>> message.role, message.content
    ('output', 'Once upon a time')
    """
    text = row.value if isinstance(row.value, str) else text_of(row.value["text"], "text")
    if not text.strip():
        raise RowError("text", "no words", "remove the row")
    return Conversation(row.origin, "text", (Message("output", text),))
