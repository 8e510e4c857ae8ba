"""The sandbox that chat templates run in: what transformers gives them, within limits of time and size.

A template comes from whoever made the model. It can reach no file and no internals (jinja2's immutable sandbox), and it
runs in this process, so everything that could make it slow or large is counted: turns of loops, calls, and the
characters and items of whatever it builds. `Sandbox` renders plain strings; `TracingSandbox` keeps the owners of
`traced.Traced`, and is otherwise the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce, wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

from deft.encoding.render import traced
from deft.encoding.render.traced import TEMPLATE, Traced

SECONDS = 5.0
"""Processor time of one render at most: what becomes of a row must not depend on how busy the machine is."""

STEPS = 200_000
SIZE = 4_000_000
"""Turns of loops and calls, and characters and items, that any render may use; long rows may use more."""

_WIDEST = 100_000
"""The largest width, count or precision that a filter or method may be given."""

_LONGEST_SOURCE = 1_000_000
_BITS = 65_536
_WIDE_FIELD = re.compile(r"\d{4,}|\*|\{[^{}]*\{")

_REMOVED = ("urlize", "wordwrap", "xmlattr", "pprint", "random", "striptags")
"""Filters that no chat template needs, with regular expressions or random numbers in them."""

_FREE_NUMBERS = {"default", "d", "int", "float", "sum"}
"""Filters whose numbers are values, not sizes."""

_DICT_ATTRIBUTES = frozenset(dir(dict))

_FORBIDDEN_METHODS = {"translate", "encode", "to_bytes"}


class Exhausted(SecurityError):
    """A render that went over its limits."""


class Meter:
    """What one render may still use."""

    __slots__ = ("_kept", "_weights", "deadline", "size", "steps")

    def __init__(self, steps: int = STEPS, size: int = SIZE, seconds: float = SECONDS) -> None:
        self.steps = steps
        self.size = size
        self.deadline = time.thread_time() + seconds
        self._weights: dict[int, int] = {}
        self._kept: list[Any] = []

    def tick(self) -> None:
        """One turn of a loop, or one call."""
        self.steps -= 1
        if self.steps & 15 == 0:
            self._check()

    def spend(self, size: int) -> None:
        """`size` characters or items are about to be built."""
        self.size -= size
        if self.size < 0:
            raise Exhausted("it builds too much text")

    def _check(self) -> None:
        if self.steps < 0:
            raise Exhausted("it takes too many steps")
        if time.thread_time() > self.deadline:
            raise Exhausted("it takes too long")

    def built(self, value: Any) -> None:
        """Counts what was built: a string's length, or all that a list or dict holds, however often it holds it."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.spend(self.weight(value))

    def weight(self, value: Any) -> int:
        """The length of text; of a list or dict, all values that a walk through it meets, as often as it meets them."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 1
        if id(value) not in self._weights:
            items = value.values() if isinstance(value, dict) else value
            self._weights[id(value)] = 4 + sum(map(self.weight, items))
            self._kept.append(value)
        return self._weights[id(value)]


class Generator(CodeGenerator):
    """Code that asks the environment where pieces are put together."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  jinja2's names
        self.write("environment.tilde((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802
        """A chain of additions is one call: most of what a template does is putting strings together."""
        operands: list[nodes.Expr] = [node.right]
        while isinstance(node.left, nodes.Add):
            node = node.left
            operands.append(node.right)
        self.write("environment.add(context, (")
        for operand in (node.left, *reversed(operands)):
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Getitem, node, frame, isinstance(node.arg, nodes.Slice))

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Tuple, node, frame, node.ctx == "load")

    def _counted(
        self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame, builds: bool = True
    ) -> None:
        """What a node makes is counted where it builds a value."""
        self.write("environment.made(" if builds else "")
        visit(node, frame)
        self.write(")" if builds else "")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; its text is rendered as if the tags were not there."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """transformers' namespace: no names that begin with an underscore; and it cannot be printed."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        raise SecurityError("a namespace cannot be printed")


