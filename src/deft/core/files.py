"""Atomic writing of files and folders: a reader never meets one that is half written.

A folder is written as `.name.deft-1a2b3c4d` beside its place: each file hashed while it is written, then synced;
`manifest.json` last; the folder synced, renamed to `name`, and its parent synced. Every operation on the disk is a
method of `disk`, so that a test can stop before, after or inside any of them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from deft.core.errors import DamagedError, DiskError, InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MANIFEST = "manifest.json"
BLOCK = 1 << 24
"""Bytes of a block, the unit in which files are written and checked; an error about a damaged file names its block."""

_STAGED = re.compile(r"\..+\.deft-[0-9a-f]{8}")


class Disk:
    """What deft does to a disk, an operation each."""

    def open(self, path: Path, mode: str) -> IO[bytes]:
        return open(path, mode, buffering=0)

    def write(self, file: IO[bytes], data: memoryview) -> None:
        while len(data):
            data = data[file.write(data) :]

    def truncate(self, file: IO[bytes], size: int) -> None:
        os.ftruncate(file.fileno(), size)

    def sync(self, file: IO[bytes]) -> None:
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


disk = Disk()
"""Replaced by the fault suite."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written. blocks: the CRC-32 of each `BLOCK` bytes."""

    bytes: int
    sha256: str
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a folder by their path in it, and what its writer says of it."""

    files: Mapping[str, FileRecord]
    about: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, _as_json(value))


def write_bytes(path: Path, data: Buffer) -> None:
    """Puts a file in place whole; DiskError names it where that fails."""
    staging = _staging_name(path)
    with _complaining(path):
        try:
            with disk.open(staging, "xb") as file:
                _is_owned(file.fileno())
                disk.write(file, memoryview(data))
                disk.sync(file)
                disk.rename(staging, path)
            disk.sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                disk.unlink(staging)
            raise


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of a file, all of it or, where DiskError is raised, nothing. It is not synced."""
    with _complaining(path), disk.open(path, "ab") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            disk.write(file, memoryview(data))
        except OSError:
            disk.truncate(file, size)
            raise


def sync(path: Path) -> None:
    """Makes a file, and what was appended to it, safe from a power cut."""
    with _complaining(path):
        with disk.open(path, "rb") as file:
            disk.sync(file)
        disk.sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, safe from a power cut; one that is there is left as it is."""
    with _complaining(path):
        missing = [each for each in (path, *path.parents) if not each.is_dir()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                disk.mkdir(folder)
            disk.sync_folder(folder.parent)


def try_writing(folder: Path, data: bytes = b"") -> None:
    """Writes a file to a folder, syncs it and takes it away again; DiskError where that fails."""
    with _complaining(folder):
        path = _staging_name(folder / "trial")
        with disk.open(path, "xb") as file:
            disk.unlink(path)
            if data:
                disk.write(file, memoryview(data))
                disk.sync(file)


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name in the same folder."""
    with _complaining(target):
        disk.rename(source, target)
        disk.sync_folder(target.parent)


class Writer:
    """A file of a staging folder while it is written, and the digests of its bytes."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file, self._sha256, self._bytes, self._blocks = file, hashlib.sha256(), 0, list[int]()

    def write(self, data: Buffer) -> None:
        """Adds bytes, or the bytes of an array; without a file they are hashed alone."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while len(view):
            done = self._bytes % BLOCK
            if done == 0:
                self._blocks.append(0)
            piece, view = view[: BLOCK - done], view[BLOCK - done :]
            self._sha256.update(piece)
            self._blocks[-1] = zlib.crc32(piece, self._blocks[-1])
            self._bytes += len(piece)
            if self._file:
                disk.write(self._file, piece)

    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._sha256.hexdigest(), tuple(self._blocks))


@dataclass(frozen=True)
class Staging:
    """A folder that is being written. What others write into `path` is hashed and synced at the end as well.

    about  goes into the manifest; it may be filled while the folder is written
    """

    path: Path
    about: dict[str, Any]
    files: dict[str, FileRecord] = field(default_factory=dict)

    @contextmanager
    def open(self, name: str) -> Iterator[Writer]:
        """A new file; `name` is a path in the folder, whose parents are made."""
        path = self.path / _inside(name)
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            if not (self.path / parent).is_dir():
                disk.mkdir(self.path / parent)
        with disk.open(path, "xb") as file:
            writer = Writer(file)
            yield writer
            disk.sync(file)
            self.files[name] = writer.record()

    def write(self, name: str, chunks: Iterable[Buffer]) -> None:
        """A new file from its pieces."""
        with self.open(name) as file:
            for chunk in chunks:
                file.write(chunk)

    def write_text(self, name: str, text: str) -> None:
        self.write(name, [text.encode("utf-8")])

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, _as_json(value))

    def _finish(self) -> None:
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in self.files:
                with disk.open(path, "rb") as file:
                    self.files[name] = _hashed(file)
                    disk.sync(file)
        listed = {"files": {name: asdict(self.files[name]) for name in sorted(self.files)}, "about": self.about}
        with disk.open(self.path / MANIFEST, "xb") as file:
            disk.write(file, memoryview(_sealed(listed)))
            disk.sync(file)
        for folder in sorted((each for each in self.path.rglob("*") if each.is_dir()), reverse=True):
            disk.sync_folder(folder)
        disk.sync_folder(self.path)


