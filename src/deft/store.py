"""Encoded rows of one source as flat arrays, in memory or mapped from a file.

    rows -> examples -> parts -> tokens and runs

Each level says where it ends in the next: row r has the examples from `row_examples[r - 1]` to `row_examples[r]`.
Weights are the same over long stretches of a text, so they are kept as runs: so many tokens, one weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, overload

import numpy as np

from deft.encoding.rows import Example
from deft.types import Encoded, Fate, Origin

FATES = tuple(Fate)
"""What the numbers in `fate` mean."""


SLAB = 1 << 17
"""So many rows are looked at together."""


class Stage(IntEnum):
    """How far a row came: to its encoding, or it was left out or refused while it was read."""

    ENCODED = 0
    LEFT_OUT = 1
    UNREAD = 2


COLUMNS: Mapping[str, str] = {
    "line": "<i8",
    "item": "<i4",
    "file": "<i4",
    "stage": "<u1",
    "fate": "<u1",
    "digest": "<u8",
    "symptoms": "<u2",
    "notes": "<i4",
    "row_examples": "<i8",
    "lost_row": "<i8",
    "lost_end": "<i8",
    "reason": "<u1",
    "example_parts": "<i8",
    "example_digest": "<u8",
    "part_tokens": "<i8",
    "part_runs": "<i8",
    "part_targets": "<i4",
    "part_scale": "<f8",
    "tokens": "<i4",
    "run_length": "<i4",
    "run_weight": "<f4",
    "tail_row": "<i8",
    "tail_part": "<i4",
    "tail_token": "<i4",
}
"""Arrays and their types.

rows      line, item, file: the origin, `file` counts the names of files; stage; fate, before anything is held out or
          drawn; digest of the words; symptoms, a bit each of those of `SYMPTOMS`; notes: which tuple of notes, -1 none;
          row_examples: where its examples end
lost      rows that have a reason: lost_row; lost_end, where it ends in `reason` (UTF-8)
examples  example_parts: where its parts end; example_digest: of its ids and weights
parts     part_tokens, part_runs: where they end; part_targets: learnt tokens; part_scale: what the weight of the row
          multiplies its weights by
runs      run_length, in tokens; run_weight
tails     of texts whose last learnt token is not known to stop the model: tail_row, tail_part, and each tail_token that
          would stop it
