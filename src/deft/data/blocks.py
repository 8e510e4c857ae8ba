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
    {'type': 'tool_call', 'value': {'name': 'weather', 'arguments': {'city': 'Oslo'}, 'id': None}}
    >>> typed({"text": "Easy.", "thought": True})
    {'type': 'reasoning', 'text': 'Easy.'}
    """
    if not isinstance(part, Mapping) or "type" in part:
        return part
    kind = next((kind for kind in (*_BEDROCK, *_GEMINI, "text") if part.get(kind) is not None), None)
    if kind == "text":
        return {"type": "reasoning" if part.get("thought") else "text", "text": part["text"]}
    inner = part[kind] if kind else None
    if kind is None or not isinstance(inner, Mapping):
        return {"type": next(iter(part), ""), **part}
    get = inner.get
    if kind in ("functionResponse", "function_response"):
        return {"type": _RESULT, "content": get("response"), "tool_use_id": get("id"), "name": get("name")}
    if kind in ("functionCall", "function_call"):
        return {"type": "tool_call", "value": {"name": get("name"), "arguments": get("args"), "id": get("id")}}
    if kind == "toolUse":
        return {"type": "tool_use", "id": get("toolUseId"), "name": get("name"), "input": get("input")}
    if kind == "toolResult":
        return {"type": _RESULT, "tool_use_id": get("toolUseId"), "content": get("content")}
    return {"type": "reasoning", "text": _reasoning(inner)}


_BEDROCK = ("toolUse", "toolResult", "reasoningContent")
_GEMINI = ("functionCall", "function_call", "functionResponse", "function_response")


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == _RESULT


def _reasoning(inner: Mapping[str, Any]) -> Any:
    found = inner.get("reasoningText")
    return found.get("text") if isinstance(found, Mapping) else found


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
