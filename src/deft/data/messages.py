"""Messages as rows write them -> Message: OpenAI's keys, typed content parts, reasoning, tool calls, tools.

Every format with roles reads its messages here, so that a chat means the same in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deft.core.types import Conversation, Message, Row, ToolCall
from deft.data.fields import (
    RowError,
    json_of,
    kind_of,
    list_of,
    need,
    object_of,
    role_of,
    shortened,
    text_of,
    weight_of,
)

ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")} | {"function": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_TEXT_PARTS = {"text", "input_text", "output_text"}
_REASONING_PARTS = {"reasoning", "thinking"}
_CALL_PARTS = {"tool_call", "tool_use", "function_call"}


def read(value: Any, field: str) -> Message:
    """One message in OpenAI's keys; content may be text, null beside reasoning or tool calls, or typed parts.

    >>> read({"role": "assistant", "content": "Hello", "loss_weight": 0.5}, "messages[0]").weight
    0.5
    >>> parts = [{"type": "thinking", "thinking": "Easy."}, {"type": "text", "text": "4"}]
    >>> message = read({"role": "assistant", "content": parts}, "messages[0]")
    >>> message.reasoning, message.content
    ('Easy.', '4')
    """
    value = object_of(value, field, "a message")
    need(value, ("role",), "a message", field)
    role = role_of(value["role"], f"{field}.role", ROLES, SHAREGPT_ROLES)
    parts = _content(value, role, field)
    calls = parts.calls + tool_calls(value, field)
    if role != "assistant" and (calls or parts.reasoning):
        raise RowError(field, f"the {role} makes tool calls or reasons", "only the assistant does; mend the role")
    return Message(
        role,
        parts.text,
        learnt(value, field),
        _reasoning(value, role, field) or parts.reasoning,
        calls,
        _optional_text(value, "name", field),
        _optional_text(value, "tool_call_id", field),
    )


def read_all(value: Any, field: str) -> list[Message]:
    """A list of messages that is not empty.

    >>> [m.role for m in read_all([{"role": "user", "content": "Hi"}], "messages")]
    ['user']
    """
    return [read(each, f"{field}[{index}]") for index, each in enumerate(list_of(value, field))]


def system(value: Mapping[str, Any]) -> list[Message]:
    """The system message that a row has beside its turns, if it has one."""
    return [Message("system", text_of(value["system"], "system"))] if value.get("system") else []


def learnt(value: Mapping[str, Any], field: str) -> float | None:
    """How much a message is learnt, by its `weight` or `loss_weight`."""
    weight = value.get("weight") if value.get("weight") is not None else value.get("loss_weight")
    return weight_of(weight, f"{field}.weight")


def chat(row: Row, messages: Sequence[Message], field: str, tools_value: Any = None) -> Conversation:
    """The conversation of a chat that has something to learn.

    RowError where no assistant speaks, or where an assistant message has neither words, reasoning nor tool calls.
    """
    is_answered = False
    for index, message in enumerate(messages):
        if message.role == "assistant":
            is_answered = True
            if is_silent(message):
                what = "an assistant message without words"
                raise RowError(f"{field}[{index}]", what, "fill it in or remove the row")
    if not is_answered:
        raise RowError(field, "no assistant message: nothing to learn", "add the answer or remove the row")
    return Conversation(row.origin, "chat", tuple(messages), tools(tools_value) if tools_value else ())


def is_silent(message: Message) -> bool:
    """Whether it is an assistant message with neither words, reasoning nor tool calls."""
    if message.role != "assistant" or message.tool_calls:
        return False
    return not (message.content.strip() or message.reasoning.strip())


def context(messages: Sequence[Message]) -> list[Message]:
    """The messages as a prompt: nothing in them is learnt unless the row gives a weight itself.

    >>> context([Message("assistant", "a"), Message("assistant", "b", 0.5)])[0].weight
    0.0
    """
    return [replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in messages]


def tools(value: Any, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Tools as a list or its JSON text -> OpenAI's form; bare schemas with a name are wrapped.

    >>> tools('[{"name": "add", "parameters": {}}]')
    ({'type': 'function', 'function': {'name': 'add', 'parameters': {}}},)
    """
    if isinstance(value, str):
        value = json_of(value, field) if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RowError(field, f"{kind_of(value)}, not a list", "give a list of tools, or its JSON text")
    return tuple(_tool(each, f"{field}[{index}]") for index, each in enumerate(value))


