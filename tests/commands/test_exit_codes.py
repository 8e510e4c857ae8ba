"""What the command line ends with, and what it says."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from deft.commands import cli
from deft.core import crash, hardware, versions
from deft.core.errors import (
    DamagedError,
    DeftError,
    DiskError,
    InputError,
    MemoryShort,
    NumbersError,
    Problem,
    Problems,
)
from deft.tracking import console as display

CODES = {InputError: 2, DamagedError: 3, DiskError: 4, NumbersError: 5, MemoryShort: 7, DeftError: 70}


def command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """The exit code of a command that ends with an error."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["deft", "train", "model=m", "hub_token=sesame"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.mark.parametrize("kind", CODES)
def test_each_kind_of_error_has_its_code_and_one_message(
    kind: type[DeftError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, kind("a.jsonl: wrong; https://me:pw@host")) == CODES[kind] == kind.exit_code
    assert capsys.readouterr().err == "deft: a.jsonl: wrong; https://(hidden)@host\n"


def test_a_bug_of_ours_leaves_a_report_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "open-sesame-now")
    assert command(monkeypatch, KeyError("open-sesame-now")) == 70
    said = capsys.readouterr().err
    (report,) = tmp_path.glob("deft-crash-*.txt")
    assert re.fullmatch(rf"deft: this is a bug in deft \(KeyError: .*\); {report.name} has what .*\n", said)
    text = report.read_text()
    for part in ("Traceback", "torch ", "model=m", "KeyError"):
        assert part in text
    for secret in ("sesame", "open"):
        assert secret not in text
        assert secret not in said


def test_the_report_lies_in_the_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deft"])
    (tmp_path / "run").mkdir()
    arguments = ["model=m", "data.train=d", f"output={tmp_path / 'run'}"]
    assert cli._run_folder(arguments) == tmp_path / "run"
    assert cli._run_folder(["model=m"]) == Path(".")
    assert str(tmp_path / "run") in crash.report(ValueError("x"), tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
    ],
)
def test_every_way_to_run_out_of_memory_is_one_error(error: Exception) -> None:
    with pytest.raises(MemoryShort, match="out of memory: take less"), hardware.within_memory(lambda: "take less"):
        raise error


def test_another_error_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"), hardware.within_memory(lambda: "take less"):
        raise RuntimeError("shapes differ")


def test_old_releases_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.check_min_versions()
    monkeypatch.setattr(versions, "_found", {"torch": "2.10.1+cu128", "transformers": "5.12.0", "jinja2": None}.get)
    with pytest.raises(
        InputError, match=r"torch 2\.10\.1\+cu128 \(at least 2\.11\), jinja2 missing \(at least 3\.1\.6\)"
    ):
        versions.check_min_versions()


def test_the_minimal_versions_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, least in versions.MIN_VERSIONS.items():
        assert re.search(rf'"{name}>={re.escape(least)}[,"]', text), name


def test_the_name_of_a_file_is_neither_a_setting_nor_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = 'data.format="os:system" #.jsonl'
    for name in (evil, "--rows=1", "-x.jsonl", "-", "a=1.jsonl", "model=m"):
        (tmp_path / name).touch()
    for name in (evil, "--rows=1", "-x.jsonl", "-", "model=m"):
        monkeypatch.setattr(sys, "argv", ["deft", "show", "a.jsonl", name])
        monkeypatch.setattr(cli, "app", lambda: pytest.fail("it was run"))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2, name
    made = cli._config(["a=1.jsonl", f"./{evil}", "model=n"])
    assert [source.path for source in made.data.train] == ["a=1.jsonl", f"./{evil}"]
    assert (made.model, made.data.format) == ("n", "auto")


def test_no_stream_ends_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An ascii console, one that is closed, one whose disk is full, and none at all."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    ascii_console, closed = io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()
    closed.close()
    for stream in (ascii_console, closed, Full(), None):
        display.say(Console(file=display.lasting(stream), width=80), "日本 é \x1b]0;title\x07")
    assert ascii_console.buffer.getvalue() == b"\\u65e5\\u672c \\xe9 \\x1b]0;title\\x07\n"


def test_a_closed_stream_s_number_is_not_given_to_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from deft.core import signals; signals.open_streams(); print('lost')\n"
        f"print('kept', file=open({str(tmp_path / 'file')!r}, 'w')); import os; os.write(1, b'x'); os.write(2, b'y')"
    )
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&- <&-', sys.executable, code], env={**os.environ})
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "kept\n"


def test_what_strangers_say_stays_one_line_and_acts_on_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]0;title\x07\nFAKE: all is well.jsonl"
    command(monkeypatch, Problems("the data cannot be read", [Problem(name, "broken\r")]))
    said = capsys.readouterr().err
    assert said.splitlines()[1] == "  a\\x1b]0;title\\x07\\nFAKE: all is well.jsonl: broken\\r"
