"""A chat template, compiled once in the sandbox that transformers uses; characters remember their message.

The text is the one `tokenizer.apply_chat_template(..., tokenize=False)` gives (a test of law 1); the code differs only
in that joins keep the owners of `provenance.Traced`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deft.errors import InputError
from deft.render.provenance import TEMPLATE, Traced, join
from deft.types import Message

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


class Refusal(Exception):
    """A conversation whose mask cannot be proven, with the reason."""


@dataclass(frozen=True)
class Template:
    """A compiled chat template and the special tokens it may name.

    `tokens` holds bos_token, eos_token and the like, as transformers hands them to a template.

    >>> template = Template(plain(puts_bos=True), {"bos_token": "<s>", "eos_token": "</s>"})
    >>> template.render([Message("user", "Hi"), Message("assistant", "Hello")])
    '<s>user: Hi\\nassistant: Hello</s>\\n'
    """

    source: str
    tokens: Mapping[str, str]
    _compiled: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", _ENVIRONMENT.from_string(self.source))
        except TemplateError as error:
            raise InputError(f"chat template: {error}; name another with template=") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Traced:
        """The text of `messages`, each character owned by the index of its message or by the template.

        Raises Refusal with the template's own words where it refuses the conversation.
        """
        chat = [{"role": m.role, "content": Traced.of(m.content, index)} for index, m in enumerate(messages)]
        try:
            text = self._compiled.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Refusal(f"the chat template refuses this conversation: {error}") from error
        return text if isinstance(text, Traced) else Traced.of(text, TEMPLATE)


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  jinja2's name
        self.write("environment.concat((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    concat = staticmethod(lambda pieces: join("", pieces))

    def call(self, context: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        separator = getattr(function, "__self__", None)
        if isinstance(separator, str) and getattr(function, "__name__", "") == "join":
            return join(separator, args[0])
        return super().call(context, function, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; its text is rendered as if the tags were not there."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _join(values: Sequence[Any], d: str = "", attribute: str | None = None) -> Traced:
    return join(d, values if attribute is None else [value[attribute] for value in values])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Traced:
    """JSON as transformers writes it; a string alone keeps its owner, anything else is the template's."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    owners = {owner for owner, _ in value.runs} if isinstance(value, Traced) else set()
    return Traced.of(text, owners.pop() if len(owners) == 1 else TEMPLATE)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters.update(tojson=_tojson, join=_join)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _environment()
