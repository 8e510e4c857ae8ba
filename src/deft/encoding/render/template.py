"""A chat template, compiled once in the sandbox; characters remember their message.

The text is the one `tokenizer.apply_chat_template(..., tokenize=False)` gives (a test of law 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.exceptions import SecurityError

from deft.core.errors import InputError
from deft.core.types import Message
from deft.encoding.render import handing
from deft.encoding.render.handing import (
    DEFAULT,
    KNOWN_MARKS,
    Marks,
    Way,
)
from deft.encoding.render.provenance import TEMPLATE, Traced
from deft.encoding.render.sandbox import (
    SIZE,
    STEPS,
    Exhausted,
    Meter,
    Sandbox,
    TracingSandbox,
)

_PLAIN = """\
{%- for message in messages -%}
    {{- message['role'] + ': ' + message['content'] -}}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}
"""


def plain(puts_bos: bool) -> str:
    """deft's template for models without one: `role: content` lines, each assistant turn closed by the EOS token.

    BOS stands in front where the tokenizer itself puts one. The generation prompt ends at the colon, so that an
    answer's first word keeps the space that its token holds.
    """
    return ("{{- bos_token -}}\n" if puts_bos else "") + _PLAIN


_MISHAPS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own code raises on a conversation that it cannot render."""

_PATIENCE = 3
"""So many renders may go over their limits before the template is not used at all."""


CHATML_END = "<|im_end|>"