@contextmanager
def staged(folder: Path, about: Mapping[str, Any] | None = None) -> Iterator[Staging]:
    """A staging folder that becomes `folder` if the body ends well, and is removed if it does not.

    Raises InputError if `folder` exists, DiskError with its path where the disk refuses. A kill leaves the staging
    folder behind, for `sweep`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "step-000400"
    >>> with staged(folder, {"step": 400}) as staging:
    ...     staging.write_json("state.json", {"seed": 1})
    >>> verify(folder).about, sorted(path.name for path in folder.iterdir())
    ({'step': 400}, ['manifest.json', 'state.json'])
    """
    _stop_if_there(folder)
    with _complaining(folder):
        make_folder(folder.parent)
        path, handle = _new_folder(folder)
        try:
            staging = Staging(path, dict(about or {}))
            yield staging
            staging._finish()
            # A rename would take the place of an empty folder without a word.
            _stop_if_there(folder)
            disk.rename(path, folder)
            disk.sync_folder(folder.parent)
        except BaseException:
            with suppress(OSError):
                _remove_tree(path)
            raise
        finally:
            os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """What a folder should hold; DamagedError where its manifest is missing, not readable or leads outside."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        value = json.loads(text)
        if text != _sealed({"files": value["files"], "about": value["about"]}):
            raise ValueError
        files = {
            _inside(name): FileRecord(int(each["bytes"]), str(each["sha256"]), tuple(each["blocks"]))
            for name, each in value["files"].items()
        }
        return Manifest(files, dict(value["about"]))
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise DamagedError(f"{path}: checksum differs, or not written by deft") from error


def verify(folder: Path) -> Manifest:
    """The manifest of a folder each of whose files has the bytes that were written.

    Raises DamagedError that names the first file, and its first block, that has not.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        _verify_file(folder / name, record)
    return manifest


def copy(source: Path, target: Path) -> None:
    """Copies the files of a folder to a new one."""
    with staged(target) as staging:
        for path in sorted(source.rglob("*")):
            if path.is_file() and path != source / MANIFEST:
                with path.open("rb") as file:
                    staging.write(path.relative_to(source).as_posix(), iter(lambda: file.read(BLOCK), b""))


def remove(folder: Path) -> None:
    """Removes a folder that `staged` wrote. It is renamed first; a kill leaves a staging folder for `sweep`.

    Raises InputError, and leaves it as it is, if it holds anything that its manifest does not name.
    """
    listed = {folder / name for name in (*read_manifest(folder).files, MANIFEST)}
    strange = sorted(path for path in folder.rglob("*") if path.is_symlink() or (path.is_file() and path not in listed))
    if strange:
        raise InputError(f"{strange[0]}: was not written by deft; {folder} stays where it is")
    discard(folder)


def discard(folder: Path) -> None:
    """Renames a folder to a staging name and removes it, whatever it holds."""
    with _complaining(folder):
        path = _staging_name(folder)
        disk.rename(folder, path)
        disk.sync_folder(folder.parent)
        _remove_tree(path)


def sweep(folder: Path) -> list[Path]:
    """Removes from `folder` what writers that were killed left there, and names it; what has a living writer stays."""
    if not folder.is_dir():
        return []
    left = [path for path in sorted(folder.iterdir()) if _STAGED.fullmatch(path.name) and not path.is_symlink()]
    return [path for path in left if _remove_if_ownerless(path)]


def _remove_if_ownerless(path: Path) -> bool:
    with _complaining(path):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            if not _is_owned(handle):
                return False
            _remove_tree(path)
        finally:
            os.close(handle)
    return True


def _new_folder(folder: Path) -> tuple[Path, int]:
    """A new staging folder and the handle through which it is owned."""
    while True:
        path = _staging_name(folder)
        disk.mkdir(path)
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            if _is_owned(handle) and path.is_dir():
                return path, handle
            os.close(handle)


def _is_owned(handle: int) -> bool:
    """Takes the lock that shows that a writer is alive; False where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # On a file system without locks, every staging folder is taken to have a living writer.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _staging_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.deft-{secrets.token_hex(4)}")


def _remove_tree(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        disk.unlink(path)
        return
    for inner in sorted(path.iterdir()):
        _remove_tree(inner)
    disk.rmdir(path)


def _stop_if_there(folder: Path) -> None:
    if os.path.lexists(folder):
        raise InputError(f"{folder}: exists already; name another folder, or move it away")


def _verify_file(path: Path, record: FileRecord) -> None:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path}: is not a plain file")
        if status.st_size != record.bytes:
            raise DamagedError(f"{path}: {status.st_size} bytes long, {record.bytes} were written")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256:
                return
            file.seek(0)
            found = _hashed(file).blocks
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    differing = (index for index, pair in enumerate(zip(found, record.blocks, strict=False), 1) if pair[0] != pair[1])
    block = next(differing, None)
    raise DamagedError(f"{path}: checksum differs" + (f" (block {block})" if block else ""))


def _hashed(file: IO[bytes]) -> FileRecord:
    writer = Writer()
    while data := file.read(BLOCK):
        writer.write(data)
    return writer.record()


def _inside(name: str) -> str:
    """`name`, if it is a plain path below a folder; InputError otherwise.

    >>> _inside("a/b.json")
    'a/b.json'
    >>> _inside("../b.json")
    Traceback (most recent call last):
    deft.core.errors.InputError: '../b.json': not a path inside the folder
    """
    is_plain = name == PurePosixPath(name).as_posix() and not name.startswith("/")
    if not is_plain or not name or "\0" in name or {"..", "."} & set(name.split("/")):
        raise InputError(f"{name!r}: not a path inside the folder")
    return name


def _sealed(listed: Mapping[str, Any]) -> bytes:
    """A manifest with the digest of what it says, so that it is whole or not one."""
    digest = hashlib.sha256(_as_json(listed).encode("utf-8")).hexdigest()
    return json.dumps({**listed, "sha256": digest}, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _complaining(path: Path) -> Iterator[None]:
    """Turns the system's errors into DiskError, which names the path."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror or error})") from error
