"""A source by name -> its rows with their origin. What cannot be read becomes a Problem that names its line.

A name is a file, a folder, a glob, `-` for standard input, or the id of a Hub data set. The suffix says what a file is
(JSONL, JSON, CSV, TSV, Parquet, Arrow, text); gzip, zstd, bzip2, xz, Parquet and Arrow are known by their first bytes,
whatever the name. Rows are read as they are asked for.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from deft.core.errors import InputError, Problem
from deft.core.registry import closest
from deft.core.types import Origin, Row
from deft.data import folders
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
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
SUFFIXES = (*STREAMED, *TABLES)

_TABLE_MARKS = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MEMBERS: dict[bytes, Callable[[], Any]] = {b"BZh": bz2.BZ2Decompressor, b"\xfd7zXZ\x00": lzma.LZMADecompressor}
_NOT_DATA = (
    (b"<!doctype html", "is an HTML page, not data", "download the file itself"),
    (b"<html", "is an HTML page, not data", "download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data", "run `git lfs pull`"),
    (b"\xff\xfe", "is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text", "save it as UTF-8"),
    (b"pk\x03\x04", "is a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
    (b"%pdf", "is a PDF", "take the text out first"),
    (b"sqlite format 3", "is a database", "export its rows as JSONL"),
    (b"fea1", "is a Feather file of version 1", "write it with pyarrow.feather.write_feather again"),
    (b"\x80\x04\x95", "is a Python pickle, which can run code", "write the rows as JSONL"),
    (b"\x80\x05\x95", "is a Python pickle, which can run code", "write the rows as JSONL"),
)
_HUGGING_FACE_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_NOTES = ("readme", "license", "licence", "notice", "citation", "changelog")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HEAD, _BLOCK = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a data set that is read, of the Hub or in a folder.

    split     of the Hub's it is train by default; of a folder's all that it holds
    is_named  whether the user named the split: then the source must have it
    """

    subset: str | None = None
    split: str | None = None
    is_named: bool = False


def read(path: str, part: Part = Part()) -> Iterator[Row | Problem]:
    """The rows of a source in their order, files sorted by name; a Problem in place of each that cannot be read.

    Raises InputError where there is no such source, or a file of it is of an unknown kind, damaged or empty.
    """
    return chain.from_iterable(chunk.read() for chunk in chunks(path, part))


def chunks(path: str, part: Part = Part()) -> Iterator[Chunk]:
    """What `read` reads, in chunks."""
    if part.subset is not None and not is_on_the_hub(path) and not Path(path).is_dir():
        raise InputError(f"{path}: subset {part.subset!r} is for data sets of the Hub, and this is none; leave it out")
    if path == STDIN:
        return _not_empty(_stream(_stdin(), PIPED, ".json"), PIPED)
    if is_on_the_hub(path):
        return _not_empty(of(hub.read(path, part.subset, part.split or "train"), path), path)
    return _files(path, part)


