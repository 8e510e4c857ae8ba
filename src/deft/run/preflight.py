"""What is checked before anything heavy: all of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from deft.core import files
from deft.core.errors import (
    DiskError,
    InputError,
    Problem,
    Problems,
)


def collect(checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of all checks in order; what they object to comes in one error.

    >>> collect([lambda: 1, lambda: 2])
    [1, 2]
    """
    results: list[Any] = []
    problems: list[Problem] = []
    more = 0
    for check in checks:
        try:
            results.append(check())
        except Problems as error:
            problems += error.problems
            more += error.more
        except InputError as error:
            where, _, what = str(error).partition(": ")
            problems.append(Problem(where, what))
    if problems:
        raise Problems("this run cannot start:", problems, more)
    return results


RUN_FILES = frozenset(("config.yaml", "manifest.json", "ledger.json", "report.html", "checkpoints", "final")) | {
    f"{log}.jsonl" for log in ("metrics", "eval", "samples")
}
"""What a run writes into its folder."""


def run_folder(output: str | None) -> Path:
    """The folder a run will write to, `runs/<date-time>` where none is named. InputError where it can be no path."""
    if output and "\0" in output:
        raise InputError(f"output: {output!r} is not a path")
    folder = Path(output or datetime.now().strftime("runs/%Y-%m-%d-%H%M%S"))
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return folder
    except OSError as error:
        raise InputError(f"{str(folder)[:80]}: {error.strerror}; name another folder with output=") from error
    return folder


def output_folder(output: str | None, may_go_on: bool = False) -> Path:
    """The folder a run will write to; it need not be there yet.

    Raises InputError if it holds anything (but for an earlier run that this one `may_go_on` with), is a file, or could
    not be written to.
    """
    folder = run_folder(output)
    if _names(folder) and not (may_go_on and is_run(folder)):
        raise InputError(f"{folder}: the output folder is not empty; name another with output=, or move it away")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise InputError(f"{folder}: {nearest} is not a folder; name another with output=")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {nearest} cannot be written to; name another folder with output=")
    if folder.is_dir():
        _try_writing(folder)
    return folder


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginnings of one."""
    names = _names(folder)
    return bool(names) and (names <= RUN_FILES or names >= {"config.yaml", "manifest.json"})


def _names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files apart: locks, and what writers that were killed left there."""
    return {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()


def make_folder(folder: Path) -> None:
    """Makes the run's folder; InputError where the disk refuses."""
    try:
        files.make_folder(folder)
    except DiskError as error:
        raise InputError(f"{error}; name another folder with output=") from error
    _try_writing(folder)


def _try_writing(folder: Path) -> None:
    try:
        files.try_writing(folder)
    except DiskError as error:
        raise InputError(f"{error}; name another folder with output=") from error


def max_length(setting: int | None, positions: int | None) -> int:
    """The longest example: what was asked for, else 2048 or what the model can take.

    >>> max_length(None, 512), max_length(None, None)
    (512, 2048)
    """
    if setting is None:
        return min(2048, positions or 2048)
    if positions is not None and setting > positions:
        raise InputError(f"max_length: {setting} is more than the model's {positions} positions; at most {positions}")
    return setting
