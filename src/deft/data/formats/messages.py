"""Chats: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}, or the list of messages alone."""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import messages
from deft.data.fields import need
from deft.data.format import Choices

KEYS = ({"messages"}, {"<list of objects>"})


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """`weight` or `loss_weight` of a message says how much it is learnt.

    >>> from deft.core.types import Origin
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0.5}]
    >>> (conversation,) = convert(Row(Origin("a.jsonl", 1), {"messages": chat}), Choices())
    >>> conversation.messages[1].weight
    0.5
    """
    value = {"messages": row.value} if isinstance(row.value, list | tuple) else row.value
    need(value, ("messages",), "a row")
    found = messages.read_all(value["messages"], "messages")
    return [messages.chat(row, found, "messages")]
