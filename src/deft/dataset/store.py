"""Encoded rows of one source as Arrow record batches, in memory or mapped from a file.

    row -> examples -> parts -> tokens and runs of equal weights

Every array that is handed out is a view of Arrow's memory.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from deft.core.errors import DamagedError
from deft.core.files import Staging, Writer
from deft.core.types import Encoded, Fate, Origin
from deft.encoding.rows import Example

FATES = tuple(Fate)
"""What the numbers in the column `fate` mean."""

ROWS = "rows.arrow"
"""The file of a store."""

GROUP_BYTES = 1 << 22
"""Chunks are joined into row groups of at least this size."""

_RUN = pa.struct([("length", pa.int32()), ("weight", pa.float32())])
_PART = pa.struct([("tokens", pa.list_(pa.int32())), ("runs", pa.list_(_RUN)), ("targets", pa.int32())])
_EXAMPLE = pa.struct([("example_digest", pa.uint64()), ("scale", pa.float64()), ("parts", pa.list_(_PART))])
_TAIL = pa.struct([("text", pa.int32()), ("token", pa.int32())])
SCHEMA = pa.schema(
    [
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("item", pa.int32()),
        ("stage", pa.uint8()),
        ("fate", pa.uint8()),
        ("reason", pa.string()),
        ("digest", pa.uint64()),
        ("warnings", pa.uint32()),
        ("fallbacks", pa.dictionary(pa.int32(), pa.string())),
        ("tails", pa.list_(_TAIL)),
        ("examples", pa.list_(_EXAMPLE)),
    ]
)
"""A row.

file, line, item  its origin
stage             a number of Stage
fate              before rows are held out or drawn: an index of FATES
reason            why it is not trained whole, else empty
digest            of its words
warnings          a bit for each name of data_warnings.WARNINGS
fallbacks         other template inputs that its proof needed, a line each
tails             per text whose last learnt token is not known to stop the model: the tokens that would stop it there
examples          example_digest: of ids and weights; scale: multiplies the weights of its parts; parts: tokens, runs of
                  equal weights, and the number of learnt tokens
