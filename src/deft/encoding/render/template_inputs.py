"""What a chat template gets of a conversation: as transformers hands it over, or with other `TemplateOptions`.

Reasoning comes under the three names that transformers fills in, tool calls as OpenAI writes them, tools as JSON
schemas. A template that cannot read that may still read other options: the switches that it has, an empty list of
tools, content as typed parts, arguments as JSON text, reasoning inside the content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count
from typing import TYPE_CHECKING, Any

from deft.core.types import Message, ToolCall
from deft.encoding.render.traced import (
    TOOLS,
    MessagePart,
    Traced,
    TracedDict,
    TracedFloat,
    TracedInt,
    TracedList,
    owner_of,
)

if TYPE_CHECKING:
    from deft.encoding.render.template import Template

ReasoningMarks = tuple[str, str]
"""What opens and what closes a block of reasoning."""

KNOWN_MARKS: tuple[ReasoningMarks, ...] = (
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
class Spelling:
    """How a block of reasoning is written: all that stands before its words, and between them and the answer."""

    opening: str
    closing: str

    @property
    def marks(self) -> ReasoningMarks:
        return self.opening.strip(), self.closing.strip()


@dataclass(frozen=True, slots=True)
class Space:
    """The white space of a block as a row has it: after its opening mark, before its closing mark, and after that."""

    opened: str = ""
    closing: str = ""
    after: str = ""

    def around(self, marks: ReasoningMarks) -> Spelling:
        r"""The marks of a template with the row's white space; nothing else is made up.

        >>> Space(closing="\n", after="\n\n").around(("<think>", "</think>"))
        Spelling(opening='<think>', closing='\n</think>\n\n')
        """
        opening, closing = marks
        opened = opening.rstrip() + self.opened if self.opened else opening
        return Spelling(opened, self.closing + closing + self.after)


TIGHT = Space()
"""No white space but that of the marks."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How a conversation is handed to a template; the default is what transformers does.

    switches        template variables beside the user's own
    empty_tools     no tools as an empty list
    parts           content as [{"type": "text", "text": ...}]
    text_arguments  arguments of tool calls as JSON text
    inline          reasoning inside the content, written so
    null            empty content as null
    blank           special tokens that the tokenizer does not have, as empty text
    no_developer    the developer's messages as the system's
    """

    switches: tuple[tuple[str, Any], ...] = ()
    empty_tools: bool = False
    parts: bool = False
    text_arguments: bool = False
    inline: Spelling | None = None
    null: bool = False
    blank: tuple[str, ...] = ()
    no_developer: bool = False

    def __str__(self) -> str:
        """What a user reads in the ledger; nothing for the default.

        >>> str(TemplateOptions(switches=(("enable_thinking", False),), empty_tools=True))
        'enable_thinking=false, tools=[]'
        """
        said = [f"{name}={json.dumps(value)}" for name, value in self.switches]
        said += ["tools=[]"] * self.empty_tools + ["content as typed parts"] * self.parts
        said += ["arguments as JSON text"] * self.text_arguments + ["reasoning inside content"] * bool(self.inline)
        said += ["empty content as null"] * self.null + ["developer messages as system messages"] * self.no_developer
        return ", ".join(said + [f"{name} is empty, as the tokenizer has none" for name in self.blank])


DEFAULT = TemplateOptions()


@dataclass(frozen=True, slots=True)
class TemplateInputs:
    """Makes the variables that a template gets of messages and tools; traced, their texts and numbers have owners."""

    options: TemplateOptions = DEFAULT
    is_traced: bool = False

    def messages(self, messages: Sequence[Message], first: int = 0) -> list[dict[str, Any]]:
        """The messages as the template gets them; `first` is the index of the first one.

        >>> TemplateInputs().messages([Message("assistant", "4.", reasoning="2 + 2")])[0]["reasoning_content"]
        '2 + 2'
        """
        return [self._message(message, index) for index, message in enumerate(messages, first)]

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Any] | None:
        """The tools as the template gets them; none are None, or an empty list where the options say so."""
        if not tools:
            return [] if self.options.empty_tools else None
        return [self._owned(tool, lambda: TOOLS) for tool in tools]

    def _message(self, message: Message, index: int) -> dict[str, Any]:
        content = self._content(message, index)
        is_renamed = self.options.no_developer and message.role == "developer"
        found: dict[str, Any] = {"role": "system" if is_renamed else message.role, "content": content}
        if self.options.parts:
            found["content"] = [{"type": "text", "text": content}]
        if self.options.null and not message.content and message.tool_calls:
            found["content"] = None
        if message.reasoning and self.options.inline is None:
            reasoning = self._text(message.reasoning, owner_of(index, MessagePart.REASONING))
            found |= {"thinking": reasoning, "reasoning_content": reasoning, "reasoning": reasoning}
        if message.tool_calls:
            leaves = count(1)
            found["tool_calls"] = [self._call(call, index, leaves) for call in message.tool_calls]
        for name in ("name", "tool_call_id"):
            if (words := getattr(message, name)) is not None:
                found[name] = self._text(words, owner_of(index, MessagePart.SPEAKER))
        return found

    def _text(self, words: str, owner: int) -> str:
        return Traced.of(words, owner) if self.is_traced else words

    def _content(self, message: Message, index: int) -> str:
        answer, inline = self._text(message.content, owner_of(index)), self.options.inline
        if inline is None or not message.reasoning:
            return answer
        thought = self._text(message.reasoning, owner_of(index, MessagePart.REASONING))
        return inline.opening + thought + inline.closing + answer

    def _call(self, call: ToolCall, index: int, leaves: Iterator[int]) -> dict[str, Any]:
        function = {
            "name": self._text(call.name, owner_of(index, MessagePart.CALL_NAME)),
            "arguments": self._owned(self.arguments(call), lambda: owner_of(index, MessagePart.ARGUMENT, next(leaves))),
        }
        found: dict[str, Any] = {"type": "function", "function": function}
        if call.id is not None:
            found = {"id": self._text(call.id, owner_of(index, MessagePart.CALL_ID)), **found}
        return found

    def arguments(self, call: ToolCall) -> Any:
        """A call's arguments as the template gets them."""
        if not self.options.text_arguments:
            return arguments_of(call)
        return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)

    def _owned(self, value: Any, owner: Callable[[], int]) -> Any:
        """A JSON value whose texts and numbers have owners, each asked for in the order of `leaves`."""
        if isinstance(value, str):
            return self._text(value, owner())
        if isinstance(value, Mapping):
            items = {self._text(str(key), owner()): self._owned(item, owner) for key, item in value.items()}
            return TracedDict(items) if self.is_traced else items
        if isinstance(value, list | tuple):
            listed = [self._owned(item, owner) for item in value]
            return TracedList(listed) if self.is_traced else listed
        if not self.is_traced or isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return TracedInt(value, owner()) if isinstance(value, int) else TracedFloat(value, owner())


