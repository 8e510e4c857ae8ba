"""A source by name -> its rows with their origin. What cannot be read becomes a Problem that names its line.

A name is a file, a folder, a glob, `-` for standard input, or the id of a Hub data set. The suffix says what a file is
(JSONL, JSON, CSV, TSV, Parquet, Arrow, text); gzip, zstd, Parquet and Arrow are known by their first bytes, whatever
the name. Rows are read as they are asked for.
"""

from __future__ import annotations

import glob
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from deft.core.errors import InputError, Problem
from deft.core.registry import closest
from deft.core.types import Origin, Row
from deft.data.chunks import Chunk, of
from deft.data.readers import csv, hub, json, jsonl, tables, text

STDIN, PIPED = "-", "stdin"
"""The name of standard input as a source, and what its rows call it."""
STREAMED: dict[str, Callable[[BinaryIO, str], Iterator[Chunk]]] = {
    ".jsonl": jsonl.chunks,
    ".ndjson": jsonl.chunks,
    ".json": json.chunks,
    ".csv": lambda stream, source: of(csv.read(stream, source), source),
    ".tsv": lambda stream, source: of(csv.read(stream, source), source),
    ".txt": lambda stream, source: of(text.read(stream, source), source),
}
TABLES = {".parquet": tables.parquet, ".arrow": tables.arrow, ".feather": tables.arrow}
COMPRESSED = (".gz", ".zst", ".zstd")
SUFFIXES = (*STREAMED, *TABLES)

