"""The run folder: where it is, whether it can be written to, and what stands in it before the first step."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from deft.core import files, versions
from deft.core.errors import DiskError, InputError
from deft.core.redact import redacted

FOLDERS = frozenset(("checkpoints", "final", "adapter", "logs"))
BEGINNINGS = frozenset(("config.yaml", "manifest.json", "ledger.json"))
"""What is written before the first step, and tells nothing that the next start does not know."""
RUN_FILES = FOLDERS | BEGINNINGS | {"report.html", *(f"{log}.jsonl" for log in ("metrics", "eval", "samples"))}
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
    stop_unless_plain(folder)
    if _names(folder) and not (may_go_on and is_run(folder)):
        raise InputError(f"{folder}: the output folder is not empty; name another with output=, or move it away")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise InputError(f"{folder}: {nearest} is not a folder; name another with output=")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {nearest} cannot be written to; name another folder with output=")
    if folder.is_dir():
        make_folder(folder)
    return folder


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginnings of one."""
    names = _names(folder)
    return bool(names) and (names <= RUN_FILES or names >= {"config.yaml", "manifest.json"})


def _names(folder: Path) -> set[str]:
    """What lies in a folder, apart from what was set aside and hidden files: locks, and what killed writers left."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if name[0] != "." and files.ASIDE not in name}


def stop_unless_plain(folder: Path) -> None:
    """InputError where something else has the name of a file or folder of a run's: a link, which is never followed."""
    for name in sorted(RUN_FILES):
        path = folder / name
        if path.is_symlink() or (os.path.lexists(path) and not (path.is_dir() if name in FOLDERS else path.is_file())):
            what = "a link" if path.is_symlink() else "no folder" if name in FOLDERS else "no plain file"
            raise InputError(f"{path}: is {what}, and the run has its own there; move it away, or name another output=")


def begin_anew(folder: Path, config: str) -> list[str]:
    """Sets aside what an earlier run, no checkpoint of which is left, wrote to the folder; lines that name it.

    config  the text of config.yaml: where there is no more than the beginnings of this very run, they stay
    """
    there = sorted(
        name for name in _names(folder) & RUN_FILES | _bad_steps(folder) if name not in ("checkpoints", "logs")
    )
    if not there or (set(there) <= BEGINNINGS and _is_text(folder / "config.yaml", config)):
        return []
    moved = ", ".join(f"{name} as {files.set_aside(folder / name).name}" for name in there)
    what = "what an earlier run left here is set aside, as there is no checkpoint of it"
    return [f"{folder}: {what}: {moved}; this run begins anew"]


def _bad_steps(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("bad-step-*") if files.ASIDE not in path.name}


def _is_text(path: Path, text: str) -> bool:
    return not path.exists() or path.read_bytes() == text.encode("utf-8")


def make_folder(folder: Path) -> None:
    """Makes the run's folder and tries to write to it; InputError where the disk refuses."""
    try:
        files.make_folder(folder)
        files.try_writing(folder)
    except DiskError as error:
        raise InputError(f"{error}; name another folder with output=") from error


def manifest(*, seed: int, device: str, dtype: str, data: Mapping[str, str], tokenizer_json: str) -> dict[str, Any]:
    """What says where a run came from: versions, git state, seed, device, digests of data files and tokenizer.

    data  file -> digest
    """
    return {
        "versions": versions.installed(),
        "git": _git_state(),
        "command": [redacted(argument) for argument in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "data_sha256": dict(data),
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode("utf-8")).hexdigest(),
    }


def _git_state() -> dict[str, Any] | None:
    """The commit of the folder the run was started in, and whether it had changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
