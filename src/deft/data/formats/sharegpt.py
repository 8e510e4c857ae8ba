"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "tools": "[...]"}.

A function_call is the assistant's, an observation a tool's. Messages in OpenAI's keys are read under this name as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import messages
from deft.data.fields import json_of, list_of, need, object_of, role_of, text_of
from deft.data.format import Choices

KEYS = ({"conversations"},)

_CALL = "call"
_NAMES = {
    "system": ("system",),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"),
    "tool": ("observation", "tool", "tool_response", "tool_result", "function_response", "function"),
    _CALL: ("function_call", "tool_call", "function-call"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    >>> (found,) = convert(Row(Origin("a.json", 1), {"conversations": chat}), Choices())
    >>> [message.role for message in found.messages]
    ['user', 'assistant']
    """
    need(row.value, ("conversations",), "a row")
    found = read_all(row.value["conversations"], "conversations")
    return [messages.chat(row, [*messages.system(row.value), *found], "conversations", row.value.get("tools"))]


def read_all(value: Any, field: str) -> list[Message]:
    """The messages of a list. A call right after the assistant's words belongs to the same message.

    >>> found = read_all([{"from": "gpt", "value": "Wait."}, {"from": "function_call", "value": '{"name": "f"}'}], "c")
    >>> [(message.content, message.tool_calls[0].name) for message in found]
    [('Wait.', 'f')]
    """
    found: list[Message] = []
    for index, each in enumerate(list_of(value, field)):
        message = read(each, f"{field}[{index}]")
        if message.tool_calls and not message.content and found and _takes_call(found[-1], message):
            found[-1] = replace(found[-1], tool_calls=message.tool_calls)
        else:
            found.append(message)
    return found


def read(value: Any, field: str) -> Message:
    """One message in ShareGPT's keys, or in OpenAI's."""
    value = object_of(value, field, "a message")
    if "role" in value and "from" not in value:
        return messages.read(value, field)
    need(value, ("from", "value"), "a ShareGPT message", field)
    role = role_of(value["from"], f"{field}.from", ROLES)
    weight = messages.learnt(value, field)
    if role == _CALL:
        return replace(_call(value["value"], f"{field}.value"), weight=weight)
    return Message(role, text_of(value["value"], f"{field}.value"), weight)


def _call(value: Any, field: str) -> Message:
    """A call, or a list of parallel calls, mostly as JSON text."""
    calls = json_of(value, field)
    calls = calls if isinstance(calls, list | tuple) and calls else [calls]
    return Message("assistant", "", tool_calls=messages.tool_calls({"tool_calls": calls}, field))


def _takes_call(before: Message, call: Message) -> bool:
    return before.role == "assistant" and not before.tool_calls and before.weight == call.weight
