"""Rows -> the one format that reads them all, found by looking at the rows; the folder `formats` is the registry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from deft import registry
from deft.data.fields import RowError, kind_of
from deft.errors import Problem, Problems
from deft.types import Conversation, Row


@dataclass(frozen=True, slots=True)
class Understood:
    """A source, read: its shape, its conversations in order, and what was refused."""

    shape: str
    conversations: tuple[Conversation, ...]
    refused: tuple[Problem, ...]


def names() -> list[str]:
    """The formats there are.

    >>> "messages" in names()
    True
    """
    return registry.names("data.formats")


@cache
def load(name: str) -> ModuleType:
    """The format's module; InputError lists what there is for an unknown name."""
    return registry.load("data.formats", name, "data.format")


def understand(rows: Iterable[Row | Problem], source: str, shape: str = "auto") -> Understood:
    """Every row in the one shape of its source, or refused with its reason.

    Raises Problems where rows have two shapes at once, where the file mixes shapes, or where no row has any.
    """
    rows = list(rows)
    refused = [row for row in rows if isinstance(row, Problem)]
    good = [row for row in rows if isinstance(row, Row)]
    if not good:
        raise Problems(f"{source}: no row can be read", refused)
    if shape == "auto":
        shape = find(good, source)
    conversations, failed = _convert(good, shape)
    return Understood(shape, tuple(conversations), tuple(sorted(refused + failed, key=_line)))


def find(rows: Sequence[Row], source: str) -> str:
    """The one shape that the rows have.

    >>> from deft.data.sources import from_values
    >>> find(from_values([{"question": "a", "answer": "b"}]), "rows")
    'question_answer'
    """
    shapes = [tuple(name for name in names() if load(name).matches(row.value)) for row in rows]
    ambiguous = [
        Problem(str(row.origin), f"reads as {' and as '.join(found)}", "keep one of them, or say data.format")
        for row, found in zip(rows, shapes, strict=True)
        if len(found) > 1
    ]
    if ambiguous:
        raise Problems(f"{source}: rows with two meanings", ambiguous)
    counts = Counter(found[0] for found in shapes if found)
    if not counts:
        raise Problems(
            f"{source}: no row has a shape that deft knows ({', '.join(names())})",
            [Problem(str(row.origin), f"has {_description(row)}") for row in rows[:3]],
        )
    if len(counts) > 1:
        raise Problems(f"{source}: rows of several shapes in one file; split it", _mixed(rows, shapes, counts))
    return next(iter(counts))


def _mixed(rows: Sequence[Row], shapes: Sequence[tuple[str, ...]], counts: Counter[str]) -> list[Problem]:
    common = counts.most_common(1)[0][0]
    return [
        Problem(str(row.origin), f"is {found[0]}, most rows are {common}")
        for row, found in zip(rows, shapes, strict=True)
        if found and found[0] != common
    ]


def _convert(rows: Sequence[Row], shape: str) -> tuple[list[Conversation], list[Problem]]:
    form = load(shape)
    conversations, refused = [], []
    for row in rows:
        try:
            if not form.matches(row.value):
                raise RowError("", f"has {_description(row)}, not {shape}", "mend or remove the row")
            conversations.append(form.convert(row))
        except RowError as error:
            refused.append(Problem(str(row.origin), error.what, error.fix))
    return conversations, refused


def _description(row: Row) -> str:
    if isinstance(row.value, dict):
        return "the keys " + ", ".join(map(repr, list(row.value)[:8])) if row.value else "no keys"
    return kind_of(row.value)


def _line(problem: Problem) -> int:
    return int(problem.where.rpartition(":")[2])
