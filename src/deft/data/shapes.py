"""The rows of a source -> their conversations, by the one format that reads them all.

A source is read twice. The first pass finds its shape: `counter` counts each chunk, in any process, and `survey` adds
the counts. The second pass converts each chunk by that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from deft.core.errors import Problem, Problems
from deft.core.types import Conversation, Origin, Row
from deft.data import sources
from deft.data.chunks import Chunk
from deft.data.fields import LeftOut, RowError, described, kind_of
from deft.data.format import Choices, Format, keys_of, load, names, reading

T = TypeVar("T")

NAMED = 1000
"""How many rows of each kind of error are kept for the message that names them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row became: conversations, or the reason why it is refused or left out.

    compared  what its format compares it with others by
    """

    origin: Origin
    conversations: tuple[Conversation, ...] = ()
    refused: Problem | None = None
    left_out: str = ""
    compared: Row | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a source found; it holds no row.

    first     the first conversation, None where no row can be read
    refused   the first of the rows that are refused, of `refused_rows`
    left_out  rows that others make needless, in order, and why
    content   a digest of each file by its name; empty where it is not known
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
    return Survey(form.name, count.rows, count.first, tuple(count.refused.items), count.refused.count, left_out)


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
            outcome = self._outcome(row)
            if outcome:
                self.count.note(outcome)
                yield outcome

    def counted(self, rows: Iterable[Row | Problem]) -> ShapeCount:
        """What is true of rows."""
        for _ in self.each(rows):
            pass
        form = self.given or self.count.shape()
        if form:
            self.convert_waiting(form)
        return self.count

    def convert_waiting(self, form: Format) -> None:
        """Counts the rows that waited, which have the shape of the others or are refused."""
        waiting, self.count.waiting = self.count.waiting, []
        for row in waiting:
            self.count.note(self._converted(row, form))

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
                knowing.append("data sets of the Hub")
                if sources.is_on_the_hub(self.source):
                    continue
            what = f"{option} has no meaning for rows of shape {form.name}"
            raise Problems(f"{self.source}: {what}", [Problem(self.source, what, f"only for {', '.join(knowing)}")])
        return form

    def _outcome(self, row: Row | Problem) -> Outcome | None:
        """The outcome of a row, None where it must wait for others."""
        if isinstance(row, Problem):
            return Outcome(Origin.at(row.where), refused=row)
        self.count.readable += 1
        try:
            row = _with_columns(row, self.choices.columns)
        except RowError as error:
            return Outcome(row.origin, refused=_problem(row, error))
        form = self.given
        if form is None:
            formats = reading(keys_of(row.value))
            self.count.met(row.origin, formats)
            if len(formats) != 1:
                self.count.waiting.append(row)
                return None
            form = formats[0]
        return self._converted(row, form)

    def _converted(self, row: Row, form: Format) -> Outcome:
        try:
            found = form.read(row, self.choices)
        except RowError as error:
            return Outcome(row.origin, refused=_problem(row, _as_named_there(error, self.choices.columns)))
        except LeftOut as reason:
            return Outcome(row.origin, left_out=str(reason))
        return Outcome(row.origin, found, compared=form.compared(row) if form.compared else None)


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
    waiting   rows that no format reads, or more than one
    compared  what a format that compares rows needs of them
    """

    rows: int = 0
    readable: int = 0
    shapes: dict[str, First[Origin]] = field(default_factory=dict)
    waiting: list[Row] = field(default_factory=list)
    ambiguous: First[Problem] = field(default_factory=First)
    refused: First[Problem] = field(default_factory=First)
    first: Conversation | None = None
    compared: list[Row] = field(default_factory=list)

    def shape(self) -> Format | None:
        """The one shape that rows have, None where they have none or several."""
        return load(next(iter(self.shapes))) if len(self.shapes) == 1 else None

    def met(self, origin: Origin, formats: Sequence[Format]) -> None:
        """Adds a row that `formats` read."""
        if len(formats) == 1:
            self.shapes.setdefault(formats[0].name, First()).add([origin], 1)
        elif formats:
            what = f"reads as {' and as '.join(form.name for form in formats)}"
            self.ambiguous.add([Problem(str(origin), what, "keep one of them, or say data.format")], 1)

    def note(self, outcome: Outcome) -> None:
        if outcome.refused:
            self.refused.add([outcome.refused], 1)
        self.first = self.first or next(iter(outcome.conversations), None)
        if outcome.compared:
            self.compared.append(outcome.compared)

    def add(self, later: ShapeCount) -> None:
        """Adds the count of the rows that follow."""
        self.rows += later.rows
        self.readable += later.readable
        for name, origins in later.shapes.items():
            self.shapes.setdefault(name, First()).add(origins.items, origins.count)
        self.waiting += later.waiting
        self.ambiguous.add(later.ambiguous.items, later.ambiguous.count)
        self.refused.add(later.refused.items, later.refused.count)
        self.first = self.first or later.first
        self.compared += later.compared

    def mixed(self, source: str) -> Problems | None:
        """What is wrong where rows have several shapes, each alone or all of them together."""
        if self.ambiguous.count:
            more = self.ambiguous.count - len(self.ambiguous.items)
            return Problems(f"{source}: rows with two meanings", self.ambiguous.items, more)
        if len(self.shapes) < 2:
            return None
        common = max(self.shapes, key=lambda name: self.shapes[name].count)
        problems = [
            Problem(str(origin), f"is {name}, most rows are {common}", "split the file")
            for name, origins in self.shapes.items()
            if name != common
            for origin in origins.items
        ]
        return Problems(f"{source}: rows of several shapes in one file; split it", problems)

    def no_shape(self, source: str) -> Problems:
        """What is wrong where no row has a shape."""
        if not self.waiting:
            more = self.refused.count - len(self.refused.items)
            return Problems(f"{source}: no row can be read", self.refused.items, more)
        fix = "map the columns, as in columns: {prompt: question, completion: answer}, or name a format"
        problems = [Problem(str(row.origin), f"has {described(row.value)}", fix) for row in self.waiting[:3]]
        return Problems(f"{source}: no row has a shape that deft knows ({', '.join(names())})", problems)


def _with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the names that its format uses, and nothing else of it; RowError where it has none of them."""
    if not columns:
        return row
    if not isinstance(row.value, dict):
        raise RowError("", f"is {kind_of(row.value)}; columns are mapped in objects only", "mend the row")
    found = {name: row.value[own] for name, own in columns.items() if own in row.value}
    if not found:
        known = " or ".join(repr(own) for own in columns.values())
        raise RowError("", f"has {described(row.value)}, not {known}", "mend data.columns or the row")
    return replace(row, value=found)


def _as_named_there(error: RowError, columns: Mapping[str, str]) -> RowError:
    """The error with the field as the rows call it."""
    for name, own in columns.items():
        if error.field == name or error.field.startswith((f"{name}.", f"{name}[")):
            return RowError(own + error.field[len(name) :], error.what, error.fix)
    return error


def _problem(row: Row, error: RowError) -> Problem:
    return Problem(str(row.origin), str(error), error.fix)
