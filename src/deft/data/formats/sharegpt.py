"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}."""

from __future__ import annotations

from typing import Any

from deft.data.fields import RowError, as_chat, kind_of, list_of, role_of, text_of, weight_of
from deft.types import Conversation, Message, Row

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" in value


def convert(row: Row) -> Conversation:
    """
    >>> from deft.types import Origin
    >>> chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    >>> [m.role for m in convert(Row(Origin("a.json", 1), {"conversations": chat})).messages]
    ['user', 'assistant']
    """
    found = list_of(row.value["conversations"], "conversations")
    messages = [_message(value, f"conversations[{index}]") for index, value in enumerate(found)]
    if isinstance(row.value.get("system"), str) and row.value["system"]:
        messages.insert(0, Message("system", row.value["system"]))
    return Conversation(row.origin, "chat", as_chat(messages, "conversations"))


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(field, f"{kind_of(value)}, not a message", "give an object with from and value")
    for key in ("from", "value"):
        if key not in value:
            raise RowError(f"{field}.{key}", "missing", "a ShareGPT message needs from and value")
    return Message(
        role_of(value["from"], f"{field}.from", ROLES),
        text_of(value["value"], f"{field}.value"),
        weight_of(value.get("weight"), f"{field}.weight"),
    )
