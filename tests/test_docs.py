"""docs/: what they name is there, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deft
from deft.data import format as formats

DOCS = Path(__file__).parents[1] / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
SOURCE = Path(deft.__file__).parent


def test_every_room_and_module_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", ARCHITECTURE)
    assert len(named) > 30
    gone = [path for path in named if not (SOURCE / path).exists() and not (DOCS.parent / path).exists()]
    assert gone == []


def test_every_room_has_its_line_with_where_to_begin() -> None:
    lines = re.findall(r"^\| `([a-z]+)/` \| [^|]+ \| ([^|]+) \|$", ARCHITECTURE, re.MULTILINE)
    assert {room for room, _ in lines} == {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    for room, begin in lines:
        assert all((SOURCE / room / name).exists() for name in re.findall(r"`([^`]+)`", begin)), room


def test_the_first_change_is_a_format_that_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL)
    path = tmp_path / "riddle_guess.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("riddle_guess", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tried = doctest.testmod(module)
    assert (tried.failed, tried.attempted) == (0, 3)
    (keys,) = module.KEYS
    readers = [each.name for each in formats.reading(frozenset(keys))]
    assert readers in ([], ["riddle_guess"]), "another format reads the example's rows: take another example"
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", DOCS.parent / "pyproject.toml", path], capture_output=True
    )
    assert checked.returncode == 0, checked.stdout.decode()


def test_the_tables_of_scaling_are_what_the_formulas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS.parent / "examples"))
    tables = importlib.import_module("scaling_tables")
    page = tables.DOCS.read_text(encoding="utf-8")
    assert page.count("| Qwen3-32B |") == 3
    assert tables.written(page) == page, "write them again: python examples/scaling_tables.py"
