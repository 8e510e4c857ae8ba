"""Templates run on placeholders: what a template writes, as literals and places for what messages say.

A `Slotted` is a str without words of its own. It is made of items: text that the template wrote, and `Piece`s, each a
field of a message, perhaps stripped. Templates may put such strings together, strip them, and ask them questions
(whether they are empty, hold something, begin with something). Each question is answered from the words of a sample and
recorded as a `Guard`. Whatever else a template does with them ends the recording: `Unfollowed`.

So the items that come out are what the template writes for every conversation with the same roles and fields for which
the guards give the same answers: a template is a function, all that it learns of the words are those answers, and all
that it does to them is in the items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import Frame
from jinja2.runtime import Context

from deft.render.sandbox import Generator, Meter, Sandbox
from deft.render.template import Compiled, Template
from deft.types import Message

_MARK = "\U000f5ea1"
"""Stands for a slot where a string is looked at behind its back: text that holds it was not followed."""


class Unfollowed(Exception):
    """The template does something to what messages say that no slot can stand for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A field of messages[index], after these (method, characters) calls of str.strip, lstrip and rstrip."""

    index: int
    field: str
    strips: tuple[tuple[str, str | None], ...] = ()

    def text(self, messages: Sequence[Message]) -> str:
        """The words of a conversation that stand here.

        >>> Piece(0, "content", (("strip", None),)).text([Message("user", " Hi ")])
        'Hi'
        """
        text: str = getattr(messages[self.index], self.field)
        for method, characters in self.strips:
            text = getattr(text, method)(characters)
        return text


Item = str | Piece
Items = tuple[Item, ...]


def fill(items: Iterable[Item], messages: Sequence[Message]) -> str:
    """The text that items are for a conversation.

    >>> fill(("user: ", Piece(0, "content"), "!"), [Message("user", "Hi")])
    'user: Hi!'
    """
    return "".join([item if type(item) is str else item.text(messages) for item in items])  # type: ignore[union-attr]


_QUESTIONS: dict[str, Callable[[str, Any], bool]] = {
    "is_full": lambda text, _: bool(text),
    "contains": lambda text, part: part in text,
    "equals": lambda text, other: text == other,
    "startswith": str.startswith,
    "endswith": str.endswith,
}


@dataclass(frozen=True, slots=True)
class Guard:
    """A question about the words of a conversation, and its answer."""

    items: Items
    question: str
    argument: Any
    answer: bool

    def holds(self, messages: Sequence[Message]) -> bool:
        """True if this conversation gives the same answer."""
        return _QUESTIONS[self.question](fill(self.items, messages), self.argument) == self.answer


class Recorder:
    """Answers a template's questions from a sample, and keeps them."""

    def __init__(self, sample: Sequence[Message]) -> None:
        self._sample = sample
        self._answers: dict[tuple[Items, str, Any], bool] = {}

    def ask(self, items: Items, question: str, argument: Any = None) -> bool:
        key = (items, question, argument)
        if key not in self._answers:
            self._answers[key] = _QUESTIONS[question](fill(items, self._sample), argument)
        return self._answers[key]

    def guards(self) -> tuple[Guard, ...]:
        return tuple(Guard(*key, answer) for key, answer in self._answers.items())


class Named(str):
    """The words of a message's field, which know where they stand."""

    piece: Piece

    @classmethod
    def of(cls, text: str, index: int, field: str) -> Named:
        self = cls(text)
        self.piece = Piece(index, field)
        return self


def named(messages: Sequence[Message]) -> list[Message]:
    """The messages with fields that know where they stand; Unfollowed for tool calls."""
    return [_named(message, index) for index, message in enumerate(messages)]


def _named(message: Message, index: int) -> Message:
    if message.tool_calls:
        raise Unfollowed("tool calls")

    def of(field: str) -> Any:
        value = getattr(message, field)
        return Named.of(value, index, field) if value else value

    return Message(message.role, of("content"), None, of("reasoning"), (), of("name"), of("tool_call_id"))


def slots(recorder: Recorder) -> Callable[[str, int], str]:
    """What makes the strings that a template gets: slots for the fields of messages, all else as it is."""

    def text(value: str, owner: int) -> str:
        if isinstance(value, Named):
            return Slotted.of((value.piece,), recorder)
        if value and owner >= 0:
            raise Unfollowed("what a message says is taken apart before the template sees it")
        return value

    return text


