"""Pairs: {"prompt": "...", "completion": "..."} under any of their names, strings or messages.

The completion alone is learnt. Two strings are never put in a chat template; messages always are.
"""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import names, pairs
from deft.data.format import Choices

KEYS = names.sets(names.PROMPT, names.ANSWER)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (pair,) = convert(Row(Origin("a.jsonl", 1), {"prompt": "2+2=", "completion": "4"}), Choices())
    >>> [message.role for message in pair.messages]
    ['prompt', 'output']
    >>> asked = [{"role": "user", "content": "2+2?"}]
    >>> (chat,) = convert(Row(Origin("a.jsonl", 1), {"input": asked, "output": "4"}), Choices())
    >>> [message.role for message in chat.messages]
    ['user', 'assistant']
    """
    fields = tuple(names.fields_of(row.value, prompt=names.PROMPT, completion=names.ANSWER).values())
    prompt = pairs.side(row.value[fields[0]], fields[0])
    completion = pairs.side(names.said(row.value, fields[1]), fields[1])
    return [pairs.joined(row, prompt, completion, (fields[0], fields[1]))]
