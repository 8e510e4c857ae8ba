"""Rows -> the one format that reads them all, found by looking at the rows; the folder `formats` is the registry.

A format is a module with `KEYS`, the sets of fields that make a row its own, and `convert`, from a row to its
conversations. It may have `left_out`, for rows that others make needless, with `compared`, what that has to know of a
row; and `OPTIONS`, the choices of a source that it knows. A user's own format is a function named `pkg.mod:fn`: from a
row to a row in a shape deft reads, or None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import import_module
from itertools import groupby
from typing import Any

from deft import registry
from deft.data import formats
from deft.data.choices import Choices
from deft.data.chunks import Chunk
from deft.data.fields import LeftOut, RowError, described, kind_of, shortened, weight_of
from deft.errors import InputError, Problem, Problems
from deft.types import Conversation, Origin, Row

Convert = Callable[[Row, Choices], Sequence[Conversation]]
LeftOutHook = Callable[[Sequence[Row], Choices], Mapping[int, str]]

ROOM = formats.__name__.partition(".")[2]
NAMED = 1000
"""So many rows of each wrong shape are kept for the error that names them."""


@dataclass(frozen=True, slots=True)
class Format:
    """One module of the folder `formats`.

    keys      fields that make a row this format's, any of these sets; strings and lists have names in angle brackets
    left_out  which sound rows of a source are not learnt because of others, and why
    compared  what `left_out` has to know of a row, as a row
    options   the choices of a source that have a meaning here
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Convert
    left_out: LeftOutHook | None = None
    compared: Callable[[Row], Row] | None = None
    options: frozenset[str] = frozenset()

    def claim(self, keys: frozenset[str]) -> frozenset[str]:
        """The fields of a row that this format reads it by; none where it does not."""
        return frozenset().union(*(known for known in self.keys if known <= keys))

    def reasons(self, rows: Sequence[Row], choices: Choices) -> Mapping[int, str]:
        """Which of `rows`, as `compared` made them, are left out, and why."""
        return self.left_out(rows, choices) if self.left_out else {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row, the `index`th of its source, became: conversations, or the reason why it is refused or left out.

    compared  what its format compares it with others by
    """

    index: int
    origin: Origin
    conversations: tuple[Conversation, ...] = ()
    refused: Problem | None = None
    left_out: str = ""
    compared: Row | None = None


@dataclass(frozen=True, slots=True)
class Understood:
    """A source, read whole: its shape, its conversations in order, and what was refused and left out.

    The conversations of one row stand side by side and share its origin.
    """

    shape: str
    conversations: tuple[Conversation, ...]
    refused: tuple[Problem, ...]
    left_out: tuple[tuple[Origin, str], ...] = ()

    def rows(self) -> Iterator[tuple[Conversation, ...]]:
        """The conversations of each row."""
        return (tuple(row) for _, row in groupby(self.conversations, key=lambda conversation: conversation.origin))


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a source found; it holds no row.

    first     the first conversation, None where no row can be read
    refused   the first of the rows that are refused, of `refused_rows`
    left_out  rows that others make needless, in order, and why
    content   a digest of each file by its name; none where nobody knows
    is_whole  false where only the beginning was read, which `rows` and all else is true of
    """

    shape: str
    rows: int
    first: Conversation | None
    refused: tuple[Problem, ...]
    refused_rows: int
    left_out: tuple[tuple[Origin, str], ...] = ()
    content: Mapping[str, str] = field(default_factory=dict)
    is_whole: bool = True


def names() -> list[str]:
    """The formats there are.

    >>> "messages" in names()
    True
    """
    return registry.names(ROOM)


@cache
def load(name: str) -> Format:
    """The format; InputError lists what there is for an unknown name, or says why a user's own is not found."""
    if ":" in name:
        return _own(name)
    module = registry.load(ROOM, name, "data.format")
    keys = tuple(frozenset(known) for known in module.KEYS)
    options = frozenset(module.OPTIONS) if hasattr(module, "OPTIONS") else frozenset()
    if hasattr(module, "left_out"):
        return Format(name, keys, module.convert, module.left_out, module.compared, options)
    return Format(name, keys, module.convert, options=options)


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
        reader.tally.shape,
        tuple(conversation for outcome in outcomes for conversation in outcome.conversations),
        tuple(outcome.refused for outcome in outcomes if outcome.refused),
        tuple((outcome.origin, outcome.left_out) for outcome in outcomes if outcome.left_out),
    )


