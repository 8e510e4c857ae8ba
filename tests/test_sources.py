"""Rows are read with the line they stand on, and what cannot be read is named by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deft.data import sources
from deft.errors import InputError, Problem
from deft.types import Row


def read(tmp_path: Path, name: str, text: str | bytes) -> list[Row | Problem]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(sources.read(str(path)))


def lines(found: list[Row | Problem]) -> list[int]:
    return [row.origin.line for row in found if isinstance(row, Row)]


def test_blank_lines_bom_and_crlf_do_not_move_the_line_numbers(tmp_path: Path) -> None:
    assert lines(read(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n')) == [1, 3]


def test_elements_of_an_array_know_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, "a.json", '[\n {"a": 1},\n\n "b", {"c":\n 1}\n]\n')
    assert lines(found) == [2, 4, 4]


def test_one_object_and_jsonl_named_json_are_rows(tmp_path: Path) -> None:
    assert lines(read(tmp_path, "a.json", '{\n "a": 1\n}\n')) == [1]
    assert lines(read(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')) == [1, 2]
    assert lines(read(tmp_path, "a.json", '["p", "o"]\n["q", "r"]\n')) == [1, 2]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "a.txt", "One.\r\n\r\nTwo.\n")
    assert isinstance(row, Row)
    assert row.value == "One.\n\nTwo.\n"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}", "this looks like Python's repr"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "one row a line"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, what: str) -> None:
    good = b'{"a": 1}'
    found = read(tmp_path, "a.jsonl", b"\n".join([good, good, line, good]))
    (problem,) = [row for row in found if isinstance(row, Problem)]
    assert problem.where.endswith("a.jsonl:3")
    assert what in str(problem)
    assert lines(found) == [1, 2, 4]


@pytest.mark.parametrize(
    ("text", "line"), [('[{"a": 1},\n {"a": }]', 2), ('[{"a": 1}\n {"a": 2}]', 2), ("[1,\n]", 1), ('{"a": 1}\n\n]', 3)]
)
def test_a_broken_document_is_named_by_its_line(tmp_path: Path, text: str, line: int) -> None:
    problems = [row for row in read(tmp_path, "a.json", text) if isinstance(row, Problem)]
    assert [problem.where.rpartition(":")[2] for problem in problems] == [str(line)]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", b"\x1f\x8b\x08", "gzip"),
        ("a.jsonl", b"<!DOCTYPE html>", "HTML"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.xlsx", b"x", "unknown kind of file"),
    ],
)
def test_what_is_no_data_is_said(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(InputError, match=what):
        read(tmp_path, name, content)


def test_a_missing_file_names_the_closest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("x")
    with pytest.raises(InputError, match=r"did you mean train\.jsonl"):
        list(sources.read(str(tmp_path / "trian.jsonl")))
