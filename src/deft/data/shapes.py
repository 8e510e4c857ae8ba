"""The rows of a source -> their conversations, by the one format that reads them all.

A source is read twice. The first pass finds its shape: `counter` counts each chunk, in any process, and `survey` adds
the counts. The second pass converts each chunk by that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from deft.core.errors import Problem, Problems
from deft.core.types import Conversation, Origin, Row
from deft.data import row_fields, sources
from deft.data.chunks import Chunk
from deft.data.fields import LeftOut, RowError, described, is_absent, kind_of
from deft.data.format import Choices, Format, fitting, load, names, plain, the_one
from deft.data.hints import near

T = TypeVar("T")

NAMED = 1000
"""How many rows of each kind of error are kept for the message that names them, and how many names of fields."""
OTHERS = "..."
"""Stands for the names of fields beyond those."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row became: conversations, or the reason why it is refused or left out.

    compared  what its format compares it with others by
    unread    the names of what nothing reads of it
    """

    origin: Origin
    conversations: tuple[Conversation, ...] = ()
    refused: Problem | None = None
    left_out: str = ""
    compared: Row | None = None
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a source found; it holds no row.

    first     the first conversation, None where no row can be read
    refused   the first of the rows that are refused, of `refused_rows`
    left_out  rows that others make needless, in order, and why
    content   a digest of each file by its name; empty where it is not known
    unread    fields that nothing reads, and how many rows say something there, the most first
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
    unread: Mapping[str, int] = field(default_factory=dict)


def counter(recipe: tuple[str, str, Choices]) -> Callable[[Chunk], ShapeCount]:
    """What counts chunks of a source: its name, shape and choices are the recipe."""
    return lambda chunk: Reader(*recipe).counted(chunk.read())


def survey(counts: Iterable[ShapeCount], source: str, shape: str = "auto", choices: Choices | None = None) -> Survey:
    """What the counts of a source's chunks, in their order, say together.

    Raises Problems where rows have two shapes at once, where the file mixes shapes, or where no row has any.

    >>> from deft.data import chunks, sources
    >>> (rows,) = chunks.of(sources.from_values([{"question": "a", "answer": "b"}]), "rows")
    >>> survey([counter(("rows", "auto", Choices()))(rows)], "rows").shape
    'question_answer'
    """
    reader = Reader(source, shape, choices or Choices())
    for each in counts:
        reader.count.add(each)
    form = reader.one_shape()
    reader.convert_waiting(form)
    count = reader.count
    reasons = form.left_out(count.compared, reader.choices) if form.left_out else {}
    left_out = tuple((count.compared[position].origin, reasons[position]) for position in sorted(reasons))
    refused = tuple(count.refused.items), count.refused.count
    unread = dict(sorted(count.unread.items(), key=lambda each: (-each[1], each[0])))
    return Survey(form.name, count.rows, count.first, *refused, left_out, unread=unread)


class Reader:
    """Reads rows of one source, one by one, and holds none but those whose fields say no shape.

    What is true of all rows read is in `count`, which can be added to that of other rows of the source.
    """

    def __init__(self, source: str, shape: str, choices: Choices) -> None:
        self.source = source
        self.choices = choices
        self.given = None if shape == "auto" else load(shape)
        self.count = ShapeCount()

    def each(self, rows: Iterable[Row | Problem]) -> Iterator[Outcome]:
        """The outcome of every row in their order, but for those that wait until the shape of the others is known."""
        for row in rows:
            self.count.rows += 1
            self.count.readable += isinstance(row, Row)
            outcome = self._outcome(row, self.given)
            if outcome:
                self.count.note(outcome)
                yield outcome

    def counted(self, rows: Iterable[Row | Problem]) -> ShapeCount:
        """What is true of rows."""
        for _ in self.each(rows):
            pass
        form = self.given or (self.count.shape() if self.count.shapes else None)
        if form:
            self.convert_waiting(form)
        return self.count

    def convert_waiting(self, form: Format) -> None:
        """Counts the rows that waited, which have the shape of the others or are refused."""
        waiting, self.count.waiting = self.count.waiting, []
        for outcome in filter(None, (self._outcome(row, form) for row in waiting)):
            self.count.note(outcome)

    def one_shape(self) -> Format:
        """The format of all rows read. Raises Problems where there is none, or more than one."""
        form = self.given or self.count.shape()
        if self.given is None and (problems := self.count.mixed(self.source)):
            raise problems
        if form is None or not self.count.readable:
            raise self.count.no_shape(self.source)
        for option in sorted(self.choices.options() - form.options):
            knowing = [name for name in names() if option in load(name).options]
            if option == "split":
                knowing.append("data sets of the Hub and folders with splits")
                if sources.has_splits(self.source):
                    continue
            named = f"split {self.choices.split!r}" if option == "split" else option
            what = f"{named} has no meaning for rows of shape {form.name}"
            raise Problems(f"{self.source}: {what}", [Problem(self.source, what, f"only for {', '.join(knowing)}")])
        return form

    def _outcome(self, row: Row | Problem, form: Format | None) -> Outcome | None:
        """The outcome of a row, None where no format is given and the row must wait for others."""
        if isinstance(row, Problem):
            return Outcome(Origin.at(row.where), refused=row)
        own_names: Mapping[str, str] = {}
        try:
            named, own_names = _as_read(row, self.choices)
            form = form or self._form(named)
            if form is None:
                self.count.waiting.append(row)
                return None
            found, unread = form.read(named, self.choices)
        except RowError as error:
            return Outcome(row.origin, refused=_problem(row, _as_named_there(error, own_names)))
        except LeftOut as reason:
            return Outcome(row.origin, left_out=str(reason))
        except RecursionError:
            return Outcome(row.origin, refused=Problem(str(row.origin), "is nested too deeply", "write it flatter"))
        return Outcome(row.origin, found, compared=form.compared(named) if form.compared else None, unread=unread)

    def _form(self, row: Row) -> Format | None:
        """The format that a row's fields say; None where they say none, or several, or where its nulls say another."""
        formats, is_open = fitting(row.value, self.choices.columns)
        if not formats:
            return None
        try:
            form = the_one(row, formats, self.choices)
        except RowError as error:
            self.count.ambiguous.add([_problem(row, error)], 1)
            return None
        shapes = self.count.by_nulls if is_open else self.count.shapes
        shapes.setdefault(form.name, First()).add([row.origin], 1)
        return None if is_open else form