class _Dict:
    """transformers' `dict`: it makes dicts, and gives no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class Sandbox(ImmutableSandboxedEnvironment):
    """Chat templates on plain strings: the text is the one that transformers renders."""

    code_generator_class = Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    meter: Meter

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.meter = Meter()
        for name in _REMOVED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_Namespace)
        self.filters.update(self._own_filters())
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        return {"tojson": self._tojson, "join": self._join, "format": self._format, "replace": self._replace}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _LONGEST_SOURCE:
            raise TemplateError(f"it is longer than {_LONGEST_SOURCE} characters")
        parsed = super()._parse(source, name, filename)
        for loop in list(parsed.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn"), lineno=loop.lineno))
            loop.test = loop.test and nodes.And(nodes.EnvironmentAttribute("turn"), loop.test)
        return parsed

    @property
    def turn(self) -> bool:
        """True, once a turn of a loop is counted."""
        self.meter.tick()
        return True

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, a block or a macro has written: texts, by jinja2's own code."""
        return self._texts_joined("", list(pieces))

    def tilde(self, values: Iterable[Any]) -> str:
        return self._joined("", values)

    def add(self, context: Context, values: tuple[Any, ...]) -> Any:
        """The sum of the values, from left to right; what `safe` marks escapes the others, as in jinja2."""
        for value in values:
            if type(value) is not str and type(value) is not Traced:
                break
        else:
            return self._texts_joined("", values)
        return reduce(lambda left, right: self.call_binop(context, "+", left, right), values)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As jinja2's, without the exception that it raises and catches for each key of a dict."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def made(self, value: Any) -> Any:
        """`value`, counted."""
        self.meter.built(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._check_operation(operator, left, right)
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.meter.tick()
        if isinstance(__function, BuiltinMethodType | MethodType):
            owner, name = __function.__self__, __function.__name__
            __self._check_method(owner, name, args)
            text = owner if isinstance(owner, str) and not isinstance(owner, Markup) else None
            if text is not None and name == "join":
                return __self._joined(text, *args)
            if text is not None and name == "replace":
                return __self.made(__self._replaced(text, *args))
        return __self.made(super().call(__context, __function, *args, **kwargs))

    def _joined(self, separator: str, pieces: Iterable[Any]) -> str:
        return self._texts_joined(separator, [piece if isinstance(piece, str) else str(piece) for piece in pieces])

    def _texts_joined(self, separator: str, texts: Sequence[str]) -> str:
        self.meter.spend(sum(map(len, texts)) + len(separator) * len(texts))
        return self._put_together(separator, texts)

    def _put_together(self, separator: str, texts: Sequence[str]) -> str:
        return str.join(separator, texts)

    def _percent(self, pattern: str, values: Any) -> str:
        return self.made(pattern % values)

    def _replaced(self, text: str, old: str, new: str, count: int = -1) -> str:
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self.meter.spend(len(text) + times * len(new))
        return str.replace(text, old, new, count)

    def _dumped(self, value: Any, style: Mapping[str, Any]) -> str:
        return json.dumps(value, **style)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, with owners where there are any, and without wide fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern = value.__self__
        if _WIDE_FIELD.search(pattern):
            raise SecurityError("wide fields in a format")
        if value.__name__ != "format":
            return wrapped
        return lambda *args, **kwargs: self._braces(pattern, args, kwargs, wrapped(*args, **kwargs))

    def _braces(self, pattern: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], text: str) -> str:
        return text

    def _check_operation(self, operator: str, left: Any, right: Any) -> None:
        """Refuses what would build too much, before it is built."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise Exhausted("it computes numbers that are too large")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    self.meter.spend(self.meter.weight(value) * max(0, times))
        elif operator == "%" and isinstance(left, str) and _WIDE_FIELD.search(left):
            raise SecurityError("wide fields in a format")
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.meter.spend(len(left) + len(right))

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...]) -> None:
        if name in _FORBIDDEN_METHODS:
            raise SecurityError(f"a template has no {name}()")
        if isinstance(owner, str | bytes):
            _check_widths(args)
            if name == "expandtabs" and args:
                self.meter.spend(len(owner) * int(args[0]))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose widths are bounded and whose result is counted."""
        skipped = 2 if hasattr(function, "jinja_pass_arg") else 1

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if name not in _FREE_NUMBERS:
                _check_widths((*args[skipped:], *kwargs.values()))
            if name == "indent":
                _check_indent(self.meter, *args[skipped - 1 :], **kwargs)
            return self.made(function(*args, **kwargs))

        return guarded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        wide = indent > 16 if isinstance(indent, int) else len(indent or "") > 16
        if wide or any(len(separator) > 16 for separator in separators or ()):
            raise SecurityError("wide JSON")
        self.meter.built(value)
        style = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return self._dumped(value, style)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        chosen = values if attribute is None else [self.getitem(value, attribute) for value in values]
        return self._joined(str(d), chosen)

    def _format(self, pattern: Any, *args: Any, **kwargs: Any) -> str:
        if _WIDE_FIELD.search(str(pattern)):
            raise SecurityError("wide fields in a format")
        return self._percent(str(pattern), kwargs or args)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        return self._replaced(str(text), str(old), str(new), -1 if count is None else count)


class TracingSandbox(Sandbox):
    """The same on traced strings: whatever puts strings together keeps the owners of their characters."""

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        return {**super()._own_filters(), "safe": lambda value: value}

    def _put_together(self, separator: str, texts: Sequence[str]) -> str:
        return traced.join(separator, texts)

    def _percent(self, pattern: str, values: Any) -> str:
        return self.made(traced.percent(pattern, values))

    def _replaced(self, text: str, old: str, new: str, count: int = -1) -> str:
        super()._replaced(text, old, new, count)
        owned = text if isinstance(text, Traced) else Traced.of(text, TEMPLATE)
        return owned.replace(old, new, count)

    def _dumped(self, value: Any, style: Mapping[str, Any]) -> str:
        return traced.to_json(value, **style)

    def _braces(self, pattern: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], text: str) -> str:
        return traced.braces(pattern, args, kwargs, text)


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _WIDEST for value in values):
        raise SecurityError(f"a width over {_WIDEST}")


def _check_indent(meter: Meter, text: Any, width: int | str = 4, *_: Any, **__: Any) -> None:
    meter.spend(str(text).count("\n") * (len(width) if isinstance(width, str) else width))


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
