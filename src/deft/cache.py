"""What was made of some input, kept on disk under a digest of it: made once, put in place whole, checked when used.

Several processes may want the same: one makes it, the others wait. What a killed process leaves behind is removed by
the next one that makes something.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deft import files, lock
from deft.errors import DamagedError, DiskError, InputError
from deft.files import Staging
from deft.store import COLUMNS, Block, Joiner, Store

_HERE = Path(__file__).parent
_CODE = ("types.py", "tokenizer.py", "blocks.py", "store.py", "symptoms.py", "workers.py", "cache.py", "dataset.py")
_ROOMS = ("data", "render", "encoding")
_PACKAGES = ("numpy", "jinja2", "tokenizers", "transformers")
_ALL_PACKAGES = (*_PACKAGES, "torch", "safetensors")


def root() -> Path:
    """Where it is kept: DEFT_CACHE, or deft's folder among the user's caches."""
    named = os.environ.get("DEFT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(shared) / "deft"


def digest(value: Any) -> str:
    """The digest of a JSON value, whatever the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


@once
def code() -> str:
    """The digest of the code that makes rows into tokens, and of the libraries that it does it with."""
    names = [_HERE / name for name in _CODE]
    return _digest_of([*names, *(path for room in _ROOMS for path in (_HERE / room).rglob("*.py"))], _PACKAGES)


@once
def package() -> str:
    """The digest of all of deft's code, and of the libraries that it computes with."""
    return _digest_of(_HERE.rglob("*.py"), _ALL_PACKAGES)


def _digest_of(paths: Iterable[Path], packages: Iterable[str]) -> str:
    texts = {path.relative_to(_HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return digest([texts, {name: version(name) for name in packages}])


@dataclass(frozen=True)
class Cache:
    """A folder of what was made.

    say  is told what takes long or was damaged
    """

    root: Path
    say: Callable[[str], None] = lambda text: None

    def get(self, key: str, make: Callable[[Staging], None]) -> tuple[Path, Mapping[str, Any]]:
        """The folder of `key` and what its maker said of it, made by `make` unless it is there and whole."""
        folder = self.root / key
        with suppress(DamagedError):
            return folder, files.verify(folder).about
        with self._complaining(), self._turn(key):
            try:
                return folder, files.verify(folder).about
            except DamagedError as error:
                if folder.is_dir():
                    self.say(f"the cache is damaged and is made again ({error})")
                    files.discard(folder)
            files.sweep(self.root)
            with files.staged(folder) as staging:
                make(staging)
            return folder, files.read_manifest(folder).about

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


def write(staging: Staging, blocks: Iterable[Block]) -> None:
    """The blocks of a source as the files of a store."""
    joiner = Joiner()
    with ExitStack() as stack:
        columns = {name: stack.enter_context(staging.open(f"{name}.bin")) for name in COLUMNS}
        for block in blocks:
            for name, column in joiner.add(block).items():
                columns[name].write(column.data)
    staging.about.update(joiner.about())


def read(folder: Path, about: Mapping[str, Any]) -> Store:
    """The store that `write` wrote, mapped."""
    return Store.about({name: _mapped(folder / f"{name}.bin", kind) for name, kind in COLUMNS.items()}, about)


def _mapped(path: Path, kind: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, kind)
    return np.asarray(np.memmap(path, kind, mode="r"))


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