@dataclass
class First(Generic[T]):
    """The first `NAMED` of some items, and how many there are in all."""

    items: list[T] = field(default_factory=list)
    count: int = 0

    def add(self, items: Sequence[T], count: int) -> None:
        self.items += items[: NAMED - len(self.items)]
        self.count += count


@dataclass
class ShapeCount:
    """What is true of some rows of a source.

    readable  rows that are sound JSON or the like
    shapes    where rows of each shape stand
    by_nulls  where those stand that would have another shape if their null fields said something
    waiting   rows that no format reads, or more than one, or that are among `by_nulls`
    compared  what a format that compares rows needs of them
    unread    how many rows say something that nothing reads, by its name: of NAMED names, and then of any other
    """

    rows: int = 0
    readable: int = 0
    shapes: dict[str, First[Origin]] = field(default_factory=dict)
    by_nulls: dict[str, First[Origin]] = field(default_factory=dict)
    waiting: list[Row] = field(default_factory=list)
    ambiguous: First[Problem] = field(default_factory=First)
    refused: First[Problem] = field(default_factory=First)
    first: Conversation | None = None
    compared: list[Row] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)

    def shape(self) -> Format | None:
        """The one shape that rows have, None where they have none or several."""
        shapes = self.shapes or self.by_nulls
        return load(next(iter(shapes))) if len(shapes) == 1 else None

    def note(self, outcome: Outcome) -> None:
        if outcome.refused:
            self.refused.add([outcome.refused], 1)
        self.first = self.first or next(iter(outcome.conversations), None)
        if outcome.compared:
            self.compared.append(outcome.compared)
        for name in outcome.unread:
            self._add_unread(name, 1)

    def _add_unread(self, name: str, rows: int) -> None:
        name = name if name in self.unread or len(self.unread) < NAMED else OTHERS
        self.unread[name] = self.unread.get(name, 0) + rows

    def add(self, later: ShapeCount) -> None:
        """Adds the count of the rows that follow."""
        self.rows += later.rows
        self.readable += later.readable
        for own, others in ((self.shapes, later.shapes), (self.by_nulls, later.by_nulls)):
            for name, origins in others.items():
                own.setdefault(name, First()).add(origins.items, origins.count)
        self.waiting += later.waiting
        self.ambiguous.add(later.ambiguous.items, later.ambiguous.count)
        self.refused.add(later.refused.items, later.refused.count)
        self.first = self.first or later.first
        self.compared += later.compared
        for name, rows in later.unread.items():
            self._add_unread(name, rows)

    def mixed(self, source: str) -> Problems | None:
        """What is wrong where rows have several shapes, each alone or all of them together."""
        if self.ambiguous.count:
            more = self.ambiguous.count - len(self.ambiguous.items)
            return Problems(f"{source}: rows with two meanings", self.ambiguous.items, more)
        shapes = self.shapes or self.by_nulls
        if len(shapes) < 2:
            return None
        common = max(shapes, key=lambda name: shapes[name].count)
        problems = [
            Problem(str(origin), f"is {name}, most rows are {common}", "split the file")
            for name, origins in shapes.items()
            if name != common
            for origin in origins.items
        ]
        return Problems(f"{source}: rows of several shapes in one file; split it", problems)

    def no_shape(self, source: str) -> Problems:
        """What is wrong where no row has a shape."""
        if not self.waiting:
            more = self.refused.count - len(self.refused.items)
            return Problems(f"{source}: no row can be read", self.refused.items, more)
        problems = [
            Problem(str(row.origin), f"has {described(row.value)}", near(row.value)) for row in self.waiting[:3]
        ]
        return Problems(f"{source}: no row has a shape that deft knows ({', '.join(names())})", problems)


