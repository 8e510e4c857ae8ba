"""Messages as rows write them -> Message: OpenAI's keys, typed content parts, reasoning, tool calls, tools.

Every format with roles reads its messages here, so that a chat means the same in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deft.core.types import Conversation, Message, Row, ToolCall
from deft.data import blocks, row_fields
from deft.data.fields import (
    RowError,
    is_absent,
    json_of,
    kind_of,
    list_of,
    need,
    object_of,
    refuse_nan,
    role_of,
    shortened,
    text_of,
    unusable,
    value_of,
)
from deft.data.row_fields import IN_MESSAGE, REASONING, REFUSED, TOOLS

CALL = "call"
CALLERS = dict.fromkeys(("function_call", "tool_call", "function-call"), CALL)
"""Roles of turns that are a call, or several, of the assistant's."""
ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")}
ROLES |= {**dict.fromkeys(("function", "tool_response", "tool_result", "observation"), "tool"), **CALLERS}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}

_PLAIN = frozenset({"role", "content", "name", "tool_call_id", "tool_calls", "function_call", "from", "value"})
_WEIGHED = _PLAIN | row_fields.LEARNT
READS = _PLAIN.difference({"from", "value"}).union(
    row_fields.LEARNT, REASONING, IN_MESSAGE, TOOLS, blocks.OF_ITEMS, ("channel", "refusal")
)
"""The fields of a message that are read."""

_TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}
_PLAIN_PART = frozenset({"type", "text", "value"})
_REASONING_PARTS = {"reasoning", "thinking"}
_CALLS = frozenset({"tool_calls", "function_call"})
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
    if _is_analysis(value):
        raise unusable(f"{field}.channel", "an analysis without a final message")
    return _read(value, field)


def _read(value: Any, field: str) -> Message:
    value = object_of(value, field, "a message")
    if "role" not in value and "from" in value:
        fix = "these are ShareGPT's turns: say columns: {conversations: FIELD}, by the name of the list"
        raise RowError(f"{field}.role", "missing", fix)
    need(value, ("role",), "a message", field)
    role = role_of(value["role"], f"{field}.role", ROLES, SHAREGPT_ROLES)
    return called(value, "content", field) if role == CALL else said(value, role, "content", field)


def called(value: Mapping[str, Any], key: str, field: str) -> Message:
    """The message of a turn that is a call, or a list of parallel calls, mostly as JSON text under `key`.

    >>> called({"value": '{"name": "f"}', "weight": 0.5}, "value", "c").tool_calls[0].name
    'f'
    """
    need(value, (key,), "a call", field)
    calls = value_of(value[key], f"{field}.{key}")
    calls = calls if isinstance(calls, list | tuple) and calls else [calls]
    message = said({**value, key: ""}, "assistant", key, field)
    found = tool_calls({"tool_calls": calls}, f"{field}.{key}")
    return replace(message, tool_calls=found + message.tool_calls)


def said(value: Mapping[str, Any], role: str, key: str, field: str) -> Message:
    """The message of a role whose words stand under `key`; one on the channel analysis has reasoning alone.

    >>> said({"text": "4", "masked": True}, "assistant", "text", "messages[1]")
    Message(role='assistant', content='4', weight=0.0, reasoning='', tool_calls=(), name=None, tool_call_id=None)
    """
    parts = _content(value, key, role, field)
    calls = parts.calls + tool_calls(value, field)
    weight = None
    if not _PLAIN.issuperset(value):
        weight = row_fields.learnt(value, field)
        parts = _with_more(parts, value, role, field)
    if role != "assistant" and (calls or parts.reasoning):
        raise RowError(field, f"the {role} makes tool calls or reasons", "only the assistant does; mend the role")
    name, tool_call_id = _optional_text(value, "name", field), _optional_text(value, "tool_call_id", field)
    return Message(role, parts.text, weight, parts.reasoning, calls, name, tool_call_id)


def _with_more(parts: _Parts, value: Mapping[str, Any], role: str, field: str) -> _Parts:
    """What a message says, with what few do: reasoning, a refusal, a channel. RowError for what is of no use."""
    if _WEIGHED.issuperset(value):
        return parts
    row_fields.refuse(value, IN_MESSAGE, field)
    for key in TOOLS:
        if role not in ("system", "developer") and not is_absent(value.get(key)):
            raise unusable(f"{field}.{key}", f"the {role} offers tools; they belong to the row")
    reasoning = _reasoning(value, role, field) or parts.reasoning
    if parts.reasoning.strip() not in ("", reasoning.strip()):
        raise unusable(f"{field}.{_key_of(value)}", "the content has other reasoning")
    parts = replace(parts, reasoning=reasoning)
    if not is_absent(value.get("refusal")):
        parts = _refused(parts, value, role, field)
    return parts if is_absent(value.get("channel")) else _on_channel(parts, value, role, field)


