"""Content blocks as APIs write them -> OpenAI's: Anthropic's tool results, Bedrock's and Gemini's untyped parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

_RESULT = "tool_result"


def unfolded(value: Any) -> list[Any]:
    """A message as OpenAI would write it: each result of a tool that its content holds is a message of its own.

    >>> parts = [{"toolResult": {"toolUseId": "c1", "content": [{"json": {"t": 3}}]}}, {"text": "And Rome?"}]
    >>> for message in unfolded({"role": "user", "content": parts}):
    ...     print(message)
    {'role': 'tool', 'content': '{"t": 3}', 'tool_call_id': 'c1', 'name': None}
    {'role': 'user', 'content': [{'type': 'text', 'text': 'And Rome?'}]}
    """
    content = value.get("content") if isinstance(value, Mapping) else None
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
    if kind in ("functionResponse", "function_response"):
        return {"type": _RESULT, "content": inner.get("response"), "tool_use_id": inner.get("id"), **_named(inner)}
    if kind in ("functionCall", "function_call"):
        call = {"name": inner.get("name"), "arguments": inner.get("args"), "id": inner.get("id")}
        return {"type": "tool_call", "value": call}
    if kind == "toolUse":
        return {
            "type": "tool_use",
            "id": inner.get("toolUseId"),
            "name": inner.get("name"),
            "input": inner.get("input"),
        }
    if kind == "toolResult":
        return {"type": _RESULT, "tool_use_id": inner.get("toolUseId"), "content": inner.get("content")}
    return {"type": "reasoning", "text": _reasoning(inner)}


_BEDROCK = ("toolUse", "toolResult", "reasoningContent")
_GEMINI = ("functionCall", "function_call", "functionResponse", "function_response")


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == _RESULT


def _named(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": inner["name"]} if inner.get("name") else {}


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
