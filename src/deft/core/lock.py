"""One run at a time in a folder: an flock on `.lock` in it, which says who holds it.

The kernel lets go of the lock when its process ends, however it ends, so nothing has to be cleaned up by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from deft.core import files
from deft.core.errors import DiskError, InputError

NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[str]:
    """Holds the folder for this process; it is made if it is missing, and removed again if nothing was written to it.

    Yields what a user should know: whose lock was left behind, or that this file system has no locks; else "". Raises
    InputError where another process holds it, or `.lock` is no lock of deft's. A folder that cannot be made or written
    to is not locked: nothing can happen to it, and the checks of the run say why. Where the folder is another's by the
    end, all in it stays as it is.
    """
    path = folder / NAME
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    lock: int | None = None
    try:
        lock, note = _take(path)
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        note = f"{folder} is not locked ({error.strerror}): start no second run in it"
        if not folder.is_dir():
            _remove(made)
            yield ""
            return
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    hold = _Hold(path, place, lock)
    try:
        with files.claimed(folder, hold.check):
            yield note
    finally:
        hold.let_go(made)


@dataclass
class _Hold:
    """A folder while a run has it: open, so that one made in its place is another; `lock` is None without locks."""

    path: Path
    place: int
    lock: int | None
    _turn: Lock = field(default_factory=Lock)

    def check(self) -> None:
        """Raises DiskError where the folder is gone, or another's; a lock that somebody took away is made again."""
        if not _is_still_there(self.place, self.path.parent):
            raise DiskError(
                f"{self.path.parent}: was removed or replaced while the run went on; it writes no more there"
            )
        with self._turn:
            if self.lock is None or _is_still_there(self.lock, self.path):
                return
            try:
                again = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                what = "is another run's by now; this one writes no more there"
                raise DiskError(f"{self.path.parent}: {what}") from error
            os.close(self.lock)
            self.lock = again
            _sign(again)

    def let_go(self, made: list[Path]) -> None:
        """Takes away the lock and the folders that were made, as far as they are empty and still those."""
        is_there = _is_still_there(self.place, self.path.parent)
        if self.lock is not None:
            if is_there and _is_still_there(self.lock, self.path):
                with suppress(OSError):
                    self.path.unlink()
            os.close(self.lock)
        os.close(self.place)
        if is_there:
            _remove(made)


@contextmanager
def turn(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process holds `path`, a file that is made and stays; `busy` is called if one does.

    Where there are no locks, all have their turn at once. Raises DiskError where it cannot be made.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
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
        if path.is_symlink() or path.is_dir():
            raise _no_lock(path, "a link" if path.is_symlink() else "a folder")
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if (what := _odd(lock)) is not None:
                os.close(lock)
                raise _no_lock(path, what)
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


def _odd(lock: int) -> str | None:
    """What a file is that is no lock of deft's: another name of some file, or a text of somebody's; else None."""
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return "a second name of another file" if stat.S_ISREG(status.st_mode) else "no plain file"
    text = os.pread(lock, 1, 0)
    return None if text in (b"", b"{") else "a file of somebody's"


def _no_lock(path: Path, what: str) -> InputError:
    return InputError(f"{path}: is {what}, not a lock of deft's; move it away, or name another output=")


def _is_still_there(handle: int, path: Path) -> bool:
    """False where what was opened has been taken away since, or something else has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
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
