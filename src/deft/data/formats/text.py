"""Plain text: a string, or {"text": "..."}. Every token is learnt."""

from __future__ import annotations

from deft.core.types import Conversation, Message, Row
from deft.data.fields import RowError, need, text_of
from deft.data.format import Choices

KEYS = ({"text"}, {"<text>"})


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (whole,) = convert(Row(Origin("a.jsonl", 1), {"text": "Once upon a time"}), Choices())
    >>> whole.messages[0].role, whole.messages[0].content
    ('output', 'Once upon a time')
    """
    value = {"text": row.value} if isinstance(row.value, str) else row.value
    need(value, ("text",), "a row")
    text = text_of(value["text"], "text")
    if not text.strip():
        raise RowError("text", "no words", "remove the row")
    return [Conversation(row.origin, "text", (Message("output", text),))]
