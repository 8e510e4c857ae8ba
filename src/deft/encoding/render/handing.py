"""How a conversation is handed to a chat template: as transformers does, or in one of a few other ways.

Reasoning comes under the three names that transformers fills in, tool calls as OpenAI writes them, tools as JSON
schemas. A template that cannot read that may still read another `Way`: the switches that it has, an empty list of
tools, content as typed parts, arguments as JSON text, reasoning inside the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from deft.core.types import Message, ToolCall
from deft.encoding.render.provenance import (
    TEMPLATE,
    TOOLS,
    Part,
    Traced,
    TracedDict,
    TracedFloat,
    TracedInt,
    TracedList,
    join,
    owner_of,
    part_of,
)

Marks = tuple[str, str]
"""What opens and what closes a block of reasoning."""

KNOWN_MARKS: tuple[Marks, ...] = (
    ("<think>", "</think>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<reasoning>", "</reasoning>"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
)
"""How models that think write it."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to hand a conversation over; the default is that of transformers.

    switches   template variables beside the user's own
    tools      what stands for no tools: None, or () for an empty list
    parts      content as [{"type": "text", "text": ...}]
    arguments  of tool calls, as an object or as JSON text
    inline     reasoning inside the content, between these marks
    null       empty content as null
    blank      special tokens that the tokenizer does not have, as empty text
    """

    switches: tuple[tuple[str, Any], ...] = ()
    empty_tools: bool = False
    parts: bool = False
    text_arguments: bool = False
    inline: Marks | None = None
    null: bool = False
    blank: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a user reads in the ledger; nothing for the default.

        >>> str(Way(switches=(("enable_thinking", False),), empty_tools=True))
        'enable_thinking=false, tools=[]'
        """
        said = [f"{name}={json.dumps(value)}" for name, value in self.switches]
        said += ["tools=[]"] * self.empty_tools + ["content as typed parts"] * self.parts
        said += ["arguments as JSON text"] * self.text_arguments + ["reasoning inside content"] * bool(self.inline)
        said += ["empty content as null"] * self.null
        return ", ".join(said + [f"{name} is empty, as the tokenizer has none" for name in self.blank])


DEFAULT = Way()

Text = Callable[[str, int], str]
"""Makes the text that a template gets of a text and its owner: traced, or the plain text itself."""


def plain(text: str, owner: int) -> str:
    return text


def traced(text: str, owner: int) -> str:
    return Traced.of(text, owner)


def chat(messages: Sequence[Message], way: Way, text: Text, marks: Sequence[Marks] = ()) -> list[dict[str, Any]]:
    """The messages as the template gets them; `marks` are those that open a block of reasoning in content.

    >>> chat([Message("assistant", "4.", reasoning="2 + 2")], DEFAULT, plain)[0]["reasoning_content"]
    '2 + 2'
    """
    return [_message(message, index, way, text, marks) for index, message in enumerate(messages)]


def _message(message: Message, index: int, way: Way, text: Text, marks: Sequence[Marks]) -> dict[str, Any]:
    content = _content(message, index, way, text, marks)
    found: dict[str, Any] = {"role": message.role, "content": content}
    if way.parts:
        found["content"] = [{"type": "text", "text": content}]
    if way.null and not message.content and message.tool_calls:
        found["content"] = None
    if message.reasoning and way.inline is None:
        reasoning = text(message.reasoning, owner_of(index, Part.REASONING))
        found |= {"thinking": reasoning, "reasoning_content": reasoning, "reasoning": reasoning}
    if message.tool_calls:
        leaves = count(1)
        found["tool_calls"] = [_call(call, index, leaves, way, text) for call in message.tool_calls]
    if message.name is not None:
        found["name"] = text(message.name, owner_of(index, Part.SPEAKER))
    if message.tool_call_id is not None:
        found["tool_call_id"] = text(message.tool_call_id, owner_of(index, Part.SPEAKER))
    return found


def _content(message: Message, index: int, way: Way, text: Text, marks: Sequence[Marks]) -> str:
    if message.reasoning and way.inline:
        return _inline(message, index, way.inline, text)
    block = block_of(message, marks)
    if block is None or text is plain:
        return text(message.content, owner_of(index))
    return join("", (text(piece, owner) for piece, owner in block.pieces(index)))


def _inline(message: Message, index: int, marks: Marks, text: Text) -> str:
    opening, closing = marks
    break_ = "" if opening.endswith("\n") else "\n"
    pieces = [text(message.reasoning, owner_of(index, Part.REASONING)), text(message.content, owner_of(index))]
    return opening + break_ + pieces[0] + "\n" + closing + "\n\n" + pieces[1]