_CHATML = """\
{%- macro turn(role) -%}{{- '<|im_start|>' + role + '\\n' + caller() + END + '\\n' -}}{%- endmacro -%}
{%- if tools -%}
    {%- call turn('system') -%}
        {{- messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -}}
        {{- '# Tools\\n\\nCall these functions, each call as JSON in <tool_call></tool_call>:\\n<tools>' -}}
        {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
        {{- '\\n</tools>' -}}
    {%- endcall -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'tool' -%}
        {%- call turn('user') -%}
            {{- '<tool_response>\\n' + message['content'] + '\\n</tool_response>' -}}
        {%- endcall -%}
    {%- elif not (loop.first and tools and message['role'] == 'system') -%}
        {%- call turn(message['role']) -%}
            {%- if message['reasoning_content'] -%}
                {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
            {%- endif -%}
            {{- message['content'] -}}
            {%- for call in message['tool_calls'] or [] -%}
                {{- '' if loop.first and not message['content'] else '\\n' -}}
                {{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson -}}
                {{- ', "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' -}}
            {%- endfor -%}
        {%- endcall -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def chatml(puts_bos: bool, has_end: bool) -> str:
    """`<|im_start|>role ... <|im_end|>`, with tools, tool calls and reasoning; EOS where there is no such end token."""
    end = "'" + CHATML_END + "'" if has_end else "eos_token"
    return ("{{- bos_token -}}\n" if puts_bos else "") + _CHATML.replace("END", end)


class Refusal(Exception):
    """A conversation whose mask cannot be proven, with the reason."""


@dataclass(frozen=True)
class Template:
    """A compiled chat template and the special tokens it may name.

    tokens   bos_token, eos_token and the like, as transformers hands them to a template
    kwargs   the user's own variables for every render (`template_kwargs`)
    now      the moment that it calls now: one run has one date

    >>> template = Template(plain(puts_bos=True), {"bos_token": "<s>", "eos_token": "</s>"})
    >>> template.render([Message("user", "Hi"), Message("assistant", "Hello")])
    '<s>user: Hi\\nassistant: Hello</s>\\n'
    """

    source: str
    tokens: Mapping[str, str]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    _plain: Compiled = field(init=False, repr=False, compare=False)
    _tracing: Compiled = field(init=False, repr=False, compare=False)
    _over: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plain", Compiled(self.source, Sandbox(), self.now))
        object.__setattr__(self, "_tracing", Compiled(self.source, TracingSandbox(), self.now))

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Its variables that say whether the answer begins with reasoning, unless the user sets them."""
        return tuple(name for name in handing.switches_of(self._plain.variables) if name not in self.kwargs)

    @cached_property
    def has_effort(self) -> bool:
        """Whether it asks how much to think, which some templates take as a switch, unless the user says."""
        return "reasoning_effort" in self._plain.variables and "reasoning_effort" not in self.kwargs

    @cached_property
    def missing_tokens(self) -> tuple[str, ...]:
        """The special tokens that it reads and the tokenizer does not have."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return tuple(name for name in names if name in self._plain.variables and name not in self.tokens)

    @cached_property
    def marks(self) -> tuple[Marks, ...]:
        """The known marks of reasoning that it writes or looks for."""
        return tuple(pair for pair in KNOWN_MARKS if any(mark.strip() in self.source for mark in pair))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        way: Way = DEFAULT,
    ) -> Traced:
        """The text of `messages`, each character owned by a part of its message, by the tools or by the template.

        Raises Refusal with the template's own words where it refuses the conversation, and InputError where it goes
        over its limits of time and size again and again.
        """
        return self.hand(messages, tools, way).traced(len(messages), add_generation_prompt)

    def hand(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), way: Way = DEFAULT) -> Handed:
        """A conversation, ready to be rendered up to any of its messages."""
        return Handed(self, messages, tools, way)

    def compiled(self, sandbox: Sandbox) -> Compiled:
        """The template in another sandbox, with the same date. Raises InputError where it cannot be compiled there."""
        return Compiled(self.source, sandbox, self._plain.now)

    def run(self, compiled: Compiled, meter: Meter, variables: Mapping[str, Any]) -> str:
        """What one of the sandboxes renders; Refusal and InputError as in `render`."""
        try:
            return compiled.render(meter, variables)
        except Exhausted as error:
            self._over.append(str(error))
            if len(self._over) >= _PATIENCE:
                raise InputError(f"chat template: {error}; name another with template=") from error
            raise Refusal(f"the chat template goes over its limits: {error}") from error
        except _MISHAPS as error:
            raise Refusal(f"the chat template refuses this conversation: {error}") from error


@dataclass(frozen=True)
class Handed:
    """One conversation, handed to one template in one way; what the template gets is made once."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    way: Way
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def plain(self, end: int, add_generation_prompt: bool = False) -> str:
        """The text of the first `end` messages, as plain strings give it."""
        key = end, add_generation_prompt
        if key not in self._texts:
            self._texts[key] = self._rendered(self.template._plain, self._given, end, add_generation_prompt)
        return self._texts[key]

    def like(self, messages: Sequence[Message]) -> str:
        """The text of other messages with the same tools, handed over in the same way, as plain strings give it."""
        pairs = zip(messages, self.messages, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
        if same == len(messages):
            return self.plain(same)
        others = handing.chat(messages[same:], self.way, handing.plain, self.template.marks)
        given = {**self._given, "messages": [*self._given["messages"][:same], *others]}
        return self._rendered(self.template._plain, given, len(messages), False)

    def traced(self, end: int, add_generation_prompt: bool = False) -> Traced:
        """The same text with the owners of its characters; Refusal where tracing would change it."""
        found = self._rendered(self.template._tracing, self._owned, end, add_generation_prompt)
        if not str.__eq__(found, self.plain(end, add_generation_prompt)):
            raise Refusal("the template changes what messages say in a way that cannot be followed")
        return found if isinstance(found, Traced) else Traced.of(found, TEMPLATE)

    def _rendered(self, compiled: Compiled, given: Mapping[str, Any], end: int, add_generation_prompt: bool) -> str:
        now = {"messages": given["messages"][:end], "add_generation_prompt": add_generation_prompt}
        return self.template.run(compiled, Meter(*self.limits), {**given, **now})

    @cached_property
    def _given(self) -> dict[str, Any]:
        return self.variables(handing.plain)

    @cached_property
    def _owned(self) -> dict[str, Any]:
        return self.variables(handing.traced)

    def variables(self, text: handing.Text) -> dict[str, Any]:
        """What the template gets of all messages, with texts made by `text`."""
        return {
            **dict.fromkeys(self.way.blank, ""),
            **self.template.tokens,
            **self.template.kwargs,
            **dict(self.way.switches),
            "messages": handing.chat(self.messages, self.way, text, self.template.marks),
            "tools": handing.schemas(self.tools, self.way, text),
            "documents": None,
        }

    @cached_property
    def limits(self) -> tuple[int, int]:
        """Steps and size, which grow with the conversation."""
        length = sum(len(m.content) + len(m.reasoning) for m in self.messages)
        length += sum(len(str(m.tool_calls)) for m in self.messages if m.tool_calls)
        length += len(str(self.tools)) if self.tools else 0
        return STEPS + length + 64 * len(self.messages) ** 2, SIZE + 256 * length


class Compiled:
    """One template in one sandbox."""

    def __init__(self, source: str, sandbox: Sandbox, now: datetime) -> None:
        self._sandbox = sandbox
        self.now = now
        try:
            parsed = sandbox.parse(source)
            self.variables = tuple(sorted(meta.find_undeclared_variables(parsed)))
            self._template = sandbox.from_string(source)
            self._globals = {**self._template.globals, "strftime_now": self._strftime_now}
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(f"chat template: {error}; name another with template=") from error

    def render(self, meter: Meter, variables: Mapping[str, Any]) -> str:
        """As jinja2's Template.render, which looks through all globals one by one, twice each time."""
        self._sandbox.meter = meter
        context = self._sandbox.context_class(
            self._sandbox, {**self._globals, **variables}, None, self._template.blocks
        )
        return self._sandbox.concat(self._template.root_render_func(context))

    def _strftime_now(self, pattern: str) -> str:
        if any(character.isdigit() for character in pattern):
            raise SecurityError("wide fields in a date")
        return self.now.strftime(pattern)
