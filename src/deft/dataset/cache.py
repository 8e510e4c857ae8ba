"""What was made of some input, kept on disk under a digest of it: made once, put in place whole, checked when used.

Several processes may want the same: one makes it, the others wait. What a killed process leaves behind is removed by
the next one that makes something.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache as once
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deft.core import files, lock
from deft.core.errors import DamagedError, DiskError, InputError
from deft.core.files import Manifest, Staging

_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD = Path(hashlib.__file__).resolve().parent
_ENCODING = (
    *("data/**/[!_]*.py", "encoding/**/[!_]*.py", "core/errors.py", "core/files.py", "core/registry.py"),
    *("core/types.py", *(f"dataset/{name}.py" for name in ("data_warnings", "examples", "source", "store"))),
)
"""The code that makes tokens of rows: what is loaded once some are made, as a test knows."""


def root() -> Path:
    """Where it is kept: DEFT_CACHE, or deft's folder among the user's caches, or the temporary files."""
    named = os.environ.get("DEFT_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deft"
    except RuntimeError:  # no HOME, and a user without a name, as containers have
        shared = Path(tempfile.gettempdir()) / f"deft-cache-{os.getuid()}"
        if os.path.lexists(shared) and shared.lstat().st_uid != os.getuid():
            raise InputError(f"{shared}: is another user's; DEFT_CACHE names another folder for the cache") from None
        return shared


def digest(value: Any) -> str:
    """The digest of a JSON value. The order of keys counts: a template may write what it is given in that order.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    False
    """
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


@once
def package() -> str:
    """The digest of all of deft's code, and of the libraries that it computes with."""
    return _digest_of(("**/*.py",), ("numpy", "jinja2", "tokenizers", "transformers", "torch", "safetensors"))


@once
def code() -> str:
    """The digest of the code that makes tokens of rows, and of the libraries that it computes with."""
    return _digest_of(_ENCODING, ("datasets", "jinja2", "markupsafe", "numpy", "pyarrow", "tokenizers", "transformers"))


def _digest_of(patterns: Iterable[str], libraries: Iterable[str]) -> str:
    paths = sorted({path for pattern in patterns for path in _PACKAGE.glob(pattern)})
    texts = [(path.relative_to(_PACKAGE).as_posix(), _content(path)) for path in paths]
    return digest([texts, {name: _version(name) for name in libraries}, sys.version_info[:2]])


def own_code(name: str) -> str:
    """The digest of a user's module and of all loaded modules of theirs: those below the folder that it is found in."""
    import_module(name)
    top = sys.modules[name.partition(".")[0]]
    if top.__file__ is None:
        return ""
    folder = Path(top.__file__).resolve().parents[1 if hasattr(top, "__path__") else 0]
    loaded = {Path(file).resolve() for each in [*sys.modules.values()] if (file := getattr(each, "__file__", None))}
    own = sorted(path for path in loaded if path.suffix == ".py" and path.is_relative_to(folder) and _is_users(path))
    return digest([(path.relative_to(folder).as_posix(), _content(path)) for path in own])


def _is_users(path: Path) -> bool:
    """Whether a module is neither deft's, nor a library's, nor Python's."""
    return not (path.is_relative_to(_PACKAGE) or "site-packages" in path.parts or path.is_relative_to(_STANDARD))


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Cache:
    """A folder of what was made.

    say  is told what takes long or was damaged
    """

    root: Path
    say: Callable[[str], None] = lambda text: None

    def get(self, key: str, make: Callable[[Staging], None]) -> tuple[Path, Manifest]:
        """The folder of `key` and its manifest, made by `make` unless it is there and whole."""
        folder = self.root / key
        with suppress(DamagedError):
            return folder, files.verify(folder)
        with self._complaining(), self._turn(key):
            try:
                return folder, files.verify(folder)
            except DamagedError as error:
                if folder.is_dir():
                    self.say(f"the cache is damaged and is made again ({error})")
                    files.discard(folder)
            files.sweep(self.root)
            with files.staged(folder) as staging:
                make(staging)
            return folder, files.read_manifest(folder)

    def has(self, key: str) -> bool:
        """Whether there is something of `key`, be it damaged."""
        return (self.root / key).is_dir()

    def _turn(self, key: str) -> AbstractContextManager[None]:
        files.make_folder(self.root)
        waiting = "another process encodes these rows; waiting for it"
        return lock.turn(self.root / f"{key}.lock", lambda: self.say(waiting))

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except DiskError as error:
            raise DiskError(f"{error}; the cache is {self.root}, DEFT_CACHE names another folder") from error


def file_digests(paths: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each file by its name. Raises InputError where one cannot be read."""
    found = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return found


def marks(paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What changes of a file when it is written to, by its name."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        found[path] = ()
        with suppress(OSError):
            status = os.stat(path)
            found[path] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def watch(source: str, paths: Iterable[str]) -> Callable[[], None]:
    """To be called before files are hashed and read. What it returns raises InputError, after that, where one of them
    has been written to since: what was made of it is nobody's."""
    before = marks(paths := [*paths])

    def check() -> None:
        if odd := [path for path, mark in marks(paths).items() if before.get(path) != mark]:
            raise InputError(f"{source}: {odd[0]} changed while it was read; start again")

    return check
