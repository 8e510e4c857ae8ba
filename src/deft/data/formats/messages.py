"""Chats: {"messages": [{"role": "user", "content": "..."}, ...]}, with an optional weight per message."""

from __future__ import annotations

from typing import Any

from deft.data.fields import RowError, as_chat, kind_of, list_of, role_of, text_of, weight_of
from deft.types import Conversation, Message, Row

ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")}


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "messages" in value


def convert(row: Row) -> Conversation:
    """`weight` or `loss_weight` of a message says how much it is learnt.

    >>> from deft.types import Origin
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0.5}]
    >>> convert(Row(Origin("a.jsonl", 1), {"messages": chat})).messages[1].weight
    0.5
    """
    found = list_of(row.value["messages"], "messages")
    messages = [_message(value, f"messages[{index}]") for index, value in enumerate(found)]
    return Conversation(row.origin, "chat", as_chat(messages, "messages"))


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(field, f"{kind_of(value)}, not a message", "give an object with role and content")
    for key in ("role", "content"):
        if key not in value:
            raise RowError(f"{field}.{key}", "missing", "a message needs role and content")
    if value.get("tool_calls"):
        raise RowError(f"{field}.tool_calls", "tool calls are not read yet", "remove the row")
    weight = value.get("weight", value.get("loss_weight"))
    return Message(
        role_of(value["role"], f"{field}.role", ROLES),
        text_of(value["content"], f"{field}.content"),
        weight_of(weight, f"{field}.weight"),
    )
