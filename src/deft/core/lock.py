"""One run at a time in a folder: an flock on `.lock` in it, which says who holds it.

The kernel lets go of the lock when its process ends, however it ends, so nothing has to be cleaned up by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from deft.core.errors import DiskError, InputError

NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[str]:
    """Holds the folder for this process; it is made if it is missing, and removed again if nothing was written to it.

    Yields what a user should know: whose lock was left behind, or that this file system has no locks; else "". Raises
    InputError where another process holds it. A folder that cannot be made or written to is not locked: nothing can
    happen to it, and the checks of the run say why.
    """
    path = folder / NAME
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        lock, left = _take(path)
    except OSError as error:
        _remove(made)
        yield f"{folder} is not locked ({error.strerror}): start no second run in it" if folder.is_dir() else ""
        return
    try:
        yield left
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(lock)
        _remove(made)


@contextmanager
def turn(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process holds `path`, a file that is made and stays; `busy` is called if one does.

    Where there are no locks, all have their turn at once. Raises DiskError where it cannot be made.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(lock)


def _take(path: Path) -> tuple[int, str]:
    """The locked file, with this process's name in it, and a note if a dead process had left its own."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _named(_read(lock))
                os.close(lock)
                fix = "wait for it, or name another output="
                raise InputError(f"{path.parent} is in use by {holder}; {fix}") from None
            if _is_still_there(lock, path):
                left = _read(lock)
                _sign(lock)
                return lock, f"{path.parent}: taken over from {_named(left)}, which is gone" if left else ""
            os.close(lock)


def _is_still_there(lock: int, path: Path) -> bool:
    """False where its last holder took the file away between our opening and our locking it."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(lock: int) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode(), 0)


def _read(lock: int) -> dict[str, Any]:
    """The holder written in the lock file; empty where there is none yet."""
    with suppress(ValueError):
        holder = json.loads(os.pread(lock, 4096, 0))
        if isinstance(holder, dict) and holder.keys() >= {"pid", "host", "started"}:
            return holder
    return {}


def _named(holder: dict[str, Any]) -> str:
    """
    >>> _named({"pid": 812, "host": "a", "started": "2026-03-01T11:02:31+00:00"})
    'pid 812 on host a since 2026-03-01 11:02'
    """
    if not holder:
        return "a run that is just starting"
    started = datetime.fromisoformat(holder["started"])
    is_today = started.date() == datetime.now(started.tzinfo).date()
    when = f"{started:%H:%M}" if is_today else f"{started:%Y-%m-%d %H:%M}"
    return f"pid {holder['pid']} on host {holder['host']} since {when}"


def _remove(made: list[Path]) -> None:
    """Takes away the folders that were made, innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