def _refused(parts: _Parts, value: Mapping[str, Any], role: str, field: str) -> _Parts:
    """What the assistant says where it refuses, and says nothing else."""
    if role != "assistant" or parts.text.strip():
        raise unusable(f"{field}.refusal", "beside content" if role == "assistant" else f"the {role} refuses")
    return replace(parts, text=row_fields.text(value["refusal"], f"{field}.refusal"))


def _on_channel(parts: _Parts, value: Mapping[str, Any], role: str, field: str) -> _Parts:
    """Harmony's channels: analysis is reasoning, final an answer."""
    channel = value["channel"]
    if role != "assistant" or channel not in ("analysis", "final"):
        what = f"{shortened(repr(channel))} of the {role}; only the assistant's analysis and final channels are read"
        raise unusable(f"{field}.channel", what)
    if channel == "final":
        return parts
    if parts.calls or parts.reasoning or value.get("tool_calls"):
        raise unusable(f"{field}.channel", "an analysis with tool calls or reasoning of its own")
    return replace(parts, text="", reasoning=parts.text)


def _is_analysis(value: Any) -> bool:
    return isinstance(value, dict) and value.get("channel") == "analysis"


def read_all(value: Any, field: str) -> list[Message]:
    """A list of messages that is not empty.

    >>> [m.role for m in read_all([{"role": "user", "content": "Hi"}], "messages")]
    ['user']
    """
    return listed(value, field, _read)


def listed(value: Any, field: str, one: Callable[[Any, str], Message]) -> list[Message]:
    """The messages of a list, each read by `one`; an analysis is the reasoning of the final message right after it.

    >>> listed([{"role": "assistant", "content": "Hm.", "channel": "analysis"}], "messages", _read)
    Traceback (most recent call last):
    deft.data.fields.RowError: messages[0].channel: an analysis without a final message after it
    """
    places = ((f"{field}[{index}]", each) for index, each in enumerate(list_of(value, field)))
    turns = [(name, turn) for name, each in places for turn in blocks.unfolded(each)]
    found = [_Listed(name, turn, one(turn, name)) for name, turn in turns]
    whole: list[Message] = []
    for turn in _with_analysis(found) if any(_is_analysis(each.value) for each in found) else found:
        _add(whole, turn)
    return whole


class _Listed(NamedTuple):
    """A turn of a list: where it stands, what it is, and the message that it became."""

    field: str
    value: Any
    message: Message


def _add(whole: list[Message], turn: _Listed) -> None:
    """Puts a message after the others; a call right after the assistant's words or calls belongs to their message."""
    message, before = turn.message, whole[-1] if whole else turn.message
    is_call = turn.value.get("role", turn.value.get("from")) in CALLERS
    if is_call and whole and before.role == "assistant" and before.weight == message.weight:
        whole[-1] = replace(before, tool_calls=before.tool_calls + message.tool_calls)
    else:
        whole.append(message)


def _with_analysis(turns: Sequence[_Listed]) -> list[_Listed]:
    whole: list[_Listed] = []
    thought: _Listed | None = None
    for turn in turns:
        if thought is None:
            thought = turn if _is_analysis(turn.value) else None
            whole += [] if thought else [turn]
        elif _is_analysis(turn.value) or turn.message.role != "assistant":
            raise unusable(f"{thought.field}.channel", "an analysis without a final message after it")
        else:
            if thought.message.weight not in (None, turn.message.weight):
                raise unusable(f"{thought.field}.weight", "the analysis weighs other than its answer")
            if turn.message.reasoning.strip() not in ("", thought.message.reasoning.strip()):
                raise unusable(f"{turn.field}.{REASONING[0]}", "the analysis before it says otherwise")
            whole.append(turn._replace(message=replace(turn.message, reasoning=thought.message.reasoning)))
            thought = None
    if thought:
        raise unusable(f"{thought.field}.channel", "an analysis without a final message after it")
    return whole


