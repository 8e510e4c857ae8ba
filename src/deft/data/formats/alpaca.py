"""Alpaca: {"instruction": "...", "input": "...", "output": "..."}, a chat.

The input stands under the instruction, a blank line between; `context` is input in other data sets of the kind, and the
output has any name of an answer. `history` ([[question, answer], ...]) comes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import messages, names
from deft.data.fields import RowError, is_absent, kind_of, text_of
from deft.data.format import Choices

KEYS = names.sets(names.INSTRUCTION, (*names.ANSWER, *names.UNDER_INSTRUCTION))
READS = (*names.INSTRUCTION, *names.UNDER_INSTRUCTION, *names.ANSWER, "history")


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> value = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    >>> (chat,) = convert(Row(Origin("a.json", 1), value), Choices())
    >>> [message.content for message in chat.messages]
    ['Add.\\n\\n2 and 2', '4']
    """
    value = row.value
    answer = names.fields_of(value, instruction=names.INSTRUCTION, output=("output", *names.ANSWER))["output"]
    found = [*_history(value.get("history")), Message("user", question(value))]
    told = text_of(names.said(value, answer), answer)
    if not told.strip():
        raise RowError(answer, "empty: nothing to learn", "fill it in or remove the row")
    return [messages.chat(row, [*found, Message("assistant", told)], "row")]


def question(value: Mapping[str, Any]) -> str:
    """The instruction, with its input under it where there is one.

    >>> question({"instruction": "Say hi.", "input": ""})
    'Say hi.'
    """
    instruction = text_of(value["instruction"], "instruction")
    under = [name for name in names.UNDER_INSTRUCTION if not is_absent(value.get(name))] or ["input"]
    names.agree(value, under)
    given = text_of(value.get(under[0]) or "", under[0])
    whole = f"{instruction}\n\n{given}" if instruction and given.strip() else instruction or given
    if not whole.strip():
        raise RowError("instruction", "no words", "fill it in or remove the row")
    return whole


def _history(value: Any) -> list[Message]:
    found: list[Message] = []
    if not isinstance(value or [], list | tuple):
        raise RowError("history", f"{kind_of(value)}, not a list", "give [[question, answer], ...]")
    for index, turn in enumerate(value or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"history[{index}]", "not a question and its answer", "give [[question, answer], ...]")
        asked, told = (text_of(text, f"history[{index}][{i}]") for i, text in enumerate(turn))
        if not told.strip():
            raise RowError(f"history[{index}][1]", "an assistant message without words", "fill it in")
        found += [Message("user", asked), Message("assistant", told)]
    return found
