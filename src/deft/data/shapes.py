"""Rows -> the one format that reads them all, found by looking at the rows; the folder `formats` is the registry.

A format is a module with `KEYS`, the sets of fields that make a row its own, and `convert`, from a row to its
conversations. It may have `left_out`, for rows that others make needless, and `OPTIONS`, the choices of a source that
it knows. A user's own format is a function named `pkg.mod:fn`: from a row to a row in a shape deft reads, or None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from itertools import groupby
from typing import Any

from deft import registry
from deft.data.choices import Choices
from deft.data.fields import LeftOut, RowError, described, kind_of, shortened, weight_of
from deft.errors import InputError, Problem, Problems
from deft.types import Conversation, Origin, Row

Convert = Callable[[Row, Choices], Sequence[Conversation]]
LeftOutHook = Callable[[Sequence[Row], Choices], Mapping[int, str]]

NAMED = 1000
"""So many rows of each wrong shape are kept for the error that names them."""


@dataclass(frozen=True, slots=True)
class Format:
    """One module of the folder `formats`.

    keys      fields that make a row this format's, any of these sets; strings and lists have names in angle brackets
    left_out  sees all sound rows of a source: which are not learnt because of others, and why
    options   the choices of a source that have a meaning here
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Convert
    left_out: LeftOutHook | None = None
    options: frozenset[str] = frozenset()

    def claim(self, keys: frozenset[str]) -> frozenset[str]:
        """The fields of a row that this format reads it by; none where it does not."""
        return frozenset().union(*(known for known in self.keys if known <= keys))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row, the `index`th of its source, became: conversations, or the reason why it is refused or left out."""

    index: int
    origin: Origin
    conversations: tuple[Conversation, ...] = ()
    refused: Problem | None = None
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Understood:
    """A source, read: its shape, its conversations in order, and what was refused and left out.

    The conversations of one row stand side by side and share its origin.
    """

    shape: str
    conversations: tuple[Conversation, ...]
    refused: tuple[Problem, ...]
    left_out: tuple[tuple[Origin, str], ...] = ()

    def rows(self) -> Iterator[tuple[Conversation, ...]]:
        """The conversations of each row."""
        return rows(self.conversations)


def rows(conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, ...]]:
    """Conversations side by side that share an origin, together."""
    return (tuple(row) for _, row in groupby(conversations, key=lambda conversation: conversation.origin))


def names() -> list[str]:
    """The formats there are.

    >>> "messages" in names()
    True
    """
    return registry.names("data.formats")


@cache
def load(name: str) -> Format:
    """The format; InputError lists what there is for an unknown name, or says why a user's own is not found."""
    if ":" in name:
        return _own(name)
    module = registry.load("data.formats", name, "data.format")
    keys = tuple(frozenset(known) for known in module.KEYS)
    hook = module.left_out if hasattr(module, "left_out") else None
    options = frozenset(module.OPTIONS) if hasattr(module, "OPTIONS") else frozenset()
    return Format(name, keys, module.convert, hook, options)


def understand(
    rows: Iterable[Row | Problem], source: str, shape: str = "auto", choices: Choices | None = None
) -> Understood:
    """Every row in the one shape of its source, or refused with its reason.

    Raises Problems where rows have two shapes at once, where the file mixes shapes, or where no row has any.

    >>> from deft.data.sources import from_values
    >>> understand(from_values([{"question": "a", "answer": "b"}]), "rows").shape
    'question_answer'
    """
    reader = Reader(source, shape, choices or Choices())
    outcomes = sorted(reader.read(rows), key=lambda outcome: outcome.index)
    return Understood(
        reader.shape,
        tuple(conversation for outcome in outcomes for conversation in outcome.conversations),
        tuple(outcome.refused for outcome in outcomes if outcome.refused),
        tuple((outcome.origin, outcome.left_out) for outcome in outcomes if outcome.left_out),
    )


