"""Parquet and Arrow (IPC file and stream, Feather): a row a record, read in batches. Rows are counted from 1.

A table gives every struct all fields: those that are null are absent, as they are in every kind of file (`row_fields`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deft.core.errors import InputError, Problem
from deft.core.types import Origin, Row

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024


def parquet(path: str) -> Iterator[Row | Problem]:
    """The rows of a Parquet file. Raises InputError where it is none, or damaged."""
    import pyarrow.parquet as pq

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            _stop_if_twice(file.schema_arrow, path)
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return _rows(batches, path, "Parquet")


def arrow(path: str) -> Iterator[Row | Problem]:
    """The rows of an Arrow file or stream. Raises InputError where it is neither, or damaged."""
    import pyarrow as pa

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(path) as file:
            try:
                reader: Any = pa.ipc.open_file(file)
            except pa.ArrowInvalid:
                file.seek(0)
                stream = pa.ipc.open_stream(file)
                _stop_if_twice(stream.schema, path)
                yield from _sliced(stream)
                if file.tell() < file.size():
                    raise ValueError("more follows after its end") from None
            else:
                _stop_if_twice(reader.schema, path)
                yield from _sliced(reader.get_batch(index) for index in range(reader.num_record_batches))

    return _rows(batches, path, "Arrow")


def _stop_if_twice(fields: Any, path: str, inside: str = "") -> None:
    """InputError where a schema, or a struct in it, has a name twice: a row would keep one of the two."""
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            raise InputError(f"{path}:1: two columns named {inside + field.name!r}; rename or drop one of them")
        _stop_if_twice(_nested(field.type), path, f"{inside}{field.name}.")


def _nested(kind: Any) -> list[Any]:
    """The fields of a struct, wherever lists and maps hold it.

    >>> import pyarrow as pa
    >>> [field.name for field in _nested(pa.list_(pa.struct({"role": pa.string()})))]
    ['role']
    """
    import pyarrow as pa

    inner = [kind.field(place) for place in range(kind.num_fields)]
    return inner if pa.types.is_struct(kind) else [each for field in inner for each in _nested(field.type)]


def _sliced(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def _rows(batches: Callable[[], Iterator[pa.RecordBatch]], path: str, kind: str) -> Iterator[Row | Problem]:
    import pyarrow as pa

    done = 0
    try:
        for batch in batches():
            yield from _batch(batch, path, done)
            done += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        what = str(error).splitlines()[0][:200]
        raise InputError(f"{path}:{done + 1}: not a whole {kind} file: {what}; write or copy it again") from error


def _batch(batch: pa.RecordBatch, path: str, done: int) -> Iterator[Row | Problem]:
    try:
        values: list[Any] = _plain(batch)
    except UnicodeDecodeError:
        values = [_one(batch, index) for index in range(batch.num_rows)]
    for number, value in enumerate(values, start=done + 1):
        if value is None:
            yield Problem(f"{path}:{number}", "text that is not UTF-8", "write the column as UTF-8")
        else:
            yield Row(Origin(path, number), value)


def _plain(batch: pa.RecordBatch) -> list[Any]:
    """The rows. Dates and times that Python has no values for are text."""
    import pyarrow as pa

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):
        is_time = pa.types.is_temporal
        columns = [each.cast(pa.string()) if is_time(each.type) else each for each in batch.columns]
        return pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()


def _one(batch: pa.RecordBatch, index: int) -> Any:
    try:
        return _plain(batch.slice(index, 1))[0]
    except UnicodeDecodeError:
        return None