class Slotted(str):
    """A string made of items."""

    __slots__ = ("_items", "_recorder")
    _items: Items
    _recorder: Recorder

    @classmethod
    def of(cls, items: Items, recorder: Recorder) -> Slotted:
        self = cls("".join(item if isinstance(item, str) else _MARK for item in items))
        self._items = items
        self._recorder = recorder
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return put_together((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return put_together((other, self)) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        return any(isinstance(item, str) for item in self._items) or self._ask("is_full")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Slotted):
            return self._items == other._items or _unfollowed()
        return isinstance(other, str) and self._ask("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, part: object) -> bool:
        if not isinstance(part, str):
            raise TypeError("'in <string>' requires string as left operand")
        return self._ask("contains", part)

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, str):
            raise TypeError("string indices must be integers")
        return _unfollowed()

    def startswith(self, prefix: Any, *where: Any) -> bool:
        return _unfollowed() if where else self._ask("startswith", prefix)

    def endswith(self, suffix: Any, *where: Any) -> bool:
        return _unfollowed() if where else self._ask("endswith", suffix)

    def find(self, part: str, *where: Any) -> int:
        return -1 if self._lacks(part) else _unfollowed()

    def count(self, part: str, *where: Any) -> int:
        return 0 if self._lacks(part) else _unfollowed()

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return [self] if sep and self._lacks(sep) else _unfollowed()

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return [self] if sep and self._lacks(sep) else _unfollowed()

    def partition(self, sep: str) -> tuple[str, str, str]:
        return (self, "", "") if sep and self._lacks(sep) else _unfollowed()

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return ("", "", self) if sep and self._lacks(sep) else _unfollowed()

    def replace(self, old: str, new: str, count: Any = -1) -> str:
        return self if old and self._lacks(old) else _unfollowed()

    def removeprefix(self, prefix: str) -> str:
        return _unfollowed() if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        return _unfollowed() if self.endswith(suffix) else self

    def strip(self, chars: str | None = None) -> str:
        if len(self._items) == 1 and isinstance(self._items[0], Piece):
            return Slotted.of((_stripped(self._items[0], "strip", chars),), self._recorder)
        left = self.lstrip(chars)
        return left.rstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> str:
        return self._stripped("rstrip", chars)

    def _stripped(self, method: str, chars: str | None) -> str:
        """Takes characters from the one end, item by item, until one is left that is not empty."""
        if isinstance(chars, Slotted):
            _unfollowed()
        end = 0 if method == "lstrip" else -1
        items = list(self._items)
        while items:
            item = items[end]
            items[end] = item = (
                getattr(str, method)(item, chars) if isinstance(item, str) else _stripped(item, method, chars)
            )
            if len(items) == 1 and isinstance(item, Piece):
                break
            if item if isinstance(item, str) else self._recorder.ask((item,), "is_full"):
                break
            del items[end]
        return Slotted.of(tuple(items), self._recorder) if items else ""

    def _lacks(self, part: str) -> bool:
        return not self._ask("contains", part)

    def _ask(self, question: str, argument: Any = None) -> bool:
        parts = argument if isinstance(argument, tuple) else (argument,)
        if any(isinstance(part, Slotted) for part in parts):
            _unfollowed()
        return self._recorder.ask(self._items, question, argument)


def _unfollowed(*_: Any, **__: Any) -> NoReturn:
    raise Unfollowed("the words of a message decide")


_FOLLOWED = {"__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__doc__"}
_FOLLOWED |= {"__init_subclass__", "__subclasshook__", "__sizeof__", "__dir__"}
for _name in set(dir(str)) - set(vars(Slotted)) - _FOLLOWED:
    setattr(Slotted, _name, _unfollowed)
Slotted.__hash__ = _unfollowed  # type: ignore[method-assign]


def _stripped(piece: Piece, method: str, chars: str | None) -> Piece:
    last = piece.strips[-1] if piece.strips else None
    if last in ((method, chars), ("strip", chars)):
        return piece
    return Piece(piece.index, piece.field, (*piece.strips, (method, chars)))


def items_of(text: str) -> Items:
    """The items of what a template wrote; Unfollowed where a slot was written behind its back."""
    items = text._items if isinstance(text, Slotted) else (text,) if text else ()
    if any(isinstance(item, str) and _MARK in item for item in items):
        raise Unfollowed("a message was copied")
    return items


def put_together(texts: Iterable[str]) -> str:
    """Texts, one after the other; literals that meet become one."""
    found: list[Item] = []
    recorder = None
    for text in texts:
        if isinstance(text, Slotted):
            recorder = text._recorder
        for item in text._items if isinstance(text, Slotted) else (text,):
            if isinstance(item, str) and found and isinstance(found[-1], str):
                found[-1] = str.__add__(found[-1], item)
            elif not isinstance(item, str) or str.__len__(item):
                found.append(item)
    if recorder is None:
        return "".join(found)  # type: ignore[arg-type]
    return Slotted.of(tuple(found), recorder)


_ON_TEXT = {"trim", "string", "default", "d", "replace"}
"""Filters that do to a slot no more than its own methods let them."""

_ON_VALUES = {"length", "count", "list", "first", "last", "reverse", "map", "select", "reject", "selectattr"}
_ON_VALUES |= {"rejectattr", "items", "default", "d", "attr", "batch", "slice", "join"}
"""Filters that hand on what lists and objects hold, and ask it nothing but through its methods and through tests."""

_OF_TYPES = {"defined", "undefined", "none", "string", "mapping", "number", "boolean", "integer", "float", "true"}
_OF_TYPES |= {"false", "callable", "sequence", "iterable", "sameas"}
"""Tests that look at the type of text alone."""


def _holds_slot(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_slot, value.values())) or any(map(_holds_slot, value))
    if isinstance(value, list | tuple):
        return any(map(_holds_slot, value))
    return isinstance(value, Slotted)


