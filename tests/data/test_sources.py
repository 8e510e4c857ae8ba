"""Rows are read with the line they stand on, and what cannot be read is named by it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft.core.errors import InputError, Problem
from deft.core.types import Row
from deft.data import shapes, sources
from deft.data.format import Choices


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
        ("a.jsonl", b"\x1f\x8b\x08", "cut short"),
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
    with pytest.raises(InputError, match=r"did you mean 'train\.jsonl'"):
        list(sources.read(str(tmp_path / "trian.jsonl")))


def written(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def values(path: str, **more: Any) -> list[Any]:
    return [row.value for row in sources.read(path, **more) if isinstance(row, Row)]


ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": 'Größe\n"m", ok', "completion": "5"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv(delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def as_arrow(new: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": as_csv(),
    "semicolons.csv": as_csv(";"),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(),
    "parquet.jsonl": as_parquet(),
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "a.feather": as_arrow(pa.ipc.new_file),
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.csv.gz": gzip.compress(as_csv()),
    "gzip.jsonl": gzip.compress(JSONL),
    "a.jsonl.zst": pa.compress(JSONL, "zstd", asbytes=True),
    "frames.zst": pa.compress(JSONL[:20], "zstd", asbytes=True) + pa.compress(JSONL[20:], "zstd", asbytes=True),
    "zstd.json": pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_by_suffix_or_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, KINDS[name])
    assert values(path) == ROWS
    assert [row.origin.source for row in sources.read(path) if isinstance(row, Row)] == [path, path]


def test_records_know_the_line_they_begin_on(tmp_path: Path) -> None:
    assert lines(read(tmp_path, "a.csv", b'prompt,completion\n"a\nb",c\n\nd,e\n')) == [2, 5]
    assert lines(read(tmp_path, "a.parquet", as_parquet())) == [1, 2]


def test_rows_on_one_line_of_an_array_are_told_apart(tmp_path: Path) -> None:
    found = read(tmp_path, "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}]')
    assert [str(row.origin).rpartition("a.json:")[2] for row in found if isinstance(row, Row)] == [
        "1",
        "1 (row 2)",
        "2",
    ]


def test_nulls_that_a_table_had_to_put_into_structs_are_taken_out(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    table = pa.Table.from_pylist([{"messages": [{"role": "user", "content": "Hi"}, call], "tools": None}])
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = values(str(tmp_path / "a.parquet"))
    assert row == {"messages": [{"role": "user", "content": "Hi"}, {k: v for k, v in call.items() if v}], "tools": None}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (b"a,b,c", "3 fields, the header has 2"),
        (b"a", "1 fields, the header has 2"),
        (b'"a"x,b', "not valid CSV"),
        (b"a,\xff", "completion: a byte is not UTF-8"),
    ],
)
def test_a_bad_record_of_a_csv_is_named_and_the_others_are_read(tmp_path: Path, record: bytes, what: str) -> None:
    found = read(tmp_path, "a.csv", b"\n".join([b"prompt,completion", b"p,q", record, b"r,s"]))
    (problem,) = [row for row in found if isinstance(row, Problem)]
    assert problem.where.endswith("a.csv:3")
    assert what in str(problem)
    assert lines(found) == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"a,a\n1,2\n", "two columns named 'a'"),
        ("a.csv", b"a,\n1,2\n", "a column without a name"),
        ("a.csv", b"a,b\n", "is empty"),
        ("a.parquet", as_parquet()[:-9], "not a whole Parquet file"),
        ("a.arrow", as_arrow(pa.ipc.new_file)[:-40], "not a whole Arrow file"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", JSONL, "not a whole Parquet file"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], "cut short"),
        ("a.jsonl.zst", pa.compress(JSONL, "zstd", asbytes=True)[:-4], "cut short"),
        ("a.gz", gzip.compress(as_parquet(), mtime=0), "a table inside a compressed file"),
        ("a.gz", gzip.compress(b"words", mtime=0), "unknown kind of file"),
        ("a.jsonl", b"PK\x03\x04", "zip archive"),
        ("a.jsonl", b"\x80\x04\x95", "pickle, which can run code"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(InputError, match=what) as error:
        read(tmp_path, name, content)
    assert name in str(error.value)


def test_a_folder_and_a_glob_are_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.csv", "README.md", ".hidden.jsonl", "dataset_info.json"):
        content = {"a.jsonl.gz": gzip.compress(JSONL), "sub/c.csv": as_csv()}.get(name, JSONL)
        written(tmp_path / name, content)
    assert [Path(name).name for name in sources.files(str(tmp_path))] == ["a.jsonl.gz", "b.jsonl", "c.csv"]
    assert values(str(tmp_path)) == ROWS * 3
    assert values(str(tmp_path / "*.jsonl")) == ROWS
    assert values(str(tmp_path / "**" / "*.csv")) == ROWS
    with pytest.raises(InputError, match="no file fits"):
        values(str(tmp_path / "*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data in this folder"):
        values(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_rows_may_be_piped_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(KINDS[name]))))
    found = list(sources.read("-"))
    assert [row.value for row in found if isinstance(row, Row)] == ROWS
    assert {row.origin.source for row in found if isinstance(row, Row)} == {"stdin"}


def test_a_hub_data_set_is_streamed_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> list[Any]:
        calls.append((name, subset, split, streaming))
        if split == "no":
            raise ValueError("Bad split: no")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert values("openai/gsm8k", subset="main") == ROWS
    assert calls == [("openai/gsm8k", "main", "train", True)]
    with pytest.raises(InputError, match=r"openai/gsm8k: cannot be read from the Hub, split 'no': Bad split"):
        values("openai/gsm8k", split="no")


def test_without_datasets_a_hub_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"no such file or folder; .*pip install 'deft-sft\[hub\]'"):
        values("openai/gsm8k")


def test_a_file_is_read_as_its_rows_are_asked_for(tmp_path: Path) -> None:
    """A damaged end is met only by who reads that far: nothing reads ahead to the end."""
    content = json.dumps(ROWS[0]).encode() + b"\n"
    for name, whole in (("a.jsonl", content * 5000), ("a.csv", b"a,b\n" + b"1,2\n" * 5000)):
        path = written(tmp_path / f"{name}.gz", gzip.compress(whole, 0)[:-100])
        assert isinstance(next(iter(sources.read(path))), Row)
        with pytest.raises(InputError, match="cut short"):
            list(sources.read(path))


def test_memory_is_flat_in_rows(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p" * 500, "completion": "c" * 500}).encode() + b"\n"
    peaks = []
    for count in (1_000, 20_000):
        path = written(tmp_path / f"{count}.jsonl", row * count)
        tracemalloc.start()
        assert sum(1 for _ in shapes.Reader("x", "auto", Choices()).each(sources.read(path))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000