def leaves(value: Any) -> Iterator[str]:
    """The texts and numbers of a JSON value, keys among them, as they are written.

    >>> list(leaves({"a": 1, "b": [True, "c"]}))
    ['a', '1', 'b', 'c']
    """
    if isinstance(value, Mapping):
        yield from (leaf for key, item in value.items() for leaf in (str(key), *leaves(item)))
    elif isinstance(value, list | tuple):
        yield from (leaf for item in value for leaf in leaves(item))
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value if isinstance(value, str) else repr(value)


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


def option_sets(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], space: Space = TIGHT
) -> Iterator[TemplateOptions]:
    """The default, then each change that can matter to this conversation, then two changes at once.

    The last of `messages` is the turn; its reasoning decides how the template's switches stand. `space` is the white
    space of reasoning inside the content.
    """
    yield DEFAULT
    changes = list(_changes(template, messages, tools, space))
    for base in (DEFAULT, TemplateOptions(blank=template.missing_tokens))[: 1 + bool(template.missing_tokens)]:
        if base is not DEFAULT:
            yield base
        yield from (replace(base, **change) for change in changes)
        for first, second in combinations(changes, 2):
            if not first.keys() & second.keys():
                yield replace(base, **first, **second)


def _changes(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], space: Space
) -> Iterator[dict[str, Any]]:
    thinks = bool(messages[-1].reasoning)
    if any(message.role == "developer" for message in messages):
        yield {"no_developer": True}
    if template.switches:
        yield {"switches": tuple((name, thinks) for name in template.switches)}
    if template.has_effort and thinks:
        yield {"switches": (("reasoning_effort", "high"),)}
    if not tools:
        yield {"empty_tools": True}
    yield {"parts": True}
    if any(message.tool_calls for message in messages):
        yield {"text_arguments": True}
    if thinks:
        yield from ({"inline": space.around(marks)} for marks in template.marks)
    if any(message.tool_calls and not message.content for message in messages):
        yield {"null": True}


PROBE_TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "probe",
            "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "probe"}}},
        },
    },
)


def probe(message: Message, index: int) -> Message:
    """A message with the same fields as `message`, whose words are made up; the weight is not kept.

    >>> probe(Message("user", "What is 2 + 2?"), 3)
    Message(role='user', content='probe 3', weight=None, reasoning='', tool_calls=(), name=None, tool_call_id=None)
    """
    return Message(
        role=message.role,
        content=f"probe {index}" if message.content.strip() else "",
        reasoning="probe" if message.reasoning.strip() else "",
        tool_calls=tuple(
            ToolCall("probe", {"a": "b"}, None if call.id is None else f"{number:09d}")
            for number, call in enumerate(message.tool_calls)
        ),
        name=None if message.name is None else "probe",
        tool_call_id=None if message.tool_call_id is None else f"{0:09d}",
    )