class Reader:
    """Reads one source, row by row; memory holds no row longer than its outcome, but for formats that compare rows.

    Rows without a shape wait for the end, when the shape of the others is known.
    """

    def __init__(self, source: str, shape: str, choices: Choices) -> None:
        self.source = source
        self.choices = choices
        self._given = None if shape == "auto" else load(shape)
        self._columns = _Columns(choices.columns)
        self._waiting: list[tuple[int, Row]] = []
        self._compared: list[tuple[Row, Outcome]] = []
        self._ambiguous: list[Problem] = []
        self._counts: Counter[str] = Counter()
        self._seen: dict[str, list[Origin]] = {}
        self._unread: list[Problem] = []
        self._readable = 0

    @property
    def shape(self) -> str:
        """The shape that was given, or that the rows read so far have."""
        return self._given.name if self._given else next(iter(self._counts), "auto")

    def read(self, rows: Iterable[Row | Problem]) -> Iterator[Outcome]:
        """The outcome of every row, not in their order. Raises Problems at the end where there is no one shape."""
        for index, row in enumerate(rows):
            if isinstance(row, Problem):
                self._unread.append(row)
                yield Outcome(index, Origin(row.where, 0), refused=row)
            elif outcome := self._row(index, row):
                yield outcome
        form = self._one_shape()
        for index, row in self._waiting:
            if outcome := self._converted(index, row, form):
                yield outcome
        yield from self._without_left_out(form)

    def _row(self, index: int, row: Row) -> Outcome | None:
        """The outcome of a row, None where it must wait for others."""
        self._readable += 1
        try:
            row = self._columns.applied(row)
        except RowError as error:
            self._unread.append(_problem(row, error))
            return Outcome(index, row.origin, refused=self._unread[-1])
        form = self._given or self._found(row)
        if form is None:
            self._waiting.append((index, row))
            return None
        return self._converted(index, row, form)

    def _found(self, row: Row) -> Format | None:
        formats = _formats(_keys(row.value))
        if len(formats) > 1:
            what = f"reads as {' and as '.join(form.name for form in formats)}"
            self._ambiguous.append(Problem(str(row.origin), what, "keep one of them, or say data.format"))
        if len(formats) != 1:
            return None
        name = formats[0].name
        self._counts[name] += 1
        origins = self._seen.setdefault(name, [])
        if len(origins) < NAMED:
            origins.append(row.origin)
        return formats[0]

    def _converted(self, index: int, row: Row, form: Format) -> Outcome | None:
        try:
            found = _convert(row, form, self.choices)
        except RowError as error:
            return Outcome(index, row.origin, refused=_problem(row, self._columns.renamed(error)))
        except LeftOut as reason:
            return Outcome(index, row.origin, left_out=str(reason))
        outcome = Outcome(index, row.origin, found)
        if form.left_out:
            self._compared.append((row, outcome))
            return None
        return outcome

    def _without_left_out(self, form: Format) -> Iterator[Outcome]:
        if form.left_out:
            reasons = form.left_out([row for row, _ in self._compared], self.choices)
            for position, (_, outcome) in enumerate(self._compared):
                reason = reasons.get(position, "")
                yield replace(outcome, conversations=(), left_out=reason) if reason else outcome

    def _one_shape(self) -> Format:
        if self._ambiguous:
            raise Problems(f"{self.source}: rows with two meanings", self._ambiguous)
        if len(self._counts) > 1:
            raise Problems(f"{self.source}: rows of several shapes in one file; split it", self._mixed())
        if not self._readable or not (self._given or self._counts):
            raise self._no_shape()
        form = self._given or load(self.shape)
        for option in sorted(self.choices.options() - form.options):
            knowing = ", ".join(name for name in names() if option in load(name).options)
            what = f"{option} has no meaning for rows of shape {form.name}"
            raise Problems(f"{self.source}: {what}", [Problem(self.source, what, f"only for {knowing}")])
        return form

    def _mixed(self) -> list[Problem]:
        common = self._counts.most_common(1)[0][0]
        others = [(origin, name) for name, origins in self._seen.items() if name != common for origin in origins]
        return [Problem(str(origin), f"is {name}, most rows are {common}", "split the file") for origin, name in others]

    def _no_shape(self) -> Problems:
        if not self._waiting:
            return Problems(f"{self.source}: no row can be read", self._unread)
        fix = "map the columns, as in columns: {prompt: question, completion: answer}, or name a format"
        problems = [Problem(str(row.origin), f"has {described(row.value)}", fix) for _, row in self._waiting[:3]]
        return Problems(f"{self.source}: no row has a shape that deft knows ({', '.join(names())})", problems)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The `columns` mapping: what a format calls a field -> what the rows call it."""

    names: Mapping[str, str]

    def applied(self, row: Row) -> Row:
        """The row under the format's names, and nothing else of it; RowError where it has none of them."""
        if not self.names:
            return row
        if not isinstance(row.value, dict):
            raise RowError("", f"is {kind_of(row.value)}; columns are mapped in objects only", "mend the row")
        found = {name: row.value[own] for name, own in self.names.items() if own in row.value}
        if not found:
            known = " or ".join(repr(own) for own in self.names.values())
            raise RowError("", f"has {described(row.value)}, not {known}", "mend data.columns or the row")
        return replace(row, value=found)

    def renamed(self, error: RowError) -> RowError:
        """The error with the field as the rows call it."""
        for name, own in self.names.items():
            if error.field == name or error.field.startswith((f"{name}.", f"{name}[")):
                return RowError(own + error.field[len(name) :], error.bare, error.fix)
        return error


