"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "tools": "[...]"}.

A function_call is the assistant's, an observation a tool's. Under this name, and others of a chat, are read as well:
messages in OpenAI's keys; the texts of user and assistant in turn, ["...", "..."] (LIMA, UltraChat); and pairs of them,
[["...", "..."], ...] or [{"input": "...", "output": "..."}, ...] (Capybara).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import documents, messages, names, row_fields
from deft.data.fields import RowError, described, list_of, need, object_of, role_of, text_of
from deft.data.format import Choices

KEYS = names.sets(names.CHAT)

_CALL = messages.CALL
_NAMES = {
    "system": ("system",),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"),
    "tool": ("observation", "tool", "tool_response", "tool_result", "function_response", "function"),
}
ROLES = {name: role for role, group in _NAMES.items() for name in group} | messages.CALLERS
_ASKING, _TELLING = (*names.QUESTION, *names.SPEAKER, *names.PROMPT), (*names.ANSWER, *names.REPLIER)
PARTS = messages.READS.union(("from", "value"), _ASKING, _TELLING)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    >>> (found,) = convert(Row(Origin("a.json", 1), {"conversations": chat}), Choices())
    >>> [message.role for message in found.messages]
    ['user', 'assistant']
    """
    field = names.fields_of(row.value, conversations=names.CHAT)["conversations"]
    if field == "data" and documents.is_rows(row.value[field]):
        raise RowError(field, "a list of rows, not of turns", "write each of them on a line of its own")
    found = read_all(row.value[field], field)
    return [messages.chat(row, found, field)]


def read_all(value: Any, field: str) -> list[Message]:
    """The messages of a list. A call right after the assistant's words or calls belongs to the same message.

    >>> found = read_all([{"from": "gpt", "value": "Wait."}, {"from": "function_call", "value": '{"name": "f"}'}], "c")
    >>> [(message.content, message.tool_calls[0].name) for message in found]
    [('Wait.', 'f')]
    >>> [message.role for message in read_all(["Hi", "Hello"], "c")]
    ['user', 'assistant']
    """
    turns = list_of(value, field)
    if all(isinstance(each, str) for each in turns):
        return list(_in_turn(turns, field))
    pairs = [_pair(each, f"{field}[{index}]") for index, each in enumerate(turns)]
    if all(pairs):
        return [message for pair in pairs for message in pair]
    return messages.listed(value, field, read)


def _in_turn(texts: Sequence[str], field: str) -> Iterator[Message]:
    for index, text in enumerate(texts):
        yield Message("assistant" if index % 2 else "user", text_of(text, f"{field}[{index}]"))


def _pair(value: Any, field: str) -> list[Message]:
    """The two messages of a question and its answer; none where a turn is no such pair."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise RowError(field, "not a question and its answer", "give [question, answer], or messages")
        return list(_in_turn(value, field))
    if not isinstance(value, Mapping) or not {"role", "from"}.isdisjoint(value):
        return []
    asking = [name for name in _ASKING if name in value]
    telling = [name for name in _TELLING if name in value]
    if len(asking) != 1 or len(telling) != 1:
        return []
    asked, told = asking[0], telling[0]
    row_fields.refuse(value, row_fields.IN_MESSAGE, field)
    return [
        Message("user", text_of(value[asked], f"{field}.{asked}")),
        Message("assistant", text_of(value[told], f"{field}.{told}"), row_fields.learnt(value, field)),
    ]


def read(value: Any, field: str) -> Message:
    """One message in ShareGPT's keys, or in OpenAI's."""
    value = object_of(value, field, "a message")
    if value.get("role") is not None and value.get("from") is None:
        return messages.read(value, field)
    if {"from", "value"}.isdisjoint(value) and len(value) > 1:
        raise RowError(field, f"has {described(value)}: no turn", "where these are rows, write a row a line")
    need(value, ("from", "value"), "a ShareGPT message", field)
    role = role_of(value["from"], f"{field}.from", ROLES)
    if role == _CALL:
        return messages.called(value, "value", field)
    return messages.said(value, role, "value", field)
