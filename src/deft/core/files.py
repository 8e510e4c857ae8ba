"""Atomic writing of files and folders: a reader never meets one that is half written.

A folder is written as `.name.deft-1a2b3c4d` beside its place: each file hashed while it is written, then synced;
`manifest.json` last; the folder synced, renamed to `name`, and its parent synced. Every operation on the disk is a
method of `disk`, so that a test can stop before, after or inside any of them.

A link in the place of a file of deft's is neither written through nor read; what an earlier run wrote is set aside, and
nothing is written to a folder that is `claimed` once it is another's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from deft.core.errors import DamagedError, DiskError, InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MANIFEST = "manifest.json"
CARD = "README.md"
"""The file of a model folder that people edit."""
READ = frozenset({".json", ".jinja", ".safetensors", ".model", ".txt", ".tiktoken", ".bin", ".pt", ".py"})
"""Ends of the names of files that a model's readers look for."""
PICKLED = frozenset({".bin", ".pt", ".py"})
"""Those among them that deft never opens."""
ASIDE = ".aside"
"""What the names of things that are set aside have at their end."""
BLOCK = 1 << 24
"""Bytes of a block, the unit in which files are written and checked; an error about a damaged file names its block."""

_STAGED = re.compile(r"\..+\.deft-[0-9a-f]{8}")


class Disk:
    """What deft does to a disk, an operation each."""

    def open(self, path: Path, mode: str) -> IO[bytes]:
        return open(path, mode, buffering=0, opener=_plainly)

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
        except OSError as error:
            # Some file systems know no fsync of folders, and have nothing to do there (SMB, FUSE).
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
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

_claims: dict[Path, Callable[[], None]] = {}
"""The folders of runs in this process."""


def _plainly(path: str, flags: int) -> int:
    """Opens a file, and no link to one."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


@contextmanager
def claimed(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """While the body runs, `check` is called before anything is written below `folder`.

    check  raises DiskError where the folder is another's by now
    """
    place = Path(os.path.abspath(folder))
    _claims[place] = check
    try:
        yield
    finally:
        del _claims[place]


def stop_unless_ours(path: Path) -> None:
    """Raises DiskError where `path` lies in a folder that was claimed and is another's by now, or behind a link in it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "checkpoints").symlink_to("/tmp")
    >>> with claimed(folder, lambda: None):
    ...     try:
    ...         stop_unless_ours(folder / "checkpoints" / "step-000001")
    ...     except DiskError as error:
    ...         print(str(error).removeprefix(f"{folder}/"))
    checkpoints: is a link, and nothing is written through it
    """
    place = Path(os.path.abspath(path))
    for folder, check in [*_claims.items()]:
        if place.is_relative_to(folder):
            check()
            for parent in place.parents[: len(place.parts) - len(folder.parts) - 1]:
                if parent.is_symlink():
                    raise DiskError(f"{parent}: is a link, and nothing is written through it")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written. blocks: the CRC-32 of each `BLOCK` bytes, which is what a reader checks: at three times
    the speed, and of any part of the file."""

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
    write_bytes(path, _encoded(text))


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
    """Adds `data` to the end of a file, all of it or, where DiskError is raised, nothing. It is not synced.

    A file that has a second name, as copies of hard links do, is copied first: the other stays as it is.
    """
    with _complaining(path), disk.open(path, "ab") as file:
        size, names = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_nlink
        if names > 1:
            write_bytes(path, path.read_bytes() + data)
            return
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


def set_aside(path: Path) -> Path:
    """Renames what an earlier run wrote to NAME.aside, NAME.aside-2, ...: it is never removed. Returns its new place.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for _ in range(2):
    ...     write_text(folder / "final", "")
    ...     print(set_aside(folder / "final").name)
    final.aside
    final.aside-2
    """
    names = (f"{path.name}{ASIDE}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 10000))))
    target = next(each for name in names if not os.path.lexists(each := path.with_name(name)))
    rename(path, target)
    return target


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
                del chunk  # before the next one is made

    def write_text(self, name: str, text: str) -> None:
        self.write(name, [_encoded(text)])

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, _as_json(value))

    def _finish(self) -> None:
        mode = self.path.stat().st_mode & 0o666  # what the umask leaves; libraries make private files and rename them
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if not path.is_dir() and name not in self.files:
                with disk.open(path, "rb") as file:
                    self.files[name] = _hashed(file)
                    with suppress(OSError):
                        os.fchmod(file.fileno(), mode)
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
            stop_unless_ours(folder)
            disk.rename(path, folder)
            disk.sync_folder(folder.parent)
        except BaseException:
            with suppress(OSError):
                _remove_tree(path)
            raise
        finally:
            os.close(handle)