def _convert(row: Row, form: Format, choices: Choices) -> tuple[Conversation, ...]:
    if not _is_near(form, _keys(row.value)):
        raise RowError("", f"has {described(row.value)}, not {form.name}", "mend or remove the row")
    found = tuple(form.convert(row, choices))
    if not isinstance(row.value, dict) or row.value.get("loss_weight") is None:
        return found
    weight = weight_of(row.value["loss_weight"], "loss_weight") or 0.0
    return tuple(replace(each, weight=weight) for each in found)


def _problem(row: Row, error: RowError) -> Problem:
    return Problem(str(row.origin), error.what, error.fix)


def _keys(value: Any) -> frozenset[str]:
    """The fields of a row by which its format is found; strings and lists have names of their own.

    >>> sorted(_keys({"a": 1, "b": 2})), sorted(_keys(["p", "o"]))
    (['a', 'b'], ['<list of text>'])
    """
    if isinstance(value, dict):
        return frozenset(value)
    if isinstance(value, str):
        return _TEXT_KEYS
    if isinstance(value, list | tuple):
        return _LIST_KEYS.get(type(value[0]), _OTHER_LIST) if value else _OTHER_LIST
    return frozenset()


_TEXT_KEYS = frozenset({"<text>"})
_LIST_KEYS: dict[type, frozenset[str]] = {
    str: frozenset({"<list of text>"}),
    dict: frozenset({"<list of objects>"}),
}
_OTHER_LIST = frozenset({"<list>"})
_LISTS = _OTHER_LIST.union(*_LIST_KEYS.values())


@lru_cache(maxsize=10_000)
def _is_near(form: Format, keys: frozenset[str]) -> bool:
    """Whether an error of the format would help: the row has a field of it, or is a list as its rows are."""
    known: frozenset[str] = frozenset().union(*form.keys)
    return not known or bool(known & keys) or bool(known & _LISTS and keys & _LISTS)


@lru_cache(maxsize=10_000)
def _formats(keys: frozenset[str]) -> tuple[Format, ...]:
    """The formats that read rows with these fields. Of two, the one that reads more of them wins.

    >>> [form.name for form in _formats(frozenset({"instruction", "input", "output"}))]
    ['alpaca']
    >>> [form.name for form in _formats(frozenset({"messages", "text"}))]
    ['messages', 'text']
    """
    claims = {form: claim for form in map(load, names()) if (claim := form.claim(keys))}
    return tuple(form for form, claim in claims.items() if not any(claim < other for other in claims.values()))


def _own(name: str) -> Format:
    """A user's function as a format."""
    module, _, function = name.partition(":")
    try:
        found = import_module(module)
    except ImportError as error:
        raise InputError(f"data.format: {name!r} cannot be imported ({error}); is it on PYTHONPATH?") from error
    convert = getattr(found, function, None)
    if not callable(convert):
        raise InputError(f"data.format: {module} has no function {function!r}; name it as pkg.mod:fn")
    return Format(name, (), lambda row, choices: _by_user(row, choices, convert, name))


def _by_user(row: Row, choices: Choices, function: Callable[[Any], Any], name: str) -> Sequence[Conversation]:
    try:
        value = function(row.value)
    except Exception as error:  # the user's own code: whatever it raises refuses the row, by name
        raise RowError("", f"{name} raised {type(error).__name__}: {shortened(str(error), 200)}", "mend it") from error
    if value is None:
        raise LeftOut(f"{name} gave None")
    formats = _formats(_keys(value))
    if len(formats) != 1:
        readings = " and as ".join(form.name for form in formats) or "no shape that deft knows"
        raise RowError("", f"{name} gave {described(value)}, which reads as {readings}", "mend it")
    return formats[0].convert(replace(row, value=value), choices)
