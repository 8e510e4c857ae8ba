"""What was made of some input, kept on disk under a digest of it: made once, put in place whole, checked when used.

Several processes may want the same: one makes it, the others wait. What a killed process leaves behind is removed by
the next one that makes something.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deft import files
from deft.errors import DamagedError, DiskError, InputError
from deft.files import Manifest, Staging
from deft.store import COLUMNS, Block, Joiner, Store

_CODE = ("types.py", "tokenizer.py", "blocks.py", "store.py", "symptoms.py", "workers.py", "cache.py", "dataset.py")
_ROOMS = ("data", "render", "encoding")
_PACKAGES = ("numpy", "jinja2", "tokenizers", "transformers")


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
    here = Path(__file__).parent
    names = [here / name for name in _CODE] + [path for room in _ROOMS for path in sorted((here / room).rglob("*.py"))]
    texts = {path.relative_to(here).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    return digest([texts, {name: version(name) for name in _PACKAGES}])


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
        found = self._whole(folder)
        if found is None:
            with self._complaining(), self._lock(key):
                found = self._whole(folder)
                if found is None:
                    self._make(folder, make)
                    found = files.read_manifest(folder)
        return folder, found.about

    def _whole(self, folder: Path) -> Manifest | None:
        """The manifest of a folder that is as it was written; None where it is not there, or damaged."""
        if not folder.is_dir():
            return None
        try:
            return files.verify(folder)
        except DamagedError as error:
            self.say(f"the cache is damaged and is made again ({error})")
            return None

    def _make(self, folder: Path, make: Callable[[Staging], None]) -> None:
        files.sweep(self.root)
        shutil.rmtree(folder, ignore_errors=True)
        with files.staged(folder) as staging:
            make(staging)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Held by one process at a time; it is free when its holder is gone, however it went."""
        files.make_folder(self.root)
        with open(self.root / f"{key}.lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.say("another process encodes these rows; waiting for it")
                with suppress(OSError):  # where there are no locks, both make it and the first in place is used
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DiskError) as error:
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
