"""Pairs: {"prompt": "...", "completion": "..."}, strings or messages. The completion alone is learnt.

Two strings are never put in a chat template; messages always are.
"""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import pairs
from deft.data.fields import need
from deft.data.format import Choices

KEYS = ({"prompt", "completion"},)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (pair,) = convert(Row(Origin("a.jsonl", 1), {"prompt": "2+2=", "completion": "4"}), Choices())
    >>> [message.role for message in pair.messages]
    ['prompt', 'output']
    >>> asked = [{"role": "user", "content": "2+2?"}]
    >>> (chat,) = convert(Row(Origin("a.jsonl", 1), {"prompt": asked, "completion": "4"}), Choices())
    >>> [message.role for message in chat.messages]
    ['user', 'assistant']
    """
    need(row.value, ("prompt", "completion"), "a pair")
    prompt, completion = (pairs.side(row.value[field], field) for field in ("prompt", "completion"))
    return [pairs.joined(row, prompt, completion, ("prompt", "completion"), row.value.get("tools"))]