@dataclass(frozen=True, slots=True)
class Block:
    """An assistant's content that opens with its reasoning: `before` and `opening`, `reasoning`, `closing`, `rest`."""

    opening: str
    reasoning: str
    closing: str
    rest: str

    def pieces(self, index: int) -> list[tuple[str, int]]:
        owners = (TEMPLATE, owner_of(index, Part.REASONING), TEMPLATE, owner_of(index))
        return list(zip((self.opening, self.reasoning, self.closing, self.rest), owners, strict=True))


def block_of(message: Message, marks: Sequence[Marks]) -> Block | None:
    """The reasoning that an assistant's content opens with, between one of `marks`; None where it has none.

    >>> block_of(Message("assistant", "<think>\\nHm.</think>\\n4."), KNOWN_MARKS)
    Block(opening='<think>', reasoning='\\nHm.', closing='</think>', rest='\\n4.')
    """
    if message.role != "assistant" or message.reasoning:
        return None
    for opening, closing in marks:
        start = len(message.content) - len(message.content.lstrip())
        at = message.content.find(closing, start)
        if message.content.startswith(opening.rstrip(), start) and at >= 0:
            inside = start + len(opening.rstrip())
            content = message.content
            return Block(content[:inside], content[inside:at], closing, content[at + len(closing) :])
    return None


def said(message: Message, marks: Sequence[Marks]) -> Message:
    """The message with the reasoning that its content opens with as its reasoning."""
    block = block_of(message, marks)
    return message if block is None else replace(message, content=block.rest, reasoning=block.reasoning)


def _call(call: ToolCall, index: int, leaves: Iterator[int], way: Way, text: Text) -> dict[str, Any]:
    arguments = arguments_of(call)
    if way.text_arguments:
        arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {
        "name": text(call.name, owner_of(index, Part.CALL_NAME)),
        "arguments": _owned(arguments, lambda: owner_of(index, Part.ARGUMENT, next(leaves)), text),
    }
    found: dict[str, Any] = {"type": "function", "function": function}
    return found if call.id is None else {"id": text(call.id, owner_of(index, Part.CALL_ID)), **found}


def arguments_of(call: ToolCall) -> Any:
    """A call's arguments as an object where they are one, written as JSON text or not.

    >>> arguments_of(ToolCall("f", '{"a": 1}')), arguments_of(ToolCall("f", "a, b"))
    ({'a': 1}, 'a, b')
    """
    if not isinstance(call.arguments, str):
        return call.arguments
    try:
        value = json.loads(call.arguments)
    except ValueError:
        return call.arguments
    return value if isinstance(value, dict) else call.arguments


def leaves_of(calls: Sequence[ToolCall], way: Way) -> list[str]:
    """The texts and numbers of all arguments, in the order in which `chat` numbers them.

    >>> leaves_of([ToolCall("f", {"a": 1, "b": [True, "c"]})], DEFAULT)
    ['a', '1', 'b', 'c']
    """
    found: list[str] = []

    def remember(text: str, owner: int) -> str:
        if part_of(owner) == Part.ARGUMENT:
            found.append(text)
        return text

    for call in calls:
        _call(call, 0, count(1), way, remember)
    return found


def schemas(tools: Sequence[Mapping[str, Any]], way: Way, text: Text) -> list[Any] | None:
    """The tools as the template gets them; none are None, or an empty list where the way says so."""
    if not tools:
        return [] if way.empty_tools else None
    return [_owned(tool, lambda: TOOLS, text) for tool in tools]


def _owned(value: Any, owner: Callable[[], int], text: Text) -> Any:
    """A JSON value whose texts and numbers have owners, each asked for in order."""
    if isinstance(value, str):
        return text(value, owner())
    if isinstance(value, Mapping):
        items = {text(str(key), owner()): _owned(item, owner, text) for key, item in value.items()}
        return TracedDict(items) if text is traced else items
    if isinstance(value, list | tuple):
        listed = [_owned(item, owner, text) for item in value]
        return TracedList(listed) if text is traced else listed
    if text is plain or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if text is not traced:
        text(repr(value), owner())
        return value
    return TracedInt(value, owner()) if isinstance(value, int) else TracedFloat(value, owner())


_SWITCH = re.compile(r"(enable_|use_)?(thinking|reasoning|think)|add_thoughts")
"""Template variables that say whether the answer begins with reasoning."""


def switches_of(variables: Sequence[str]) -> tuple[str, ...]:
    """The switches among a template's variables.

    >>> switches_of(["messages", "enable_thinking", "thinking_budget"])
    ('enable_thinking',)
    """
    return tuple(name for name in variables if _SWITCH.fullmatch(name))
