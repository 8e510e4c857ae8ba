"""Pairs under other names: {"input": "...", "output": "..."}. The output is learnt; no template is used."""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import pairs
from deft.data.fields import need
from deft.data.format import Choices

KEYS = ({"input", "output"},)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (pair,) = convert(Row(Origin("a.jsonl", 1), {"input": "2+2=", "output": "4"}), Choices())
    >>> [message.content for message in pair.messages]
    ['2+2=', '4']
    """
    need(row.value, ("input", "output"), "a pair")
    asked, answer = (pairs.side(row.value[field], field) for field in ("input", "output"))
    return [pairs.joined(row, asked, answer, ("input", "output"))]
