"""Which chat template a run uses, and the texts that it makes of conversations; it is compiled once in the sandbox.

The text is the one `tokenizer.apply_chat_template(..., tokenize=False)` gives (a test of law 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError

from deft.core.errors import InputError
from deft.core.types import Message
from deft.encoding.render import role_order
from deft.encoding.render.sandbox import SIZE, STEPS, Exhausted, Meter, Sandbox, TracingSandbox
from deft.encoding.render.template_inputs import (
    DEFAULT,
    KNOWN_MARKS,
    ReasoningMarks,
    TemplateInputs,
    TemplateOptions,
)
from deft.encoding.render.traced import TEMPLATE, Traced

MISHAPS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own code raises on a conversation that it cannot render."""

NOW = datetime(2025, 1, 1, 12)
"""What every template is told of the time: the same rows are the same tokens on any day, also where a run goes on."""

_TEMPLATES = 256
"""Templates whose code is remembered."""

_PATIENCE = 3
"""Renders that may go over their limits before the template is not used at all."""

_SWITCH = re.compile(r"(enable_|use_)?(thinking|reasoning|think)|add_thoughts")
"""Template variables that say whether the answer begins with reasoning."""

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


@dataclass(frozen=True, slots=True)
class Chosen:
    """A template's source text; `where` says in words where it came from; `is_own` is true for the model's own."""

    source: str
    where: str
    is_own: bool


def choose(
    setting: str,
    own: str | None,
    puts_bos: bool,
    special: Collection[str] = (),
    named: Mapping[str, str] = MappingProxyType({}),
) -> Chosen:
    """`auto`: the model's own template, deft's plain one where it has none. Else chatml, the name of one of the model's
    templates, a .jinja file or a folder.

    special   the tokenizer's special tokens: chatml's marks are text where they are not among them
    named     the model's templates, where it has several

    Raises InputError where there is no such template, or none of several is the default.

    >>> choose("auto", None, puts_bos=False).where
    "deft's plain template (role: content), as the model has none"
    """
    lost = f"; final/ has this one alone, not the model's {', '.join(sorted(named))}" if named else ""
    if setting == "chatml":
        return Chosen(chatml(puts_bos, CHATML_END in special), f"deft's chatml{lost}", False)
    if setting in named:
        return Chosen(named[setting], f"the model's chat template {setting}{lost}", False)
    if setting != "auto":
        return Chosen(_read(setting), f"{setting}{lost}", False)
    if own is not None:
        return Chosen(own, "the model's own chat template", True)
    if named:
        names = ", ".join(sorted(named))
        raise InputError(f"template: the model has {names} and no default; name one: template={min(named)}")
    return Chosen(plain(puts_bos), "deft's plain template (role: content), as the model has none", False)


