"""Disks that fail: one that stops, one that is full, and what a power cut can leave of a sequence of operations."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from deft.core import files


@contextmanager
def using(disk: files.Disk) -> Iterator[None]:
    """Puts a disk in the place of deft's."""
    before, files.disk = files.disk, disk
    try:
        yield
    finally:
        files.disk = before


@dataclass(frozen=True)
class Operation:
    """One operation: what, on which path (below the recorded folder), and the rest of its arguments."""

    what: str
    path: str
    more: Any = None


class Watched(files.Disk):
    """Calls `before` and `after` around each operation."""

    def before(self, operation: Operation) -> None: ...

    def after(self, operation: Operation) -> None: ...

    def _do(self, operation: Operation, run: Callable[[], Any]) -> Any:
        self.before(operation)
        result = run()
        self.after(operation)
        return result

    def open(self, path: Path, mode: str) -> IO[bytes]:
        return self._do(Operation("open", str(path), mode), lambda: super(Watched, self).open(path, mode))

    def write(self, file: IO[bytes], data: memoryview) -> None:
        self._do(Operation("write", str(file.name), bytes(data)), lambda: super(Watched, self).write(file, data))

    def truncate(self, file: IO[bytes], size: int) -> None:
        self._do(Operation("truncate", str(file.name), size), lambda: super(Watched, self).truncate(file, size))

    def sync(self, file: IO[bytes]) -> None:
        self._do(Operation("sync", str(file.name)), lambda: super(Watched, self).sync(file))

    def sync_folder(self, path: Path) -> None:
        self._do(Operation("sync_folder", str(path)), lambda: super(Watched, self).sync_folder(path))

    def mkdir(self, path: Path) -> None:
        self._do(Operation("mkdir", str(path)), lambda: super(Watched, self).mkdir(path))

    def rename(self, source: Path, target: Path) -> None:
        self._do(Operation("rename", str(source), str(target)), lambda: super(Watched, self).rename(source, target))

    def unlink(self, path: Path) -> None:
        self._do(Operation("unlink", str(path)), lambda: super(Watched, self).unlink(path))

    def rmdir(self, path: Path) -> None:
        self._do(Operation("rmdir", str(path)), lambda: super(Watched, self).rmdir(path))


