"""The folder is the registry: `loss/dft.py` is `loss.name: dft`. Nothing is listed anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deft.errors import InputError


def names(room: str) -> list[str]:
    """The modules of a room.

    >>> names("loss")
    ['nll', 'reference']
    """
    return sorted(file.stem for file in Path(__file__).parent.joinpath(*room.split(".")).glob("[!_]*.py"))


def load(room: str, name: str, key: str) -> ModuleType:
    """The module `name` of a room; `key` is the configuration's, for the error that lists what there is."""
    known = names(room)
    if name not in known:
        hint = closest(name, known) or f"there is {', '.join(known)}"
        raise InputError(f"{key}: {name!r} is not there; {hint}")
    return import_module(f"deft.{room}.{name}")


def closest(name: str, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """A question that names the one of `known` that is most like `name`, or "" where none is like it.

    meant  what to call it in the question, by the known name

    >>> closest("adamv", ["adamw", "sgd"]), closest("lion", ["adamw", "sgd"])
    ("did you mean 'adamw'?", '')
    """
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {meant[near[0]] if meant else near[0]!r}?" if near else ""