"""


class Stage(IntEnum):
    """How far a row came: it was encoded, or it was left out or refused while it was read."""

    ENCODED = 0
    LEFT_OUT = 1
    UNREAD = 2


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Rows in the form of SCHEMA. marks: what ended learnt turns so far."""

    batch: pa.RecordBatch
    marks: frozenset[str]


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of a store.

    rows, examples  its place among those of the store
    files           the names that the numbers in arrays["file"] stand for
    arrays          views of all numbers in `batch` by the names of SCHEMA; of each list NAME_offsets, int32: element n
                    has the values from NAME_offsets[n] to NAME_offsets[n + 1]

    A store is read page by page, long after its file was verified: whatever asks for a row or an example raises
    DamagedError where that has other numbers than were written.
    """

    batch: pa.RecordBatch
    rows: slice
    examples: slice
    files: tuple[str, ...]
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    @classmethod
    def of(cls, batch: pa.RecordBatch, first_row: int = 0, first_example: int = 0) -> RowGroup:
        arrays = {name: each for field in SCHEMA for name, each in _views(field.name, batch.column(field.name))}
        examples = first_example + len(arrays["example_digest"])
        files = tuple(batch.column("file").dictionary.to_pylist())
        return cls(batch, slice(first_row, first_row + batch.num_rows), slice(first_example, examples), files, arrays)

    def counts(self, name: str) -> np.ndarray:
        """int32: the lengths of the lists of a column."""
        return np.diff(self.arrays[f"{name}_offsets"])

    def origin(self, row: int) -> Origin:
        try:
            file, line, item = (self.arrays[name].item(row) for name in ("file", "line", "item"))
            return Origin(self.files[file], line, item)
        except IndexError as error:
            raise _damaged(f"row {row}") from error

    def example(self, number: int, loss_weight: float = 1.0) -> Example:
        """The parts of an example; `loss_weight` is that of the source."""
        origin = self.origin(bisect_right(self.arrays["examples_offsets"].data, number) - 1)
        scale = self.arrays["scale"].item(number)
        parts = tuple(self._part(part, origin) for part in self.numbers("parts", number))
        if example_digest(parts, scale) != self.arrays["example_digest"].item(number):
            raise _damaged(origin)
        factor = np.float32(scale * loss_weight)
        return parts if factor == 1.0 else tuple(replace(part, weights=part.weights * factor) for part in parts)

    def numbers(self, name: str, element: int) -> range:
        """The numbers of the values of a list."""
        span = self._span(name, element)
        return range(span.start, span.stop)

    def lengths(self, number: int) -> list[int]:
        """The tokens of each part of an example."""
        spans = (self._span("tokens", part) for part in self.numbers("parts", number))
        return [span.stop - span.start for span in spans]

    def _span(self, name: str, element: int) -> slice:
        offsets = self.arrays[f"{name}_offsets"]
        start, stop = offsets[element : element + 2].tolist() if element + 1 < len(offsets) else (1, 0)
        if not 0 <= start <= stop:
            raise _damaged(f"{name} {element}")
        return slice(start, stop)

    def _part(self, part: int, origin: Origin) -> Encoded:
        tokens, runs = self._span("tokens", part), self._span("runs", part)
        lengths = self.arrays["length"][runs]
        if lengths.min(initial=0) < 0 or lengths.sum() != tokens.stop - tokens.start:
            raise _damaged(origin)
        return Encoded(origin, self.arrays["tokens"][tokens], self.arrays["weight"][runs].repeat(lengths))


def _damaged(what: object) -> DamagedError:
    return DamagedError(f"{what}: its tokens are not those that were written to the cache; start again")


def example_digest(example: Example, scale: float) -> int:
    """64 bits of the tokens of an example, their weights, and what these are multiplied by."""
    found = hashlib.blake2b(np.float64(scale).tobytes(), digest_size=8)
    for part in example:
        found.update(len(part.tokens).to_bytes(8, "little"))
        found.update(part.tokens.astype("<i4", copy=False).tobytes())
        found.update(part.weights.astype("<f4", copy=False).tobytes())
    return int.from_bytes(found.digest(), "little")


def _views(name: str, array: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    if pa.types.is_list(array.type):
        yield f"{name}_offsets", array.offsets.to_numpy()
        yield from _views(name, array.values)
    elif pa.types.is_struct(array.type):
        for field in array.type:
            yield from _views(field.name, array.field(field.name))
    elif pa.types.is_dictionary(array.type) and not array.null_count:
        yield name, array.indices.to_numpy()
    elif pa.types.is_primitive(array.type):
        yield name, array.to_numpy()


@dataclass(frozen=True)
class Store:
    """All rows of a source, encoded. marks: what ended learnt turns."""

    groups: tuple[RowGroup, ...]
    marks: frozenset[str]

    @classmethod
    def of(cls, batches: Iterable[pa.RecordBatch], marks: Iterable[str]) -> Store:
        groups: list[RowGroup] = []
        rows = examples = 0
        for batch in batches:
            groups.append(RowGroup.of(batch, rows, examples))
            rows, examples = groups[-1].rows.stop, groups[-1].examples.stop
        return cls(tuple(groups), frozenset(marks))

    @classmethod
    def in_memory(cls, chunks: Iterable[EncodedChunk]) -> Store:
        marks: set[str] = set()
        return cls.of(list(joined(chunks, marks)), marks)

    def __len__(self) -> int:
        return self.groups[-1].rows.stop if self.groups else 0

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.groups[-1].examples.stop if self.groups else 0

    def column(self, name: str) -> np.ndarray:
        """[rows]: a copy of a column of numbers."""
        dtype = SCHEMA.field(name).type.to_pandas_dtype()
        return np.concatenate([np.zeros(0, dtype), *(group.arrays[name] for group in self.groups)], dtype=dtype)

    def origin(self, row: int) -> Origin:
        group, inner = self._of_row(row)
        return group.origin(inner)

    def value(self, row: int, name: str) -> Any:
        """What a row has in a column, as a Python value."""
        group, inner = self._of_row(row)
        return group.batch.column(name)[inner].as_py()

    def examples_of(self, row: int, loss_weight: float = 1.0) -> list[Example]:
        group, inner = self._of_row(row)
        return [group.example(number, loss_weight) for number in group.numbers("examples", inner)]

    def group_of(self, example: int) -> RowGroup:
        return self.groups[bisect_right(self.groups, example, key=lambda group: group.examples.stop)]

    def _of_row(self, row: int) -> tuple[RowGroup, int]:
        group = self.groups[bisect_right(self.groups, row, key=lambda group: group.rows.stop)]
        return group, row - group.rows.start


class _Sink(io.RawIOBase):
    """A file of a staging folder as a stream that Arrow can write to."""

    def __init__(self, file: Writer) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        return len(data)


def write(staging: Staging, chunks: Iterable[EncodedChunk]) -> None:
    """The rows of a source as a file in Arrow's stream format, ROWS."""
    marks: set[str] = set()
    with staging.open(ROWS) as file, pa.ipc.new_stream(_Sink(file), SCHEMA) as stream:
        for batch in joined(chunks, marks):
            stream.write_batch(batch)
    staging.about["marks"] = sorted(marks)


def read(folder: Path, about: Mapping[str, Any]) -> Store:
    """The store that `write` wrote, mapped into memory: pages are read when they are needed."""
    return Store.of(pa.ipc.open_stream(pa.memory_map(str(folder / ROWS))), about["marks"])


