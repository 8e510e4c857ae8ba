"""Gemini's chats: {"contents": [{"role": "user", "parts": [{"text": ...}]}, {"role": "model", "parts": [...]}]}.

Calls are parts of the model's turns; their results, which stand in the user's parts, are messages of the tool.
"""

from __future__ import annotations

from typing import Any

from deft.core.types import Conversation, Row
from deft.data import messages
from deft.data.fields import list_of, need, object_of
from deft.data.format import Choices

KEYS = ({"contents"},)
PARTS = messages.READS | {"parts"}
_ROLES = {"model": "assistant", "function": "tool"}


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> turns = [{"role": role, "parts": [{"text": text}]} for role, text in (("user", "2+2?"), ("model", "4"))]
    >>> (chat,) = convert(Row(Origin("a.jsonl", 1), {"contents": turns}), Choices())
    >>> [(message.role, message.content) for message in chat.messages]
    [('user', '2+2?'), ('assistant', '4')]
    """
    need(row.value, ("contents",), "a row")
    turns = [_turn(each, f"contents[{i}]") for i, each in enumerate(list_of(row.value["contents"], "contents"))]
    return [messages.chat(row, messages.read_all(turns, "contents"), "contents")]


def _turn(value: Any, field: str) -> dict[str, Any]:
    """A turn in OpenAI's keys; its role is the user's where it has none, as for Gemini."""
    value = object_of(value, field, "a turn with parts")
    need(value, ("parts",), "a turn", field)
    rest = {key: each for key, each in value.items() if key not in ("role", "parts")}
    role = value.get("role") or "user"
    parts = value["parts"] if isinstance(value["parts"], list | tuple) else [value["parts"]]
    return {**rest, "role": _ROLES.get(role, role), "content": parts}