def survey(tallies: Iterable[Tally], source: str, shape: str = "auto", choices: Choices | None = None) -> Survey:
    """What the tallies of a source's chunks say together. Raises Problems as `understand` does."""
    reader = Reader(source, shape, choices or Choices())
    for tally in tallies:
        reader.tally.add(tally)
    form = reader.one_shape()
    reader.late(form)
    return reader.tally.survey(form, reader.choices)


def counter(recipe: tuple[str, str, Choices]) -> Callable[[Chunk], Tally]:
    """What tallies chunks of a source: its name, shape and choices are the recipe."""
    return lambda chunk: Reader(*recipe).counted(chunk.read())


class Reader:
    """Reads rows of one source, one by one; it holds no row longer than its outcome, but for formats that compare rows.

    Rows without a shape wait for the end, when the shape of the others is known. What is true of all rows read is in
    `tally`, which can be added to that of other rows of the source.
    """

    def __init__(self, source: str, shape: str, choices: Choices) -> None:
        self.source = source
        self.choices = choices
        self.tally = Tally("auto" if shape == "auto" else load(shape).name)
        self._given = None if shape == "auto" else load(shape)
        self._columns = _Columns(choices.columns)

    def read(self, rows: Iterable[Row | Problem]) -> Iterator[Outcome]:
        """The outcome of every row, not in their order. Raises Problems at the end where there is no one shape."""
        compared = []
        for outcome in self.each(rows):
            if outcome.compared is None:
                yield outcome
            else:
                compared.append(outcome)
        form = self.one_shape()
        yield from self.late(form)
        reasons = form.reasons([outcome.compared for outcome in compared if outcome.compared], self.choices)
        for position, outcome in enumerate(compared):
            reason = reasons.get(position, "")
            yield replace(outcome, conversations=(), left_out=reason) if reason else outcome

    def each(self, rows: Iterable[Row | Problem]) -> Iterator[Outcome]:
        """The outcome of every row in their order, but for those that must wait."""
        for row in rows:
            outcome = self._outcome(self.tally.rows, row)
            if outcome:
                self.tally.note(outcome)
                yield outcome
            self.tally.rows += 1

    def late(self, form: Format) -> list[Outcome]:
        """The outcomes of the rows that waited, which have the shape of the others or are refused."""
        waiting, self.tally.waiting = self.tally.waiting, []
        found = [self._converted(index, row, form) for index, row in waiting]
        for outcome in found:
            self.tally.note(outcome)
        return found

    def counted(self, rows: Iterable[Row | Problem]) -> Tally:
        """What there is to say of rows; the rows themselves are gone."""
        for _ in self.each(rows):
            pass
        if len(self.tally.counts) == 1:
            self.late(load(self.tally.shape))
        return self.tally

    def one_shape(self) -> Format:
        """The format of all rows read. Raises Problems where there is none, or more than one."""
        form = self._given or self.tally.one_shape(self.source)
        if not self.tally.readable:
            raise self.tally.no_shape(self.source)
        for option in sorted(self.choices.options() - form.options):
            knowing = ", ".join(name for name in names() if option in load(name).options)
            what = f"{option} has no meaning for rows of shape {form.name}"
            raise Problems(f"{self.source}: {what}", [Problem(self.source, what, f"only for {knowing}")])
        return form

    def _outcome(self, index: int, row: Row | Problem) -> Outcome | None:
        """The outcome of a row, None where it must wait for others."""
        if isinstance(row, Problem):
            self.tally.cannot_be_read(row)
            return Outcome(index, Origin.at(row.where), refused=row)
        self.tally.readable += 1
        try:
            row = self._columns.applied(row)
        except RowError as error:
            problem = _problem(row, error)
            self.tally.cannot_be_read(problem)
            return Outcome(index, row.origin, refused=problem)
        form = self._given or self._found(row)
        if form is None:
            self.tally.waiting.append((index, row))
            return None
        return self._converted(index, row, form)

    def _found(self, row: Row) -> Format | None:
        formats = _formats(_keys(row.value))
        self.tally.met(row.origin, formats)
        return formats[0] if len(formats) == 1 else None

    def _converted(self, index: int, row: Row, form: Format) -> Outcome:
        try:
            found = _convert(row, form, self.choices)
        except RowError as error:
            return Outcome(index, row.origin, refused=_problem(row, self._columns.renamed(error)))
        except LeftOut as reason:
            return Outcome(index, row.origin, left_out=str(reason))
        return Outcome(
            index, row.origin, found, compared=form.compared(row) if form.left_out and form.compared else None
        )