@contextmanager
def shared(path: Path) -> Iterator[Staging]:
    """A staging folder of another process, for files of this one; that one has to list what `files` says of them.

    Raises DiskError with its path where the disk refuses, or it cannot be seen from here.
    """
    if not path.is_dir():
        raise DiskError(f"{path}: cannot be seen on {socket.gethostname()}; all ranks need one folder that they share")
    with _complaining(path):
        yield Staging(path, {})


def about(folder: Path) -> Mapping[str, Any]:
    """What a folder's manifest says of it; nothing where there is none."""
    return read_manifest(folder).about if (folder / MANIFEST).is_file() else {}


def read_manifest(folder: Path) -> Manifest:
    """What a folder should hold; DamagedError where its manifest is missing, not readable or leads outside."""
    path = folder / MANIFEST
    try:
        with open(path, "rb", opener=_plainly) as file:
            text = file.read()
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


def verify(folder: Path, but: Collection[str] = (), share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest of a folder each of whose files has the bytes that were written.

    but    files that may differ, or be gone
    share  (i, n): only every n-th file is looked at, from the i-th on

    Raises DamagedError that names the first file, and its first block, that has not.
    """
    manifest = read_manifest(folder)
    names = [name for name in manifest.files if name not in but][share[0] :: share[1]]
    listed = {folder / name: manifest.files[name] for name in names}
    with ThreadPoolExecutor() as pool:  # checksums let other threads run
        for _ in pool.map(_verify_file, listed.keys(), listed.values()):
            pass
    return manifest


def verify_own_model(folder: Path) -> Manifest:
    """`verify` for a model folder that deft wrote, whose model card may have been edited.

    Raises DamagedError as well for a file that was put there since and would be read with the others.
    """
    manifest = verify(folder, but=(CARD,))
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if path.suffix in READ and name != MANIFEST and name not in manifest.files:
            raise DamagedError(f"{path}: was not there when deft wrote the folder")
    return manifest


def verify_model(folder: Path) -> None:
    """`verify_own_model` where deft wrote the folder, as far as can be told; nothing otherwise.

    Raises DamagedError, with what to do about a change that was meant.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError:
        return
    if b'"about"' not in text or b'"sha256"' not in text:
        return
    try:
        verify_own_model(folder)
    except DamagedError as error:
        raise DamagedError(f"{error}; if it was changed on purpose, remove {path}: nothing is compared then") from error


def marks(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file that a model's readers look for is written to or replaced, by its name."""
    found = {}
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        if path.is_file() and (path.suffix in READ or not path.suffix):
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def odd_entry(folder: Path) -> Path | None:
    """The first entry of a model folder that is called like a file of one, and cannot be read as one: a folder, a pipe,
    a link to nothing or to itself."""
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        is_meant = path.suffix in READ and path.suffix not in PICKLED
        if is_meant and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            return path
    return None


def link_outside(folder: Path) -> Path | None:
    """The first link in a model folder, weights apart, that leads out of it and not into a Hub cache; None without.

    Its content might be anything on this machine, and a model's small files are carried into what is made of it.
    """
    paths = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    return next((path for path in paths if path.suffix != ".safetensors" and leads_outside(path, folder)), None)


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a path in a model folder is a link to what is neither in the folder nor in a Hub cache."""
    target = Path(os.path.realpath(path))  # which a link to itself does not stop
    is_of_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return path.is_symlink() and not (target.is_relative_to(folder.resolve()) or is_of_hub)


def read(path: Path, record: FileRecord) -> bytes:
    """The bytes of a file as they were written; DamagedError where they are others. They are read once."""
    return bytes(Blocks(path, record).read(0, record.bytes))


class Blocks:
    """A file whose bytes are checked as they are read, a block at a time: what is used is what was written.

    Raises DamagedError that names the block.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self._path, self._record = path, record
        with _reading(path):
            self._file = open(path, "rb", buffering=0, opener=_plainly)  # noqa: SIM115  closed with what reads it
        self._edge, self._room = -1, memoryview(bytearray(min(BLOCK, record.bytes)))

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from `start` to `stop`."""
        found = bytearray(max(0, min(stop, self._record.bytes) - start))
        self.fill(memoryview(found), start, stop)
        return found

    def fill(self, view: memoryview, start: int, stop: int) -> None:
        """Puts the bytes from `start` to `stop` into memory of that size; whole blocks without a copy."""
        if not 0 <= start <= stop <= self._record.bytes:
            raise DamagedError(f"{self._path}: {self._record.bytes} bytes long, {stop} are asked for")
        place = start
        while place < stop:
            block, inner = divmod(place, BLOCK)
            size = min(BLOCK, self._record.bytes - block * BLOCK)
            if inner == 0 and place + size <= stop:
                self._fill(block, view[place - start : place - start + size])
                place += size
                continue
            if self._edge != block:
                self._edge = -1
                self._fill(block, self._room[:size])
                self._edge = block
            end = min(stop, block * BLOCK + size)
            view[place - start : end - start] = self._room[inner : inner + end - place]
            place = end

    def check(self) -> None:
        """Reads all of it."""
        for block in range(len(self._record.blocks)):
            self._fill(block, self._room[: min(BLOCK, self._record.bytes - block * BLOCK)])

    def _fill(self, block: int, into: memoryview) -> None:
        done = 0
        with _reading(self._path):
            self._file.seek(block * BLOCK)
            while done < len(into) and (count := self._file.readinto(into[done:])):
                done += count
        if done < len(into) or not self._is_written(block, into):
            raise DamagedError(f"{self._path}: checksum differs (block {block + 1})")

    def _is_written(self, block: int, data: memoryview) -> bool:
        return zlib.crc32(data) == self._record.blocks[block]


def copy(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copies what the manifest of a folder names to a new folder, each file verified as it is copied.

    but  files that may differ, and are copied as they are

    Raises DamagedError where one is not as it was written.
    """
    records = read_manifest(source).files
    with staged(target) as staging:
        for name, record in records.items():
            with _reading(source / name), open(source / name, "rb", buffering=0, opener=_plainly) as file:
                data = iter(lambda file=file: file.read(BLOCK), b"")  # type: ignore[misc]
                staging.write(name, data)
            if name not in but and staging.files[name] != record:
                raise DamagedError(f"{source / name}: checksum differs")


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
            if not _is_owned(handle, where_no_locks=False):
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


def _is_owned(handle: int, where_no_locks: bool = True) -> bool:
    """Takes the lock that shows that a writer is alive; False where another has it.

    where_no_locks  the answer on a file system without locks, where everything may have a living writer
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return where_no_locks and error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
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
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    Blocks(path, record).check()


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
    digest = hashlib.sha256(_encoded(_as_json(listed))).hexdigest()
    return _encoded(json.dumps({**listed, "sha256": digest}, indent=1, ensure_ascii=False)) + b"\n"


def _encoded(text: str) -> bytes:
    """UTF-8, with an escape that JSON and YAML know in place of half a surrogate pair, as names that are no UTF-8 have.

    >>> _encoded("a" + chr(0xDCFF))
    b'a\\\\udcff'
    """
    return text.encode("utf-8", "backslashreplace")


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _complaining(path: Path) -> Iterator[None]:
    """Turns the system's errors into DiskError, which names the path; nothing is written that is another's."""
    stop_unless_ours(path)
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DiskError(f"{path}: is a link, and nothing is written through it") from error
        raise DiskError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the system's errors into DamagedError, which names the path."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror or error})") from error
