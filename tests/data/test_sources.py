"""Rows are read with the line they stand on, and what cannot be read is named by it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
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
from deft.data.sources import Part


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
        (b'{"a": nan}', "not valid JSON"),
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


BROKEN = {
    "a value missing": (b'[{"a": 1},\n {"a": }]', 2),
    "a comma missing": (b'[{"a": 1}\n {"a": 2}]', 2),
    "a comma too many": (b"[1,\n]", 1),
    "a comma too many in an object": (b'[{"a": 1},\n {"a": 1,},\n {"a": 2}]', 2),
    "an array that ends early": (b'[{"a": 1},\n {"a": 2},', 2),
    "text after the end": (b'[\n{"a": 1}\n]\nand more', 4),
    "two arrays": (b'[\n{"a": 1}\n]\n[\n{"a": 2}\n]', 4),
    "two documents": (b'{\n "a": 1\n}\n{\n "a": 2\n}', 4),
    "a byte that is not UTF-8": (b'[{"a": 1},\n {"a": "\xff"}]', 2),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_document_that_breaks_is_refused_whole_as_its_rest_cannot_be_counted(tmp_path: Path, case: str) -> None:
    content, line = BROKEN[case]
    with pytest.raises(InputError) as error:
        read(tmp_path, "a.json", content)
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}:{line}: ")


@pytest.mark.parametrize(
    ("element", "what"),
    [
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
    ],
)
def test_an_element_that_is_json_but_no_sound_row_is_one_row_and_the_others_are_read(
    tmp_path: Path, element: bytes, what: str
) -> None:
    found = read(tmp_path, "a.json", b'[{"a": 1},\n' + element + b',\n{"a": 3}]')
    (problem,) = [row for row in found if isinstance(row, Problem)]
    assert str(problem).startswith(f"{tmp_path / 'a.json'}:2: ")
    assert what in str(problem)
    assert lines(found) == [1, 3]


@pytest.mark.parametrize("record", [b'"open,b\nc,d\ne,f', b'"open,b\nc,"d\n'])
def test_a_quote_that_takes_other_records_with_it_is_no_single_bad_row(tmp_path: Path, record: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.csv:3: not valid CSV.*; the record reaches to line [45]"):
        read(tmp_path, "a.csv", b"prompt,completion\np,q\n" + record)


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


def values(path: str, **part: Any) -> list[Any]:
    return [row.value for row in sources.read(path, Part(**part)) if isinstance(row, Row)]


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
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.jsonl.xz": lzma.compress(JSONL),
    "members.bz2": bz2.compress(JSONL[:20]) + bz2.compress(JSONL[20:]),
    "members.xz": lzma.compress(JSONL[:20]) + b"\0" * 8 + lzma.compress(JSONL[20:]),
    "xz.jsonl": lzma.compress(JSONL),
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
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-4], "cut short"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-4], "cut short"),
        ("tail.jsonl.gz", gzip.compress(JSONL, mtime=0) + JSONL, "damaged"),
        ("tail.jsonl.zst", pa.compress(JSONL, "zstd", asbytes=True) + JSONL, "damaged"),
        ("tail.jsonl.bz2", bz2.compress(JSONL) + JSONL, "damaged"),
        ("tail.jsonl.xz", lzma.compress(JSONL) + JSONL, "damaged"),
        ("two.arrow", as_arrow(pa.ipc.new_stream) * 2, "more follows after its end"),
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
    assert [Path(name).name for name in sources.listing(str(tmp_path)).files] == ["a.jsonl.gz", "b.jsonl", "c.csv"]
    assert values(str(tmp_path)) == ROWS * 3
    assert values(str(tmp_path / "*.jsonl")) == ROWS
    assert values(str(tmp_path / "**" / "*.csv")) == ROWS
    with pytest.raises(InputError, match="no file fits"):
        values(str(tmp_path / "*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data in this folder"):
        values(str(tmp_path / "empty"))


def test_what_a_folder_holds_is_read_or_named(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    written(elsewhere / "deep" / "b.jsonl", JSONL)
    read_there = ("a.jsonl", "c.jsonl.bz2", "d.jsonl.xz", "f.jsonl.1", "linked/deep/b.jsonl", "sub/e.jsonl")
    named = ("_held.jsonl", "README.txt", "f.jsonl.bak", "gone.jsonl", "g.zip")
    unspoken = ("README.md", "LICENSE", "_SUCCESS", ".x.jsonl", ".git/a.jsonl", "dataset_info.json", "a.jsonl.lock")
    for name in {*read_there, *named, *unspoken} - {"linked/deep/b.jsonl", "gone.jsonl"}:
        written(place / name, KINDS.get(name, JSONL))
    (place / "linked").symlink_to(elsewhere)
    (place / "gone.jsonl").symlink_to(place / "nowhere")
    (place / "again").symlink_to(place / "sub")
    (elsewhere / "round").symlink_to(place)
    found = sources.listing(str(place))
    assert [str(Path(name).relative_to(place)) for name in found.files] == [*read_there]
    assert {str(Path(name).relative_to(place)) for name in found.unread} == {*named}
    assert values(str(place)) == ROWS * len(read_there)


def test_a_folder_that_a_glob_meets_is_named_unless_files_of_it_fit(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", JSONL)
    written(tmp_path / "sub" / "b.jsonl", JSONL)
    assert sources.listing(str(tmp_path / "*")).unread == (str(tmp_path / "sub"),)
    assert sources.listing(str(tmp_path / "**")).unread == ()
    assert len(values(str(tmp_path / "**"))) == 2 * len(ROWS)


TWICE = {
    "columns": pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    "fields of a struct in a list": pa.table(
        {
            "messages": pa.ListArray.from_arrays(
                [0, 1], pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
            )
        }
    ),
}


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("where", TWICE)
def test_a_table_with_a_name_twice_is_refused_as_a_row_would_keep_one_of_them(
    tmp_path: Path, where: str, kind: str
) -> None:
    table, sink = TWICE[where], pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=r"a\.arrow:1: two columns named '(messages\.)?text'; rename or drop one"):
        read(tmp_path, "a.arrow", sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    "column",
    [pa.array([10**7, 1], pa.date32()), pa.array([1, 2], pa.timestamp("ns")), pa.array([1, 2**62], pa.timestamp("us"))],
    ids=["date", "nanoseconds", "timestamp"],
)
def test_times_that_python_has_no_values_for_are_text(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "times.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "when": column}), path)
    rows = [row.value for row in sources.read(str(path)) if isinstance(row, Row)]
    assert [row["text"] for row in rows] == ["a", "b"]
    assert all(isinstance(row["when"], str) for row in rows)


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