_TABLE_MARKS = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_NOT_DATA = (
    (b"<!doctype html", "is an HTML page, not data", "download the file itself"),
    (b"<html", "is an HTML page, not data", "download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data", "run `git lfs pull`"),
    (b"\xff\xfe", "is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text", "save it as UTF-8"),
    (b"pk\x03\x04", "is a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
    (b"bzh", "is compressed with bzip2", "use gzip or zstd"),
    (b"\xfd7zxz\x00", "is compressed with xz", "use gzip or zstd"),
    (b"%pdf", "is a PDF", "take the text out first"),
    (b"sqlite format 3", "is a database", "export its rows as JSONL"),
    (b"fea1", "is a Feather file of version 1", "write it with pyarrow.feather.write_feather again"),
    (b"\x80\x04\x95", "is a Python pickle, which can run code", "write the rows as JSONL"),
    (b"\x80\x05\x95", "is a Python pickle, which can run code", "write the rows as JSONL"),
)
_HUGGING_FACE_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_HEAD = 64


def read(path: str, *, subset: str | None = None, split: str | None = None) -> Iterator[Row | Problem]:
    """The rows of a source in their order, files sorted by name; a Problem in place of each that cannot be read.

    subset, split  of a Hub data set; the split is train unless it is named

    Raises InputError where there is no such source, or a file of it is of an unknown kind, damaged or empty.
    """
    return chain.from_iterable(chunk.read() for chunk in chunks(path, subset=subset, split=split))


def chunks(path: str, *, subset: str | None = None, split: str | None = None) -> Iterator[Chunk]:
    """What `read` reads, in chunks."""
    if subset is not None and not is_on_the_hub(path):
        raise InputError(f"{path}: subset {subset!r} is for data sets of the Hub, and this is none; leave it out")
    if path == STDIN:
        return _not_empty(_stream(_stdin(), PIPED, ".json"), PIPED)
    if is_on_the_hub(path):
        return _not_empty(of(hub.read(path, subset, split or "train"), path), path)
    return _files(path)


def is_on_the_hub(path: str) -> bool:
    """Whether a name is that of a Hub data set, as nothing on this disk is called so."""
    return not Path(path).exists() and not _is_glob(path) and hub.is_id(path)


def from_values(values: Iterable[Any], source: str = "rows") -> list[Row]:
    """Rows that a caller already holds.

    >>> from_values(["a", "b"])[1].origin
    Origin(source='rows', line=2, item=0)
    """
    return [Row(Origin(source, line), value) for line, value in enumerate(values, start=1)]


def files(path: str) -> list[str]:
    """The files of a file, folder or glob, sorted. Raises InputError if there is none.

    In a folder and below it, all files with a suffix that deft reads; hidden ones and Hugging Face's notes are no data.
    """
    if _is_glob(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not found:
            raise InputError(f"{path}: no file fits this pattern")
        return found
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder{_similar(place)}")
    if place.is_file():
        return [path]
    inside = [file for file in sorted(place.rglob("*")) if file.is_file() and _is_data(file.relative_to(place))]
    if not inside:
        raise InputError(f"{path}: no data in this folder; deft reads {', '.join(SUFFIXES)}")
    return [str(file) for file in inside]


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()


def _is_data(file: Path) -> bool:
    is_hidden = any(part.startswith((".", "_")) for part in file.parts)
    return not is_hidden and file.name not in _HUGGING_FACE_NOTES and kind(file.name) in SUFFIXES


def kind(name: str) -> str:
    """What a name says its rows are in, compression aside.

    >>> kind("a.jsonl.gz"), kind("A.JSON")
    ('.jsonl', '.json')
    """
    place = Path(name.lower())
    return Path(place.stem).suffix if place.suffix in COMPRESSED else place.suffix


def _similar(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist either"
    near = closest(file.name, (entry.name for entry in file.parent.iterdir()))
    return near and f"; {near}"


def _files(path: str) -> Iterator[Chunk]:
    for name in files(path):
        yield from _not_empty(_file(name), name)


def _file(path: str) -> Iterator[Chunk]:
    try:
        with Path(path).open("rb") as raw:
            head = raw.peek(_HEAD)
            found = next((kind for mark, kind in _TABLE_MARKS.items() if head.startswith(mark)), kind(path))
            if found not in TABLES:
                yield from _stream(raw, path, found)
                return
        _refuse_what_is_no_data(head, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head:
        yield from of(TABLES[found](path), path)


def _stream(raw: io.BufferedReader, source: str, kind: str) -> Iterator[Chunk]:
    stream = _decompressed(raw, source)
    head = stream.peek(_HEAD)
    _refuse_what_is_no_data(head, source)
    if any(head.startswith(mark) for mark in _TABLE_MARKS):
        raise InputError(f"{source}: a table inside a compressed file or a pipe; give the file itself, unpacked")
    if kind not in STREAMED and stream is not raw and head.lstrip()[:1] in (b"{", b"["):
        kind = ".json"
    if kind not in STREAMED:
        raise InputError(f"{source}: unknown kind of file; deft reads {', '.join(SUFFIXES)}, also as .gz or .zst")
    yield from STREAMED[kind](cast(BinaryIO, stream), source)


def _decompressed(raw: io.BufferedReader, source: str) -> io.BufferedReader:
    """What a stream holds behind gzip or zstd, or the stream itself."""
    head = raw.peek(_HEAD)
    if head.startswith(_GZIP):
        return io.BufferedReader(_Guarded(gzip.GzipFile(fileobj=raw), source))
    if head.startswith(_ZSTD):
        import pyarrow as pa

        return io.BufferedReader(_Guarded(pa.CompressedInputStream(raw, "zstd"), source))
    return raw


class _Guarded(io.RawIOBase):
    """A decompressor whose every error is an InputError: what follows a damaged place is not known."""

    def __init__(self, inner: Any, source: str) -> None:
        self._inner = inner
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            fix = "it is damaged or cut short: copy it again"
            raise InputError(f"{self._source}: cannot be decompressed ({error}); {fix}") from error
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _refuse_what_is_no_data(head: bytes, source: str) -> None:
    start = head[:_HEAD].lstrip().lower()
    for mark, what, fix in _NOT_DATA:
        if start.startswith(mark):
            raise InputError(f"{source}:1: {what}; {fix}")


def _stdin() -> io.BufferedReader:
    if sys.stdin.isatty():
        raise InputError("-: nothing is piped into this command; give a file, or pipe rows in")
    return cast(io.BufferedReader, sys.stdin.buffer)


def _not_empty(found: Iterable[Chunk], source: str) -> Iterator[Chunk]:
    """The chunks, or InputError where there is none."""
    is_empty = True
    for chunk in found:
        is_empty = False
        yield chunk
    if is_empty:
        raise InputError(f"{source}: the file is empty; name another")