class Recorder(Watched):
    """Remembers the operations below `folder`, and what others had written into a file that is opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.operations = folder, list[Operation]()

    def before(self, operation: Operation) -> None:
        path = os.path.relpath(operation.path, self.folder)
        more = os.path.relpath(operation.more, self.folder) if operation.what == "rename" else operation.more
        if operation.what == "open" and operation.more == "rb":
            more = Path(operation.path).read_bytes()
        self.operations.append(Operation(operation.what, path, more))

    def mark(self, what: str) -> None:
        """Says what is done by now."""
        self.operations.append(Operation("mark", what))


class FailAt(Watched):
    """From operation `first` on, `count` operations fail as on a full or broken disk."""

    FAILING = ("open", "write", "sync", "sync_folder", "mkdir", "rename")
    """Removing and truncating take no room."""

    def __init__(self, first: int, count: int, number: int = errno.ENOSPC) -> None:
        self.first, self.count, self.number, self.seen = first, count, number, 0

    def before(self, operation: Operation) -> None:
        if operation.what not in self.FAILING or (operation.what == "open" and operation.more == "rb"):
            return
        self.seen += 1
        if self.first <= self.seen < self.first + self.count:
            raise OSError(self.number, os.strerror(self.number))


class KillAt(Watched):
    """Kills its process at operation `first` below a folder."""

    def __init__(self, first: int, folder: Path) -> None:
        self.left, self.folder = first, str(folder)

    def before(self, operation: Operation) -> None:
        if operation.path.startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), 9)


@dataclass
class _File:
    """cached is what a reader sees, durable what a power cut leaves."""

    cached: bytes = b""
    durable: bytes = b""


@dataclass
class _Folder:
    """Entries as a reader sees them, as a power cut leaves them, and the changes between the two in order."""

    cached: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def change(self, **entries: Any) -> None:
        """Sets entries, all of them or, after a power cut, none; None takes one away."""
        self.pending.append(entries)
        _apply(self.cached, entries)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.cached), []


def _apply(entries: dict[str, Any], change: dict[str, Any]) -> None:
    for name, inode in change.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


class Model:
    """A disk by the letter of POSIX: only what was synced survives, and of the rest any part may."""

    def __init__(self) -> None:
        self.root = _Folder()

    def do(self, operation: Operation) -> None:
        """Carries an operation out."""
        what, path, more = operation.what, operation.path, operation.more
        if what == "mark":
            return
        if what == "sync_folder":
            self._folder(path).sync()
            return
        folder, name = self._folder(os.path.dirname(path)), os.path.basename(path)
        if what == "open":
            if name not in folder.cached:
                folder.change(**{name: _File(cached=more if isinstance(more, bytes) else b"")})
        elif what == "write":
            folder.cached[name].cached += more
        elif what == "truncate":
            folder.cached[name].cached = folder.cached[name].cached[:more]
        elif what == "sync":
            folder.cached[name].durable = folder.cached[name].cached
        elif what == "mkdir":
            folder.change(**{name: _Folder()})
        elif what == "rename":
            folder.change(**{name: None, os.path.basename(more): folder.cached[name]})
        else:
            folder.change(**{name: None})

    def _folder(self, path: str) -> _Folder:
        found = self.root
        for part in path.split("/") if path not in ("", ".") else []:
            found = found.cached[part]
        return found

    def kill(self, place: Path) -> None:
        """What a killed process leaves."""
        _write(self.root, place, lambda folder: folder.cached, lambda file: file.cached)

    def cut(self, place: Path, keeps_data: bool, keeps_names: bool, draw: random.Random | None = None) -> None:
        """What a power cut leaves: of what was not synced nothing, all, or what `draw` chooses."""

        def entries(folder: _Folder) -> dict[str, Any]:
            if draw is None:
                return folder.cached if keeps_names else folder.durable
            left = dict(folder.durable)
            for change in folder.pending:
                if draw.random() < 0.5:
                    _apply(left, change)
            return left

        def data(file: _File) -> bytes:
            if draw is None:
                return file.cached if keeps_data else file.durable
            tail = file.cached[len(file.durable) :]
            return file.durable + draw.choice([b"", tail, tail[: len(tail) // 2], bytes(len(tail))])

        _write(self.root, place, entries, data)


def _write(
    folder: _Folder, place: Path, entries: Callable[[_Folder], dict[str, Any]], data: Callable[[_File], bytes]
) -> None:
    place.mkdir()
    for name, inode in entries(folder).items():
        if isinstance(inode, _Folder):
            _write(inode, place / name, entries, data)
        else:
            (place / name).write_bytes(data(inode))


def states(
    operations: Sequence[Operation], draws: int, seed: int = 0
) -> Iterator[tuple[int, str, Callable[[Path], None]]]:
    """What a kill or a power cut can leave: operations done, the state's name, and what writes it to a new folder."""
    model, draw = Model(), random.Random(seed)
    for index, operation in enumerate((Operation("mark", ""), *operations)):
        model.do(operation)
        if operation.what == "mark" and index:
            continue
        yield index, f"killed after {operation.what} {operation.path}", model.kill
        for data, names in ((False, False), (False, True), (True, False)):
            kept = {(False, False): "nothing", (False, True): "names", (True, False): "data"}[data, names]
            yield index, f"power cut after {operation.what} {operation.path}, {kept} kept", _cutting(model, data, names)
        for number in range(draws):
            chosen = random.Random(draw.random())
            what = f"power cut after {operation.what} {operation.path}, draw {number}"
            yield index, what, _cutting(model, False, False, chosen)


def _cutting(model: Model, data: bool, names: bool, draw: random.Random | None = None) -> Callable[[Path], None]:
    return lambda place: model.cut(place, data, names, draw)