@dataclass
class Tally:
    """What is true of the rows of a source read so far, or of some of them, in their order.

    given     the shape that was named, else auto
    counts    rows of each shape
    seen      where the first of them stand
    waiting   rows without a shape, by their place
    compared  what a format that compares rows has to know of them
    """

    given: str
    rows: int = 0
    readable: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seen: dict[str, list[Origin]] = field(default_factory=dict)
    waiting: list[tuple[int, Row]] = field(default_factory=list)
    ambiguous: list[Problem] = field(default_factory=list)
    ambiguous_rows: int = 0
    unread: list[Problem] = field(default_factory=list)
    first: Conversation | None = None
    refused: list[Problem] = field(default_factory=list)
    refused_rows: int = 0
    compared: list[Row] = field(default_factory=list)

    @property
    def shape(self) -> str:
        """The shape that was given, or that the rows have."""
        return self.given if self.given != "auto" else next(iter(self.counts), "auto")

    def cannot_be_read(self, problem: Problem) -> None:
        self.unread += [problem][: NAMED - len(self.unread)]

    def met(self, origin: Origin, formats: Sequence[Format]) -> None:
        """A row that so many formats read."""
        if len(formats) > 1:
            what = f"reads as {' and as '.join(form.name for form in formats)}"
            self.ambiguous_rows += 1
            self.ambiguous += [Problem(str(origin), what, "keep one of them, or say data.format")]
            del self.ambiguous[NAMED:]
        if len(formats) == 1:
            self.counts[formats[0].name] += 1
            origins = self.seen.setdefault(formats[0].name, [])
            if len(origins) < NAMED:
                origins.append(origin)

    def note(self, outcome: Outcome) -> None:
        if outcome.refused:
            self.refused_rows += 1
            if len(self.refused) < NAMED:
                self.refused.append(outcome.refused)
        elif outcome.conversations and self.first is None:
            self.first = outcome.conversations[0]
        if outcome.compared:
            self.compared.append(outcome.compared)

    def add(self, later: Tally) -> None:
        """Puts the tally of the rows that follow behind this one."""
        self.waiting += [(self.rows + index, row) for index, row in later.waiting]
        self.rows += later.rows
        self.readable += later.readable
        self.counts += later.counts
        for name, origins in later.seen.items():
            mine = self.seen.setdefault(name, [])
            mine += origins[: NAMED - len(mine)]
        self.ambiguous_rows += later.ambiguous_rows
        self.refused_rows += later.refused_rows
        for own, others in (
            (self.ambiguous, later.ambiguous),
            (self.unread, later.unread),
            (self.refused, later.refused),
        ):
            own += others[: NAMED - len(own)]
        self.first = self.first or later.first
        self.compared += later.compared

    def survey(self, form: Format, choices: Choices) -> Survey:
        reasons = form.reasons(self.compared, choices)
        left_out = tuple((self.compared[position].origin, reasons[position]) for position in sorted(reasons))
        return Survey(form.name, self.rows, self.first, tuple(self.refused), self.refused_rows, left_out)

    def one_shape(self, source: str) -> Format:
        """The format that reads all rows. Raises Problems."""
        if self.ambiguous:
            more = self.ambiguous_rows - len(self.ambiguous)
            raise Problems(f"{source}: rows with two meanings", self.ambiguous, more)
        if len(self.counts) > 1:
            raise Problems(f"{source}: rows of several shapes in one file; split it", self._mixed())
        if not self.counts:
            raise self.no_shape(source)
        return load(self.shape)

    def _mixed(self) -> list[Problem]:
        common = self.counts.most_common(1)[0][0]
        others = [(origin, name) for name, origins in self.seen.items() if name != common for origin in origins]
        return [Problem(str(origin), f"is {name}, most rows are {common}", "split the file") for origin, name in others]

    def no_shape(self, source: str) -> Problems:
        if not self.waiting:
            return Problems(f"{source}: no row can be read", self.unread)
        fix = "map the columns, as in columns: {prompt: question, completion: answer}, or name a format"
        problems = [Problem(str(row.origin), f"has {described(row.value)}", fix) for _, row in self.waiting[:3]]
        return Problems(f"{source}: no row has a shape that deft knows ({', '.join(names())})", problems)


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
