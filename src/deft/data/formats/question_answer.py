"""Question and answer: {"question": "...", "answer": "..."}, a chat of one turn."""

from __future__ import annotations

from typing import Any

from deft.data.fields import RowError, as_chat, text_of
from deft.types import Conversation, Message, Row


def matches(value: Any) -> bool:
    return isinstance(value, dict) and ("question" in value or "answer" in value)


def convert(row: Row) -> Conversation:
    """
    >>> from deft.types import Origin
    >>> convert(Row(Origin("a.jsonl", 1), {"question": "2+2?", "answer": "4"})).messages[0].content
    '2+2?'
    """
    for field in ("question", "answer"):
        if field not in row.value:
            raise RowError(field, "missing", "a row needs question and answer")
    question, answer = (text_of(row.value[field], field) for field in ("question", "answer"))
    return Conversation(row.origin, "chat", as_chat([Message("user", question), Message("assistant", answer)], "row"))
