"""Pairs: {"prompt": "...", "completion": "..."}. The completion is learnt; neither is put in a chat template."""

from __future__ import annotations

from typing import Any

from deft.data.fields import RowError, text_of
from deft.types import Conversation, Message, Row


def matches(value: Any) -> bool:
    return isinstance(value, dict) and ("completion" in value or "prompt" in value)


def convert(row: Row) -> Conversation:
    """
    >>> from deft.types import Origin
    >>> [m.role for m in convert(Row(Origin("a.jsonl", 1), {"prompt": "2+2=", "completion": "4"})).messages]
    ['prompt', 'output']
    """
    for field in ("prompt", "completion"):
        if field not in row.value:
            raise RowError(field, "missing", "a pair needs prompt and completion")
    prompt, completion = (text_of(row.value[field], field) for field in ("prompt", "completion"))
    if not completion:
        raise RowError("completion", "empty: nothing to learn", "fill it in or remove the row")
    return Conversation(row.origin, "dialogue", (Message("prompt", prompt), Message("output", completion)))