def tool_calls(value: Mapping[str, Any], field: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of a message, and the `function_call` that came before them in OpenAI's API."""
    calls = value.get("tool_calls") or ()
    if isinstance(calls, str):
        calls = json_of(calls, f"{field}.tool_calls")
    if not isinstance(calls, list | tuple):
        raise RowError(f"{field}.tool_calls", f"{kind_of(calls)}, not a list", "give a list of tool calls")
    found = [tool_call(each, f"{field}.tool_calls[{index}]") for index, each in enumerate(calls)]
    if value.get("function_call"):
        found.append(tool_call(value["function_call"], f"{field}.function_call"))
    return tuple(found)


def tool_call(value: Any, field: str) -> ToolCall:
    """A call as OpenAI nests it, as a bare object, or as JSON text.

    >>> tool_call('{"name": "add", "arguments": {"a": 1}}', "value")
    ToolCall(name='add', arguments={'a': 1}, id=None)
    """
    value = object_of(json_of(value, field), field, "a tool call")
    inner = object_of(value.get("function", value), f"{field}.function", "a function with a name")
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{field}.name", "missing or not text", "a tool call needs the name of its tool")
    given: Any = next((inner[key] for key in ("arguments", "input", "parameters") if inner.get(key) is not None), {})
    return ToolCall(name, _arguments(given, f"{field}.arguments"), _optional_text(value, "id", field))


def _arguments(value: Any, field: str) -> Any:
    """Arguments as the row has them, an object or its JSON text; RowError where the text is no object."""
    if isinstance(value, str) and not value.strip():
        return {}
    object_of(json_of(value, field), field, "an object of arguments")
    return value


def _tool(value: Any, field: str) -> Mapping[str, Any]:
    value = object_of(json_of(value, field), field, "a tool")
    inner = value.get("function", value)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise RowError(f"{field}.name", "missing or not text", "a tool needs a name")
    return value if "function" in value else {"type": "function", "function": value}


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a message's content holds."""

    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


def _content(value: Mapping[str, Any], role: str, field: str) -> _Parts:
    content = value.get("content")
    if isinstance(content, str):
        return _Parts(text_of(content, f"{field}.content"))
    if isinstance(content, list | tuple):
        return _parts(content, f"{field}.content")
    if content is None and role == "assistant" and _speaks_otherwise(value):
        return _Parts("")
    need(value, ("content",), "a message", field)
    return _Parts(text_of(content, f"{field}.content"))


def _speaks_otherwise(value: Mapping[str, Any]) -> bool:
    return any(value.get(key) for key in ("tool_calls", "function_call", *REASONING_KEYS))


def _parts(content: Sequence[Any], field: str) -> _Parts:
    """Typed parts, in the one order that a Message can keep: reasoning, then text, then tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else object_of(part, name, "a content part")
        kind = part["type"] if isinstance(part.get("type"), str) else ""
        if kind in _CALL_PARTS:
            calls.append(tool_call(part.get("value", part), name))
        elif ((calls or texts) and kind in _REASONING_PARTS) or (calls and kind in _TEXT_PARTS):
            fix = "split the message: its order is reasoning, text, tool calls"
            raise RowError(name, f"{kind} after {'a tool call' if calls else 'text'}", fix)
        elif kind in _TEXT_PARTS:
            texts.append(_part_text(part, kind, name))
        elif kind in _REASONING_PARTS:
            thoughts.append(_part_text(part, kind, name))
        else:
            shown = shortened(repr(kind)) if kind else kind_of(part.get("type"))
            raise RowError(f"{name}.type", f"{shown} is not text, reasoning or tool_call", "deft trains on text")
    return _Parts("".join(texts), "".join(thoughts), tuple(calls))


def _part_text(part: Mapping[str, Any], kind: str, field: str) -> str:
    key = next((key for key in ("text", "value", kind) if part.get(key) is not None), "text")
    return text_of(part.get(key), f"{field}.{key}")


def _reasoning(value: Mapping[str, Any], role: str, field: str) -> str:
    key = next((key for key in REASONING_KEYS if value.get(key)), None)
    if key is None:
        return ""
    if role != "assistant":
        raise RowError(f"{field}.{key}", f"the {role} reasons", "only the assistant does; mend the role")
    return text_of(value[key], f"{field}.{key}")


def _optional_text(value: Mapping[str, Any], key: str, field: str) -> str | None:
    return None if value.get(key) is None else text_of(value[key], f"{field}.{key}")