class _Following(Generator):
    """Code in which `in` asks the environment: str.__contains__ looks into its left operand behind its back."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802  jinja2's names
        operators = [operand.op for operand in node.ops]
        if "in" not in operators and "notin" not in operators:
            super().visit_Compare(node, frame)
            return
        if len(operators) > 1:
            raise Unfollowed("a chain of comparisons")
        self.write("(not " if operators == ["notin"] else "(")
        self.write("environment.is_in(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write("))")


class _Steps(Meter):
    """Counts steps and time; slots have no size."""

    __slots__ = ()

    def spend(self, size: int) -> None:
        pass

    def built(self, value: Any) -> None:
        pass

    def weight(self, value: Any) -> int:
        return 0


class SlotSandbox(Sandbox):
    """Chat templates on slots. It lets them do what slots can follow; all else is Unfollowed."""

    code_generator_class = _Following

    def __init__(self) -> None:
        super().__init__()
        self.meter = _Steps()
        self.tests = {name: self._asked(name, test) for name, test in dict[str, Any](self.tests).items()}

    def concat(self, pieces: Iterable[Any]) -> str:
        return self._joined("", pieces)

    def is_in(self, value: Any, among: Any) -> bool:
        if isinstance(value, Slotted) and isinstance(among, str):
            _unfollowed()
        found: bool = value in among
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return put_together((left, right))
        if operator != "+" and (_holds_slot(left) or _holds_slot(right)):
            _unfollowed()
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if isinstance(__function, BuiltinMethodType | MethodType):
            owner = __function.__self__
            is_asked_behind = (
                isinstance(owner, str) and not isinstance(owner, Slotted) and __function.__name__ != "join"
            )
            if is_asked_behind and _holds_slot((args, kwargs)):
                _unfollowed()
        return super().call(__context, __function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(getattr(value, "__self__", None), Slotted) and value.__name__ in ("format", "format_map"):
            _unfollowed()
        return super().wrap_str_format(value)

    def _joined(self, separator: str, pieces: Iterable[Any]) -> str:
        if isinstance(separator, Slotted):
            _unfollowed()
        texts: list[str] = []
        for piece in pieces:
            if texts and separator:
                texts.append(separator)
            texts.append(piece if isinstance(piece, str) else str(piece))
        return put_together(texts)

    def _replaced(self, text: str, old: str, new: str, count: int = -1) -> str:
        if isinstance(text, Slotted):
            return text.replace(old, new, count)
        return _unfollowed() if _holds_slot((old, new)) else super()._replaced(text, old, new, count)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def followed(*args: Any, **kwargs: Any) -> Any:
            value, *more = args[skipped:] or (None,)
            is_default = name in ("default", "d")
            if _holds_slot((more, kwargs)) and not is_default:
                _unfollowed()
            if _holds_slot(value) and name not in (_ON_TEXT if isinstance(value, Slotted) else _ON_VALUES):
                _unfollowed()
            return function(*args, **kwargs)

        return followed

    def _asked(self, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
        """A test of slots: of their type alone, of equality, of what they hold."""
        skipped = 1 if hasattr(test, "jinja_pass_arg") else 0

        @wraps(test)
        def asked(*args: Any, **kwargs: Any) -> Any:
            if not _holds_slot((args[skipped:], kwargs)):
                return test(*args, **kwargs)
            value, *more = args[skipped:]
            if name in _OF_TYPES:
                return test(*args[:skipped], "text" if isinstance(value, Slotted) and not more else value, *more)
            if name == "in":
                return self.is_in(value, *more)
            if name in ("eq", "equalto", "==", "ne", "!="):
                return test(*args, **kwargs)
            return _unfollowed()

        return asked


def run(
    compiled: Compiled, template: Template, messages: Sequence[Message], recorder: Recorder, add_generation_prompt: bool
) -> Items:
    """What a template, compiled in a `SlotSandbox`, writes for messages; Unfollowed and Refusal where it does not."""
    handed = template.hand(named(messages))
    now = {"add_generation_prompt": add_generation_prompt}
    return items_of(template.run(compiled, _Steps(*handed.limits), {**handed.variables(slots(recorder)), **now}))
