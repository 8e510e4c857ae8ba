"""Messages and content blocks as APIs write them -> OpenAI's chats: Anthropic, Bedrock, Gemini, OpenAI's Responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

_RESULT = "tool_result"


def unfolded(value: Any) -> list[Any]:
    """A message as OpenAI would write it: each result of a tool that its content holds is a message of its own.

    An item of the Responses API is a message: a call, its output, or reasoning for what the assistant says next.

    >>> parts = [{"toolResult": {"toolUseId": "c1", "content": [{"json": {"t": 3}}]}}, {"text": "And Rome?"}]
    >>> for message in unfolded({"role": "user", "content": parts}):
    ...     print(message)
    {'role': 'tool', 'content': '{"t": 3}', 'tool_call_id': 'c1', 'name': None}
    {'role': 'user', 'content': [{'type': 'text', 'text': 'And Rome?'}]}
    """
    if not isinstance(value, dict):
        return [value]
    if "type" in value and value["type"] in _ITEMS and value.get("role") is None:
        return _of_item(value)
    content = value.get("content")
    if not isinstance(content, list | tuple):
        return [value]
    parts = [typed(part) for part in content]
    if not any(map(_is_result, parts)):
        return [value]
    found: list[Any] = []
    for is_result, group in groupby(parts, _is_result):
        run = list(group)
        found += map(_result, run) if is_result else [{**value, "content": run}]
    return found


OF_ITEMS = ("type", "call_id", "arguments", "output", "summary")
"""The fields of items of the Responses API that are read."""
_ITEMS = ("function_call", "function_call_output", "reasoning")


def _of_item(item: Mapping[str, Any]) -> list[Any]:
    """
    >>> _of_item({"type": "function_call_output", "call_id": "c1", "output": "3"})
    [{'role': 'tool', 'content': '3', 'tool_call_id': 'c1'}]
    """
    if item["type"] == "function_call_output":
        return [{"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}]
    if item["type"] == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments"), "id": item.get("call_id")}
        return [{"role": "function_call", "content": call}]
    pieces = item.get("content") or item.get("summary") or ()
    thought = "\n\n".join(map(_text, pieces))
    return [{"role": "assistant", "channel": "analysis", "content": thought}] if thought else []


def typed(part: Any) -> Any:
    """A content part with a type, as OpenAI and Anthropic write it; what is none stays as it is.

    >>> typed({"functionCall": {"name": "weather", "args": {"city": "Oslo"}}})
    {'type': 'tool_use', 'id': None, 'name': 'weather', 'input': {'city': 'Oslo'}}
    >>> typed({"text": "Easy.", "thought": True})
    {'type': 'reasoning', 'text': 'Easy.'}
    """
    if not isinstance(part, Mapping) or "type" in part:
        return part
    key = next((key for key in (*_NESTED, "reasoningContent", "text") if part.get(key) is not None), "")
    inner = part.get(key)
    if key == "text":
        return {"type": "reasoning" if part.get("thought") else "text", "text": inner}
    if not isinstance(inner, Mapping):
        return {"type": next(iter(part), ""), **part}
    if key == "reasoningContent":
        words = inner.get("reasoningText")
        return {"type": "reasoning", "text": words.get("text") if isinstance(words, Mapping) else words}
    kind, fields = _NESTED[key]
    return {"type": kind, **{name: inner.get(own) for name, own in fields.items()}}


_CALL = ("tool_use", {"id": "id", "name": "name", "input": "args"})
_RESPONSE = (_RESULT, {"tool_use_id": "id", "name": "name", "content": "response"})
_NESTED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "toolUse": ("tool_use", {"id": "toolUseId", "name": "name", "input": "input"}),
    "toolResult": (_RESULT, {"tool_use_id": "toolUseId", "content": "content"}),
    **{"functionCall": _CALL, "function_call": _CALL, "functionResponse": _RESPONSE, "function_response": _RESPONSE},
}
"""Parts of Bedrock's and Gemini's by their key: their type, and its fields with their own names for them."""


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == _RESULT


def _result(part: Mapping[str, Any]) -> dict[str, Any]:
    """The message of a tool's result, whose content is text, parts with text, or JSON values."""
    content = part.get("content")
    pieces = content if isinstance(content, list | tuple) else [content]
    text = "\n".join(map(_text, pieces))
    return {"role": "tool", "content": text, "tool_call_id": part.get("tool_use_id"), "name": part.get("name")}


def _text(piece: Any) -> str:
    """Text of a result as it is, a JSON value as JSON; no picture is either."""
    if isinstance(piece, str):
        return piece
    if isinstance(piece, Mapping) and isinstance(piece.get("text"), str):
        return str(piece["text"])
    value = piece["json"] if isinstance(piece, Mapping) and "json" in piece else piece
    return "" if value is None else json.dumps(value, ensure_ascii=False)