def _as_read(row: Row, choices: Choices) -> tuple[Row, Mapping[str, str]]:
    """The row under the names that formats read, without what its source ignores, and what it calls those itself.

    RowError where it has none of the mapped columns, or a field beside one that gets its name.
    """
    value = row_fields.ignoring(row.value, choices.ignore) if choices.ignore else row.value
    value = _mapped(value, choices.columns) if choices.columns else value
    value, own = plain(value)
    return row if value is row.value else replace(row, value=value), {**own, **choices.columns}


def _mapped(value: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("", f"is {kind_of(value)}; columns are mapped in objects only", "mend the row")
    found = {name: value[own] for name, own in columns.items() if own in value}
    if not found:
        known = " or ".join(repr(own) for own in columns.values())
        raise RowError("", f"has {described(value)}, not {known}", "mend data.columns or the row")
    others = {name: each for name, each in value.items() if name not in columns.values()}
    for name in found:
        if not is_absent(others.get(name)):
            raise RowError(name, f"stands beside {columns[name]}, which columns calls {name}", f"say ignore: [{name}]")
    return others | found


def _as_named_there(error: RowError, columns: Mapping[str, str]) -> RowError:
    """The error with the field as the rows call it."""
    for name, own in columns.items():
        if error.field == name or error.field.startswith((f"{name}.", f"{name}[")):
            return RowError(own + error.field[len(name) :], error.what, error.fix)
    return error


def _problem(row: Row, error: RowError) -> Problem:
    return Problem(str(row.origin), str(error), error.fix)
