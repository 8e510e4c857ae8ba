"""The shape of the source: thirteen rooms, one class a name, short functions, and the words that are not ours."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mutations

import deft

SOURCE = Path(deft.__file__).parent
ROOMS = {
    "core",
    "distributed",
    "data",
    "encoding",
    "dataset",
    "plan",
    "model",
    "training",
    "evaluation",
    "export",
    "tracking",
    "run",
    "commands",
}
LONGEST_FUNCTION = 50
RIDDLES = re.compile(r"so many|nobody waits|what is gone")
Definition = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[tuple[str, str]]:
    """Path below the package -> source text."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8")


def test_the_package_has_thirteen_rooms_and_two_files_and_says_that_it_is_typed() -> None:
    there = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert there == ROOMS | {"__init__.py", "__main__.py", "py.typed"}


def test_init_files_of_rooms_are_empty() -> None:
    full = [name for name, text in modules() if name.endswith("/__init__.py") and text.strip()]
    assert full == []


def test_no_class_has_another_classs_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(name)
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_function_is_longer_than_fifty_lines() -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, text in modules()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Definition)
    }
    assert len(lengths) > 1000
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_no_riddles_stand_in_the_source() -> None:
    found = [f"{name}: {match[0]}" for name, text in modules() for match in RIDDLES.finditer(text)]
    assert found == []


def test_every_protected_line_is_found() -> None:
    assert [str(each) for each in mutations.TABLE if not each.is_found] == []