def is_on_the_hub(path: str) -> bool:
    """Whether a name is that of a Hub data set, as nothing on this disk is called so.

    >>> is_on_the_hub("openai/gsm8k"), is_on_the_hub("data/train.jsonl"), is_on_the_hub("./data")
    (True, False, False)
    """
    is_file = path.lower().endswith((*SUFFIXES, *COMPRESSED))
    return not is_file and _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def from_values(values: Iterable[Any], source: str = "rows") -> list[Row]:
    """Rows that a caller already holds.

    >>> from_values(["a", "b"])[1].origin
    Origin(source='rows', line=2, item=0)
    """
    return [Row(Origin(source, line), value) for line, value in enumerate(values, start=1)]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a source, sorted; `unread` lies beside them and is not read, notes and other splits apart."""

    files: tuple[str, ...]
    unread: tuple[str, ...] = ()


def has_splits(path: str) -> bool:
    """Whether a source is a data set with splits: of the Hub, or in a folder."""
    return is_on_the_hub(path) or bool(splits(path))


def splits(path: str, subset: str | None = None) -> dict[str, list[Path]]:
    """The files of each split of a folder; none where it has no splits, or is no folder."""
    place = Path(path)
    return folders.splits(place, _data_in(place), subset) if place.is_dir() and not _is_glob(path) else {}


def listing(path: str, part: Part = Part()) -> Listing:
    """The files of a file, folder or glob, and what is not read of it. Raises InputError if there is no file.

    In a folder and below it, linked folders too, all files with a suffix that deft reads, or those of one split where
    it has several; hidden ones, READMEs and Hugging Face's notes are no data.
    """
    if _is_glob(path):
        return _of_glob(path)
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder{_similar(place)}")
    return Listing((path,)) if place.is_file() else _of_folder(place, part)


def _of_glob(path: str) -> Listing:
    met = sorted(glob.glob(path, recursive=True))
    found = [name for name in met if Path(name).is_file()]
    if not found:
        raise InputError(f"{path}: no file fits this pattern")
    passed = [name for name in met if not any(file == name or Path(name) in Path(file).parents for file in found)]
    return Listing(tuple(found), tuple(passed))


def _of_folder(place: Path, part: Part) -> Listing:
    data = _data_in(place)
    unread = sorted(file for file in set(_below(place)) - set(data) if not _is_note(file, file.relative_to(place)))
    if not data:
        there = f", {len(unread)} others lie there, {unread[0].name} first" if unread else ""
        raise InputError(f"{place}: no data in this folder{there}; deft reads {', '.join(SUFFIXES)}")
    by_split = folders.splits(place, data, part.subset)
    read = folders.chosen(place, by_split, part.split, part.is_named) if by_split else data
    return Listing(tuple(map(str, read)), tuple(map(str, unread)))


def _data_in(place: Path) -> list[Path]:
    return sorted(file for file in _below(place) if file.is_file() and _is_data(file, file.relative_to(place)))


def _below(place: Path) -> Iterator[Path]:
    """What lies below a folder, hidden folders apart; a linked folder is gone into where no other way leads there."""
    seen, inside = set[Path](), place.resolve()
    for folder, inner, names in os.walk(place, onerror=_cannot_be_listed, followlinks=True):
        real = Path(folder).resolve()
        is_reached_otherwise = Path(folder).is_symlink() and folder != str(place) and real.is_relative_to(inside)
        if real in seen or is_reached_otherwise:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _cannot_be_listed(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()


def _is_data(file: Path, inner: Path) -> bool:
    """Whether a file is data; `inner` is its path below the folder that was named."""
    is_hidden = any(part.startswith((".", "_")) for part in inner.parts)
    return not is_hidden and kind(file.name) in SUFFIXES and not _is_named_as_note(file)


def _is_note(file: Path, inner: Path) -> bool:
    """Whether nobody looks for rows in it: what is hidden, of Hugging Face or Spark, or to be read by people."""
    is_hidden = any(part.startswith(".") for part in inner.parts)
    has_rows, is_named = kind(file.name) in SUFFIXES, _is_named_as_note(file)
    return is_hidden or _is_of_datasets(file) or (not has_rows and (file.name[0] == "_" or is_named))


def _is_named_as_note(file: Path) -> bool:
    name = file.name.lower()
    is_to_be_read = name.partition(".")[0] in _NOTES or name.endswith((".md", ".lock"))
    return is_to_be_read or _is_of_datasets(file)


def _is_of_datasets(file: Path) -> bool:
    """What the library `datasets` writes beside its data."""
    is_cached = file.match("cache-*.arrow") and file.with_name("state.json").exists()
    return is_cached or file.name.lower() in _HUGGING_FACE_NOTES


def kind(name: str) -> str:
    """What a name says its rows are in; compression and the number of a part are passed over.

    >>> kind("a.jsonl.gz"), kind("A.JSON"), kind("a.jsonl.2")
    ('.jsonl', '.json', '.jsonl')
    """
    place = Path(name.lower())
    is_passed_over = place.suffix in COMPRESSED or place.suffix[1:].isdigit()
    return kind(place.stem) if is_passed_over else place.suffix


def _similar(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist either"
    near = closest(file.name, (entry.name for entry in file.parent.iterdir()))
    return near and f"; {near}"


def _files(path: str, part: Part) -> Iterator[Chunk]:
    for name in listing(path, part).files:
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
        raise InputError(
            f"{source}: unknown kind of file; deft reads {', '.join(SUFFIXES)}, also as .gz, .zst, .bz2 or .xz"
        )
    yield from STREAMED[kind](cast(BinaryIO, stream), source)


def _decompressed(raw: io.BufferedReader, source: str) -> io.BufferedReader:
    """What a stream holds behind its compression, or the stream itself."""
    head = raw.peek(_HEAD)
    if head.startswith(_GZIP):
        return io.BufferedReader(_Guarded(gzip.GzipFile(fileobj=raw), source))
    if head.startswith(_ZSTD):
        import pyarrow as pa

        return io.BufferedReader(_Guarded(pa.CompressedInputStream(raw, "zstd"), source))
    for mark, make in _MEMBERS.items():
        if head.startswith(mark):
            return io.BufferedReader(_Guarded(_Members(raw, make), source))
    return raw


class _Members:
    """Compressed streams end to end, as bzip2 and xz write them: the standard library's own readers end in silence
    before the first that is none."""

    def __init__(self, raw: BinaryIO, make: Callable[[], Any]) -> None:
        self._raw, self._make, self._member = raw, make, make()

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._member.eof:
                data = (self._member.unused_data or self._raw.read(_BLOCK)).lstrip(b"\0")  # xz may pad
                if not data:
                    return b""
                self._member = self._make()
            elif self._member.needs_input and not (data := self._raw.read(_BLOCK)):
                raise EOFError("it ends before its end mark")
            if found := self._member.decompress(data, size):
                return bytes(found)


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
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
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