"""

_COUNTED = {
    "lost_row": "line",
    "lost_end": "reason",
    "row_examples": "example_parts",
    "example_parts": "part_tokens",
    "part_tokens": "tokens",
    "part_runs": "run_weight",
    "tail_row": "line",
}
"""Columns whose numbers are places in another column."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one file, encoded. Its numbers count from its own beginning, `notes` from its own tuples of notes.

    marks  what ended learnt turns so far
    """

    source: str
    columns: Mapping[str, np.ndarray]
    notes: tuple[tuple[str, ...], ...]
    marks: frozenset[str]

    @property
    def rows(self) -> int:
        return len(self.columns["line"])


@dataclass
class Joiner:
    """Blocks of a source, in order -> pieces of its columns; what is no column is in `files`, `notes` and `marks`."""

    files: list[str] = field(default_factory=list)
    notes: list[tuple[str, ...]] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)
    _lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0), repr=False)

    def add(self, block: Block) -> dict[str, np.ndarray]:
        """The columns of the block as they go on after those before."""
        self.marks |= block.marks
        self.files += [block.source] if block.source not in self.files else []
        self.notes += [each for each in block.notes if each not in self.notes]
        codes = np.array([*map(self.notes.index, block.notes), -1])
        found = {
            **block.columns,
            "file": np.full(block.rows, self.files.index(block.source)),
            "notes": codes[block.columns["notes"]],
            **{name: block.columns[name] + self._lengths[other] for name, other in _COUNTED.items()},
        }
        for name, column in found.items():
            self._lengths[name] += len(column)
        return {name: column.astype(COLUMNS[name], copy=False) for name, column in found.items()}

    def about(self) -> dict[str, Any]:
        """What is no column, as JSON."""
        return {"files": self.files, "notes": [list(each) for each in self.notes], "marks": sorted(self.marks)}


@dataclass(frozen=True)
class Store:
    """All rows of a source, encoded; what they mean is said at `COLUMNS`. Nothing is held but what is looked at."""

    columns: Mapping[str, np.ndarray]
    files: tuple[str, ...]
    notes: tuple[tuple[str, ...], ...]
    marks: frozenset[str]

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Store:
        """The blocks of a source, in memory."""
        joiner = Joiner()
        pieces = [joiner.add(block) for block in blocks]
        columns = {name: np.concatenate([[], *(piece[name] for piece in pieces)]) for name in COLUMNS}
        return cls.about({name: column.astype(COLUMNS[name]) for name, column in columns.items()}, joiner.about())

    @classmethod
    def about(cls, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Store:
        notes = tuple(tuple(each) for each in about["notes"])
        return cls(columns, tuple(about["files"]), notes, frozenset(about["marks"]))

    def __len__(self) -> int:
        return len(self.columns["line"])

    def origin(self, row: int) -> Origin:
        line, item, file = (int(self.columns[name][row]) for name in ("line", "item", "file"))
        return Origin(self.files[file], line, item)

    def reason(self, row: int) -> str:
        """Why a row is lost; nothing where it is not."""
        lost = self.columns["lost_row"]
        place = int(np.searchsorted(lost, row))
        if place == len(lost) or lost[place] != row:
            return ""
        return self.columns["reason"][_span(self.columns["lost_end"], place)].tobytes().decode("utf-8")

    def fallbacks(self, row: int) -> tuple[str, ...]:
        """The other ways to hand a row to the chat template that its proof needed."""
        code = int(self.columns["notes"][row])
        return self.notes[code] if code >= 0 else ()

    def examples(self, row: int) -> range:
        found = _span(self.columns["row_examples"], row)
        return range(found.start, found.stop)

    def parts(self, example: int) -> range:
        found = _span(self.columns["example_parts"], example)
        return range(found.start, found.stop)

    def example(self, example: int, loss_weight: float = 1.0) -> Example:
        """An example's parts; `loss_weight` is that of the source."""
        row = int(np.searchsorted(self.columns["row_examples"], example, side="right"))
        origin = self.origin(row)
        return tuple(self._encoded(part, origin, loss_weight) for part in self.parts(example))

    def _encoded(self, part: int, origin: Origin, loss_weight: float) -> Encoded:
        runs = _span(self.columns["part_runs"], part)
        weights = np.repeat(self.columns["run_weight"][runs], self.columns["run_length"][runs])
        scale = float(self.columns["part_scale"][part]) * loss_weight
        tokens = self.columns["tokens"][_span(self.columns["part_tokens"], part)]
        return Encoded(origin, tokens, weights if scale == 1.0 else weights * np.float32(scale))

    def slabs(self) -> Iterator[slice]:
        """All rows, some at a time, so that what is made of them takes little memory."""
        return slabs(len(self))

    def counts(self, name: str, places: slice = slice(None)) -> np.ndarray:
        """How many of the next level each has, by the column that says where they end.

        >>> store = Store({"row_examples": np.array([2, 2, 5])}, (), (), frozenset())
        >>> store.counts("row_examples").tolist(), store.counts("row_examples", slice(1, 3)).tolist()
        ([2, 0, 3], [0, 3])
        """
        return np.diff(self.columns[name][places], prepend=self.start(name, places.start or 0))

    def start(self, name: str, place: int) -> int:
        """Where the next level begins for one of this level."""
        return int(self.columns[name][place - 1]) if place else 0


