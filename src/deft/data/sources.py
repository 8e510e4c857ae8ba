"""A file of rows -> rows with their origin. What cannot be read becomes a Problem that names its line.

JSONL (.jsonl, .ndjson): a row a line. JSON (.json): an array of rows, one object, or JSONL under another name.
Text (.txt): the whole file is one document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deft.errors import InputError, Problem
from deft.types import Origin, Row

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text"}

_NOT_DATA = (
    (b"<!doctype html", "is an HTML page, not data", "download the file itself"),
    (b"<html", "is an HTML page, not data", "download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data", "run `git lfs pull`"),
    (b"\x1f\x8b", "is compressed with gzip", "decompress it first"),
    (b"PAR1", "is a Parquet file", "convert it to JSONL first"),
    (b"\xff\xfe", "is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text", "save it as UTF-8"),
)


def read(path: str) -> Iterator[Row | Problem]:
    """The rows of a file in their order, with a Problem in place of each that cannot be read.

    Raises InputError if the file is missing, is no file, has an unknown suffix, cannot be read or is empty.
    """
    content = _bytes(path)
    readers = {"jsonl": _jsonl, "json": _json, "text": _text}
    yield from readers[SUFFIXES[Path(path).suffix.lower()]](path, content)


def from_values(values: Iterable[Any], source: str = "rows") -> list[Row]:
    """Rows that a caller already holds.

    >>> from_values(["a", "b"])[1].origin
    Origin(source='rows', line=2)
    """
    return [Row(Origin(source, line), value) for line, value in enumerate(values, start=1)]


def check(path: str) -> None:
    """Raises InputError if a file of rows cannot be at `path`: the cheap part of `read`."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"{path}: no such file{_similar(file)}")
    if not file.is_file():
        raise InputError(f"{path}: not a file; name a file ({', '.join(SUFFIXES)})")
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of file; deft reads {', '.join(SUFFIXES)}")


def _bytes(path: str) -> bytes:
    check(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    head = content[:64].lstrip().lower()
    for mark, what, fix in _NOT_DATA:
        if head.startswith(mark.lower()):
            raise InputError(f"{path}:1: {what}; {fix}")
    if not content.strip():
        raise InputError(f"{path}: the file is empty")
    return content.removeprefix(b"\xef\xbb\xbf")


def _similar(file: Path) -> str:
    from difflib import get_close_matches

    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist either"
    near = get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _jsonl(path: str, content: bytes) -> Iterator[Row | Problem]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield _line(Origin(path, number), line)


def _line(origin: Origin, line: bytes) -> Row | Problem:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(str(origin), f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")
    try:
        return Row(origin, _checked(_DECODER.decode(text), text))
    except json.JSONDecodeError as error:
        return Problem(str(origin), f"not valid JSON: {error.msg} at column {error.colno}", _hint(text, error))
    except (ValueError, RecursionError) as error:
        return Problem(str(origin), *_reason(error))


def _json(path: str, content: bytes) -> Iterator[Row | Problem]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Problem(f"{path}:{line}", "a byte is not UTF-8", "save the file as UTF-8")
        return
    if _is_jsonl(text):
        yield from _jsonl(path, content)
        return
    yield from _document(path, text)


def _is_jsonl(text: str) -> bool:
    """True where the first line is a whole value and more values follow: JSONL under the name .json."""
    first, _, rest = text.lstrip().partition("\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _document(path: str, text: str) -> Iterator[Row | Problem]:
    """The elements of an array, each at its own line; anything else is one row."""
    at, line = _skip(text, 0), 1
    line += text.count("\n", 0, at)
    is_array = text[at] == "["
    position = _skip(text, at + 1) if is_array else at
    while not (is_array and text[position : position + 1] == "]"):
        line += text.count("\n", at, position)
        at = position
        try:
            value, end = _DECODER.raw_decode(text, position)
            yield Row(Origin(path, line), _checked(value, text[position:end]))
            position = _skip(text, end)
            if not is_array:
                break
            position = _after_comma(text, position)
        except json.JSONDecodeError as error:
            yield Problem(f"{path}:{error.lineno}", f"not valid JSON: {error.msg} at column {error.colno}")
            return
        except (ValueError, RecursionError) as error:
            yield Problem(f"{path}:{line}", *_reason(error))
            return
    rest = _skip(text, position + is_array)
    if rest < len(text):
        yield Problem(f"{path}:{text.count(chr(10), 0, rest) + 1}", "more text after the end of the JSON document")


def _after_comma(text: str, position: int) -> int:
    """The start of the next element, or of the closing bracket; raises JSONDecodeError elsewhere."""
    if text[position : position + 1] == "]":
        return position
    if text[position : position + 1] != ",":
        raise json.JSONDecodeError("expected ',' or ']'", text, position)
    following = _skip(text, position + 1)
    if text[following : following + 1] == "]":
        raise json.JSONDecodeError("a comma before ']'", text, position)
    return following


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _text(path: str, content: bytes) -> Iterator[Row | Problem]:
    try:
        yield Row(Origin(path, 1), content.decode("utf-8").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Problem(f"{path}:{line}", "a byte is not UTF-8", "save the file as UTF-8")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def _checked(value: Any, text: str) -> Any:
    """`value`, or ValueError where its text holds half a character (a lone surrogate escape)."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("a lone surrogate escape (\\ud800 to \\udfff) is not a character") from error
    return value


def _reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, RecursionError):
        return "nested too deeply", "flatten the row"
    return str(error), "write the row with a JSON library"


def _hint(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return "one row a line"
    if text.strip() in "[]{}":
        return "this looks like one JSON document: name the file .json"
    if "'" in text[error.pos : error.pos + 1] or "True" in text or "None" in text:
        return "this looks like Python's repr: write it with json.dumps"
    return "write the row with a JSON library"