def joined(chunks: Iterable[EncodedChunk], marks: set[str]) -> Iterator[pa.RecordBatch]:
    """Chunks in order -> record batches of GROUP_BYTES and more but for the last; `marks` gets the marks of all."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for chunk in chunks:
        marks |= chunk.marks
        waiting.append(chunk.batch)
        size += chunk.batch.nbytes
        if size >= GROUP_BYTES:
            yield _as_one(waiting)
            waiting, size = [], 0
    if waiting:
        yield _as_one(waiting)


def _as_one(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    pool = pa.system_memory_pool()  # the default pool keeps what is freed
    (batch,) = pa.Table.from_batches(batches).unify_dictionaries(pool).combine_chunks(pool).to_batches()
    return batch


@dataclass(frozen=True)
class Selection:
    """Examples of a store by number, as often as they are learnt. index: int32 or int64 [E], in the order of rows."""

    store: Store
    loss_weight: float
    index: np.ndarray

    def by_group(self) -> Iterator[tuple[RowGroup, np.ndarray]]:
        """Each row group, and the numbers of its selected examples inside it."""
        starts = [group.examples.start for group in self.store.groups]
        edges = np.searchsorted(self.index, [*starts, self.store.examples])
        for group, (first, end) in zip(self.store.groups, pairwise(edges), strict=True):
            yield group, self.index[first:end] - group.examples.start


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Examples of several sources in one sequence, each built when it is asked for: 4 bytes an example are kept."""

    selections: tuple[Selection, ...] = ()

    def __len__(self) -> int:
        return sum(len(each.index) for each in self.selections)

    def __iter__(self) -> Iterator[Example]:
        for each in self.selections:
            for group, numbers in each.by_group():
                yield from (group.example(number, each.loss_weight) for number in numbers.tolist())

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        group, number, loss_weight = self._at(index)
        return group.example(number, loss_weight)

    def __add__(self, other: Examples) -> Examples:
        return Examples(self.selections + other.selections)

    def sizes(self) -> np.ndarray:
        """int64 [E]: the tokens of each."""
        found = [
            np.diff(group.arrays["tokens_offsets"][group.arrays["parts_offsets"]])[numbers]
            for group, numbers, _ in self._by_group()
        ]
        return np.concatenate([np.zeros(0, np.int64), *found], dtype=np.int64)

    def digests(self) -> np.ndarray:
        """int64 [E]: the bits of the digest of the ids and weights of each."""
        found = [
            group.arrays["example_digest"][numbers] ^ _mark(loss_weight)
            for group, numbers, loss_weight in self._by_group()
        ]
        return np.concatenate([np.zeros(0, np.uint64), *found]).view(np.int64)

    def origins(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """The names of files, and of each example its line, int64 [E], and its file among them, int32 [E]."""
        names: dict[str, int] = {}
        lines, files = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for group, numbers, _ in self._by_group():
            rows = np.searchsorted(group.arrays["examples_offsets"], numbers, side="right") - 1
            known = [names.setdefault(name, len(names)) for name in group.files]
            lines.append(group.arrays["line"][rows])
            files.append(np.array(known, np.int32)[group.arrays["file"][rows]])
        return tuple(names), np.concatenate(lines), np.concatenate(files)

    def out_of_vocabulary(self, size: int) -> dict[Origin, int]:
        """Rows with a token that is not below `size`, and their largest token."""
        found: dict[Origin, int] = {}
        for group, numbers, _ in self._by_group():
            positions = np.flatnonzero(group.arrays["tokens"] >= size)
            parts = np.searchsorted(group.arrays["tokens_offsets"], positions, side="right") - 1
            examples = np.searchsorted(group.arrays["parts_offsets"], parts, side="right") - 1
            for number in np.intersect1d(examples, numbers).tolist():
                example = group.example(number)
                largest = max(int(part.tokens.max()) for part in example)
                found[example[0].origin] = max(largest, found.get(example[0].origin, 0))
        return found

    def token_counts(self, ids: range) -> dict[int, int]:
        """How often each of some tokens stands in the rows that these are a selection of."""
        found = dict.fromkeys(ids, 0)
        for group in {id(group): group for each in self.selections for group in each.store.groups}.values():
            tokens = group.arrays["tokens"]
            present, times = np.unique(tokens[(tokens >= ids.start) & (tokens < ids.stop)], return_counts=True)
            for index, number in zip(present.tolist(), times.tolist(), strict=True):
                found[index] += number
        return found

    def lengths(self, index: int) -> list[int]:
        """The tokens of each part of an example."""
        group, number, _ = self._at(index)
        return group.lengths(number)

    def targets(self, index: int) -> int:
        """The learnt tokens of an example."""
        group, number, _ = self._at(index)
        parts = group.numbers("parts", number)
        return int(group.arrays["targets"][parts.start : parts.stop].sum())

    def _by_group(self) -> Iterator[tuple[RowGroup, np.ndarray, float]]:
        return ((group, numbers, each.loss_weight) for each in self.selections for group, numbers in each.by_group())

    def _at(self, index: int) -> tuple[RowGroup, int, float]:
        """The row group of an example, its number inside it, and the loss_weight of its source."""
        place = index + len(self) if index < 0 else index
        for each in self.selections:
            if 0 <= place < len(each.index):
                group = each.store.group_of(int(each.index[place]))
                return group, int(each.index[place]) - group.examples.start, each.loss_weight
            place -= len(each.index)
        raise IndexError(index)


def _mark(loss_weight: float) -> np.uint64:
    """What tells the digests of examples under one loss_weight from those under another."""
    return np.uint64(0 if loss_weight == 1.0 else hash(loss_weight) & (2**64 - 1))