def last(ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the next level ends for the first so many of this level.

    >>> last(np.array([2, 5]), np.array([0, 1, 2])).tolist(), last(np.array([], int), np.array([0])).tolist()
    ([0, 2, 5], [0])
    """
    return np.where(counts > 0, ends[np.maximum(counts, 1) - 1], 0) if len(ends) else np.zeros(len(counts), np.int64)


def slabs(rows: int) -> Iterator[slice]:
    """
    >>> list(slabs(SLAB + 1))
    [slice(0, 131072, None), slice(131072, 131073, None)]
    """
    return (slice(start, min(start + SLAB, rows)) for start in range(0, rows, SLAB))


def _span(ends: np.ndarray, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


@dataclass(frozen=True)
class Picked:
    """Some examples of a store, by number, as often as they stand there."""

    store: Store
    loss_weight: float
    index: np.ndarray


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Examples of several sources in one sequence, each made when it is asked for: 4 bytes an example."""

    picked: tuple[Picked, ...] = ()

    def __len__(self) -> int:
        return sum(len(each.index) for each in self.picked)

    def __iter__(self) -> Iterator[Example]:
        for each in self.picked:
            for example in each.index:
                yield each.store.example(int(example), each.loss_weight)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        each, place = self.at(index)
        return each.store.example(int(each.index[place]), each.loss_weight)

    def __add__(self, other: Examples) -> Examples:
        return Examples(self.picked + other.picked)

    def at(self, index: int) -> tuple[Picked, int]:
        """Where an example stands."""
        place = index + len(self) if index < 0 else index
        for each in self.picked:
            if 0 <= place < len(each.index):
                return each, place
            place -= len(each.index)
        raise IndexError(index)

    def sizes(self) -> np.ndarray:
        """int64 [E]: the tokens of each."""
        return np.concatenate([np.zeros(0, np.int64), *(_sizes(each) for each in self.picked)])

    def past(self, size: int) -> dict[Origin, int]:
        """Rows with a token that is not below `size`, and their largest token."""
        found: dict[Origin, int] = {}
        for each in self.picked:
            tokens, ends = each.store.columns["tokens"], each.store.columns["part_tokens"]
            # A bit for each token is all that is held.
            parts = np.unique(np.searchsorted(ends, np.flatnonzero(tokens >= size), side="right"))
            examples = np.unique(np.searchsorted(each.store.columns["example_parts"], parts, side="right"))
            for example in np.intersect1d(examples, each.index).tolist():
                parts_of = each.store.example(example)
                largest = max(int(part.tokens.max()) for part in parts_of)
                found[parts_of[0].origin] = max(largest, found.get(parts_of[0].origin, 0))
        return found

    def digests(self) -> np.ndarray:
        """int64 [E]: of the ids and weights of each."""
        found = [each.store.columns["example_digest"][each.index] ^ _mark(each.loss_weight) for each in self.picked]
        return np.concatenate([np.zeros(0, np.uint64), *found]).view(np.int64)

    def origins(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """The names of files, and of each example its line, int64 [E], and its file among them, int32 [E]."""
        names = tuple(dict.fromkeys(name for each in self.picked for name in each.store.files))
        lines, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for each in self.picked:
            columns, files = each.store.columns, np.array([names.index(name) for name in each.store.files], np.int32)
            for places in slabs(len(each.index)):
                rows = np.searchsorted(columns["row_examples"], each.index[places], side="right")
                lines.append(columns["line"][rows])
                numbers.append(files[columns["file"][rows]])
        return names, np.concatenate(lines), np.concatenate(numbers)

    def lengths(self, index: int) -> list[int]:
        """The tokens of each part of an example."""
        each, place = self.at(index)
        spans = (_span(each.store.columns["part_tokens"], part) for part in each.store.parts(int(each.index[place])))
        return [span.stop - span.start for span in spans]

    def targets(self, index: int) -> int:
        """The learnt tokens of an example."""
        each, place = self.at(index)
        parts = each.store.parts(int(each.index[place]))
        return int(each.store.columns["part_targets"][parts.start : parts.stop].sum())


def _mark(loss_weight: float) -> np.uint64:
    """What tells the digests of examples under one loss_weight from those under another."""
    return np.uint64(0 if loss_weight == 1.0 else hash(loss_weight) & (2**64 - 1))


def _sizes(picked: Picked) -> np.ndarray:
    parts, tokens = picked.store.columns["example_parts"], picked.store.columns["part_tokens"]
    sizes = np.zeros(len(picked.index), np.int64)
    for each in slabs(len(sizes)):
        index = picked.index[each]
        sizes[each] = last(tokens, parts[index]) - last(tokens, last(parts, index))
    return sizes