def _read(setting: str) -> str:
    path = Path(setting)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if path.joinpath("chat_template.jinja").is_file():
            return path.joinpath("chat_template.jinja").read_text(encoding="utf-8")
        if path.joinpath("tokenizer_config.json").is_file():
            found = json.loads(path.joinpath("tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    except (OSError, ValueError) as error:
        raise InputError(f"template: {setting}: {error}") from error
    known = "name a .jinja file or a model folder, or say auto or chatml"
    raise InputError(f"template: {setting}: no chat template there; {known}")


class Refusal(Exception):
    """A conversation whose mask cannot be proven, with the reason."""


@dataclass(frozen=True)
class Template:
    """A compiled chat template and the special tokens it may name.

    tokens   bos_token, eos_token and the like, as transformers hands them to a template
    kwargs   the user's own variables for every render (`template_kwargs`)

    >>> template = Template(plain(puts_bos=True), {"bos_token": "<s>", "eos_token": "</s>"})
    >>> template.render([Message("user", "Hi"), Message("assistant", "Hello")])
    '<s>user: Hi\\nassistant: Hello</s>\\n'
    """

    source: str
    tokens: Mapping[str, str]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    _plain: Compiled = field(init=False, repr=False, compare=False)
    _tracing: Compiled = field(init=False, repr=False, compare=False)
    _shown: dict[tuple[str, ...], bool] = field(default_factory=dict, init=False, repr=False, compare=False)
    _over: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plain", Compiled(self.source, Sandbox()))
        object.__setattr__(self, "_tracing", Compiled(self.source, TracingSandbox()))

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables that it reads."""
        return self._plain.variables

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Its variables that say whether the answer begins with reasoning, unless the user sets them."""
        return tuple(name for name in self._plain.variables if _SWITCH.fullmatch(name) and name not in self.kwargs)

    @cached_property
    def constants(self) -> frozenset[str]:
        """The texts in its code, which it may compare words with or write in their place."""
        return self._plain.constants

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
    def marks(self) -> tuple[ReasoningMarks, ...]:
        """The known marks of reasoning that it writes or looks for."""
        return tuple(pair for pair in KNOWN_MARKS if any(mark.strip() in self.source for mark in pair))

    def shows(self, roles: Sequence[str]) -> bool:
        """Whether it can render messages with these roles, a word each.

        >>> (
        ...     Template("{{ messages[0].content }}", {}).shows(["user"]),
        ...     Template("{{ nothing.at.all }}", {}).shows(["user"]),
        ... )
        (True, False)
        """
        key = tuple(map(str, roles))
        if key not in self._shown:
            messages = [{"role": role, "content": "a"} for role in key]
            try:
                self._plain.render(Meter(), {"tools": None, **self.tokens, **self.kwargs, "messages": messages})
            except MISHAPS:
                self._shown[key] = False
            else:
                self._shown[key] = True
        return self._shown[key]

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> Template:
        """The same template, not compiled again, with the variables of a row before those of the run."""
        found = object.__new__(Template)
        for each in fields(self):
            object.__setattr__(found, each.name, getattr(self, each.name))
        object.__setattr__(found, "kwargs", {**self.kwargs, **kwargs})
        return found

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        options: TemplateOptions = DEFAULT,
    ) -> Traced:
        """The text of `messages`, each character owned by a part of its message, by the tools or by the template.

        Raises Refusal with the template's own words where it refuses the conversation, and InputError where it goes
        over its limits of time and size again and again.
        """
        return Rendering(self, messages, tools, options).traced(len(messages), add_generation_prompt)


@dataclass(frozen=True)
class Rendering:
    """What one template writes for the beginnings of one conversation; what the template gets is made once."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    options: TemplateOptions = DEFAULT
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _traced_texts: dict[tuple[int, bool], Traced] = field(default_factory=dict, init=False, repr=False, compare=False)

    def plain(self, end: int, add_generation_prompt: bool = False) -> str:
        """The text of the first `end` messages, as plain strings give it."""
        key = end, add_generation_prompt
        if key not in self._texts:
            messages = self._plain_inputs["messages"][:end]
            self._texts[key] = self._run(self.template._plain, self._plain_inputs, messages, add_generation_prompt)
        return self._texts[key]

    def like(self, messages: Sequence[Message]) -> str:
        """The text of other messages with the same tools and options, as plain strings give it."""
        given = TemplateInputs(self.options).messages(messages)
        return self._run(self.template._plain, self._plain_inputs, given, False)

    def traced(self, end: int, add_generation_prompt: bool = False) -> Traced:
        """The same text as `plain` with the owners of its characters; Refusal where tracing would change it."""
        key = end, add_generation_prompt
        if key not in self._traced_texts:
            messages = self._traced_inputs["messages"][:end]
            found = self._run(self.template._tracing, self._traced_inputs, messages, add_generation_prompt)
            if not str.__eq__(found, self.plain(end, add_generation_prompt)):
                raise Refusal("the template changes what messages say in a way that cannot be followed")
            self._traced_texts[key] = found if isinstance(found, Traced) else Traced.of(found, TEMPLATE)
        return self._traced_texts[key]

    def _run(
        self, compiled: Compiled, variables: Mapping[str, Any], messages: Sequence[Any], add_generation_prompt: bool
    ) -> str:
        now = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return compiled.render(Meter(*self._limits), now)
        except Exhausted as error:
            self.template._over.append(str(error))
            if len(self.template._over) >= _PATIENCE:
                raise InputError(f"chat template: {error}; name another with template=") from error
            raise Refusal(f"the chat template goes over its limits: {error}") from error
        except MISHAPS as error:
            what = role_order.why(error, [message["role"] for message in messages], self.template.shows)
            raise Refusal(f"the chat template refuses this conversation: {what}") from error

    @cached_property
    def _plain_inputs(self) -> dict[str, Any]:
        return self._variables(TemplateInputs(self.options))

    @cached_property
    def _traced_inputs(self) -> dict[str, Any]:
        return self._variables(TemplateInputs(self.options, is_traced=True))

    def _variables(self, inputs: TemplateInputs) -> dict[str, Any]:
        return {
            **dict.fromkeys(self.options.blank, ""),
            **self.template.tokens,
            **self.template.kwargs,
            **dict(self.options.switches),
            "messages": inputs.messages(self.messages),
            "tools": inputs.tools(self.tools),
            "documents": None,
        }

    @cached_property
    def _limits(self) -> tuple[int, int]:
        """Steps and size, which grow with the conversation."""
        length = sum(len(m.content) + len(m.reasoning) for m in self.messages)
        length += sum(len(str(m.tool_calls)) for m in self.messages if m.tool_calls)
        length += len(str(self.tools)) if self.tools else 0
        return STEPS + length + 64 * len(self.messages) ** 2, SIZE + 256 * length


@lru_cache(_TEMPLATES)
def _compiled(source: str, is_tracing: bool) -> tuple[CodeType, tuple[str, ...], frozenset[str]]:
    """The code of a template, whose constants a sandbox of its kind has computed, its variables, and its texts."""
    sandbox = TracingSandbox() if is_tracing else Sandbox()
    try:
        parsed = sandbox.parse(source)
        variables = tuple(sorted(meta.find_undeclared_variables(parsed)))
        texts = frozenset(node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str))
        return sandbox.compile(parsed), variables, texts
    except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"chat template: {error}; name another with template=") from error


class Compiled:
    """One template in one sandbox."""

    def __init__(self, source: str, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        code, self.variables, self.constants = _compiled(source, isinstance(sandbox, TracingSandbox))
        self._template = sandbox.template_class.from_code(sandbox, code, sandbox.make_globals(None))
        self._globals = {**self._template.globals, "strftime_now": _strftime_now}

    def render(self, meter: Meter, variables: Mapping[str, Any]) -> str:
        """As jinja2's Template.render, which looks through all globals one by one, twice each time."""
        self._sandbox.meter = meter
        context = self._sandbox.context_class(
            self._sandbox, {**self._globals, **variables}, None, self._template.blocks
        )
        return self._sandbox.concat(self._template.root_render_func(context))


def _strftime_now(pattern: str) -> str:
    if any(character.isdigit() for character in pattern):
        raise SecurityError("wide fields in a date")
    return NOW.strftime(pattern)
