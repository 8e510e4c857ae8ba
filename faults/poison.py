"""Files that run code when they are unpickled or imported: the code leaves a canary."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from faults.harness import Result, tally
from faults.scenes import Ended, arguments, ended, scene

Plant = Callable[[Path, bytes], Sequence[str]]
"""Puts poison into a scene's folder; the words of the command that meets it, beside `train` and the usual settings."""


class _Poison:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


def pickled(canary: Path) -> bytes:
    """A pickle that makes the canary."""
    return pickle.dumps(_Poison(canary))


def source(canary: Path) -> str:
    """A module that makes the canary when it is imported, and has any class."""
    return (
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
        "def __getattr__(name):\n    return type(name, (), {})\n"
        "def generate(*arguments, **more):\n    return None\n"
    )


def thrown(points: dict[str, Callable[[Path], Sequence[str]]], before: Callable[[], object] = lambda: None) -> Result:
    """Each point plants its poison in a scene of its own, whose `canary` must not appear; nor may a traceback."""
    found = {name: _point(name, plant, before) for name, plant in points.items()}
    sees = next((done.message for _, done in found.values() if "can run code" in done.message), "")
    sees = sees or next((done.message for _, done in found.values() if done.message), "")
    return tally((failure for failure, _ in found.values()), sees)


def _point(name: str, plant: Callable[[Path], Sequence[str]], before: Callable[[], object]) -> tuple[str, Ended]:
    with scene() as folder:
        words = plant(folder) or ["train", *arguments(folder, steps=2)]
        done = ended(folder, *words, before=before)
        if (folder / "canary").exists():
            return f"{name}: its code ran", done
        is_told = done.code in (2, 3) and done.message.startswith("deft: ")
        fine = not done.has_traceback and (is_told or (done.code == 0 and name.endswith("(left unused)")))
        shown = replace(done, output=done.output.replace(f"{folder}/", ""))
        return "" if fine else f"{name}: exit code {done.code}: {done.output[-400:]}", shown