def chat(row: Row, messages: Sequence[Message], field: str) -> Conversation:
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
    return Conversation(row.origin, "chat", tuple(messages))


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


def tool_calls(value: Mapping[str, Any], field: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of a message, and the `function_call` that came before them in OpenAI's API."""
    if _CALLS.isdisjoint(value):
        return ()
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
    value = object_of(value_of(value, field), field, "a tool call")
    inner = value if value.get("function") is None else value["function"]
    inner = object_of(inner, f"{field}.function", "a function with a name")
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{field}.name", "missing or not text", "a tool call needs the name of its tool")
    given: Any = next((inner[key] for key in ("arguments", "input", "parameters") if inner.get(key) is not None), {})
    return ToolCall(name, _arguments(given, f"{field}.arguments"), _optional_text(value, "id", field))


def _arguments(value: Any, field: str) -> Any:
    """Arguments as the row has them, an object or its JSON text; RowError where the text is no object."""
    if isinstance(value, str) and not value.strip():
        return {}
    refuse_nan(object_of(json_of(value, field), field, "an object of arguments"), field)
    return value


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a message's content holds."""

    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


def _content(value: Mapping[str, Any], key: str, role: str, field: str) -> _Parts:
    content = value.get(key)
    if isinstance(content, str):
        return _Parts(text_of(content, f"{field}.{key}"))
    if isinstance(content, list | tuple):
        return _parts(content, f"{field}.{key}")
    if content is None and role == "assistant" and _speaks_otherwise(value):
        return _Parts("")
    need(value, (key,), "a message", field)
    return _Parts(text_of(content, f"{field}.{key}"))


def _speaks_otherwise(value: Mapping[str, Any]) -> bool:
    return any(value.get(key) for key in ("tool_calls", "function_call", "refusal", *REASONING))


def _parts(content: Sequence[Any], field: str) -> _Parts:
    """Typed parts, in the one order that a Message can keep: reasoning, then text, then tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else object_of(part, name, "a content part")
        part = blocks.typed(part)
        kind = part["type"] if isinstance(part.get("type"), str) else ""
        if not _PLAIN_PART.issuperset(part) and (kind in _TEXT_PARTS or kind in _REASONING_PARTS):
            row_fields.refuse(part, _PART_REFUSED, name)
        if kind in _CALL_PARTS:
            calls.append(tool_call(part.get("value", part), name))
        elif ((calls or texts) and kind in _REASONING_PARTS) or (calls and kind in _TEXT_PARTS):
            fix = "split the message: its order is reasoning, text, tool calls"
            raise RowError(name, f"{kind} after {'a tool call' if calls else 'text'}", fix)
        elif kind in _TEXT_PARTS:
            if kind == "refusal" and len(content) > 1:
                raise unusable(f"{name}.refusal", "beside other parts")
            texts.append(_part_text(part, kind, name))
        elif kind in _REASONING_PARTS:
            thoughts.append(_part_text(part, kind, name))
        else:
            shown = shortened(repr(kind)) if kind else kind_of(part.get("type"))
            raise RowError(f"{name}.type", f"{shown} is not text, reasoning or tool_call", "deft trains on text")
    return _Parts("".join(texts), "".join(thoughts), tuple(calls))


_PART_REFUSED = {**REFUSED, **dict.fromkeys(row_fields.LEARNT, "parts of a message cannot be weighed apart")}


def _part_text(part: Mapping[str, Any], kind: str, field: str) -> str:
    key = next((key for key in ("text", "value", kind) if part.get(key) is not None), "text")
    return text_of(part.get(key), f"{field}.{key}")


def _reasoning(value: Mapping[str, Any], role: str, field: str) -> str:
    key = _key_of(value)
    if not key:
        return ""
    if role != "assistant":
        raise RowError(f"{field}.{key}", f"the {role} reasons", "only the assistant does; mend the role")
    found = [row_fields.thought(value[each], f"{field}.{each}") for each in REASONING if value.get(each)]
    if any(text != found[0] for text in found):
        raise unusable(f"{field}.{key}", "two fields of reasoning that differ")
    return found[0]


def _key_of(value: Mapping[str, Any]) -> str:
    """The field that has a message's reasoning, if one has."""
    return next((key for key in REASONING if value.get(key)), "")


def _optional_text(value: Mapping[str, Any], key: str, field: str) -> str | None:
    return None if is_absent(value.get(key)) else text_of(value[key], f"{field}.{key}")
