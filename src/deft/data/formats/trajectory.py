"""Agents' runs, as tau-bench writes them: {"traj": [messages with tool calls], ...}; other fields are not read."""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import messages
from deft.data.format import Choices

KEYS = ({"traj"},)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> run = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> len(convert(Row(Origin("a.json", 1), {"traj": run, "reward": 1.0}), Choices())[0].messages)
    2
    """
    found = messages.read_all(row.value["traj"], "traj")
    return [messages.chat(row, found, "traj")]
