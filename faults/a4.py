"""A4: kill -9 in start-up, in an evaluation, in retention and in the export."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deft.core import files
from deft.run import finished
from faults import disks, runs
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "kill -9 in start-up, encoding, evaluation, retention and export"
FIGURE = 50


def run(scale: Scale) -> Result:
    return _thrown(lambda moments: moments[:: scale.of(12, 2, 1)])


def control() -> Result:
    """The export is written under its final name, and taken for whole by the next start."""
    whole = files.staged

    @contextmanager
    def in_place(folder: Path, about: Any = None) -> Iterator[files.Staging]:
        if folder.name != "final":
            with whole(folder, about) as staging:
                yield staging
            return
        folder.mkdir()
        yield files.Staging(folder, {})

    def plant() -> None:
        files.staged = in_place
        at_call("deft.export.folder._tokenizer_to_save", 1)()

    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        runs.start(folder, "run", plant).wait()
        return tally([runs.finish(folder, "run", reference, before=_take_all)])


def _take_all() -> None:
    finished.is_of = lambda final, about: final.exists()


def _thrown(chosen: Callable[[Sequence[tuple[str, Any]]], Sequence[tuple[str, Any]]]) -> Result:
    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        return tally(_kill(folder, f"run-{n}", *each, reference) for n, each in enumerate(chosen(moments())))


def moments() -> list[tuple[str, Callable[[Path], Callable[[], None]]]]:
    """Where a run is killed: (name, run folder -> what plants the kill)."""
    calls = [
        ("deft.run.reading.check", 1),
        ("deft.run.prepare.plan", 1),
        ("deft.run.build.build", 1),
        ("deft.run.build.selftest.choose", 1),
        *(("deft.evaluation.evaluate.held_out_loss", n) for n in (1, 2, 3)),
        *(("deft.core.files.write_text", n) for n in (1, 2, 3)),
        *(("deft.training.checkpoint.retain", n) for n in (1, 3)),
        ("deft.export.folder.verify", 1),
        ("deft.tracking.report.write", 1),
    ]
    found = [(f"{name}, call {n}", lambda folder, name=name, n=n: at_call(name, n)) for name, n in calls]
    places = {".config.yaml": 4, ".ledger.json": 4, "checkpoints": 16, ".final": 12}
    for place, count in places.items():
        step = 9 if place == "checkpoints" else 1
        found += [
            (f"{place}, operation {n * step}", lambda folder, place=place, n=n * step: at_operation(folder / place, n))
            for n in range(count)
        ]
    return found


def at_call(name: str, number: int) -> Callable[[], None]:
    """Plants a kill at the beginning of a call of a function."""

    def plant() -> None:
        path, _, attribute = name.rpartition(".")
        try:
            owner = importlib.import_module(path)
        except ModuleNotFoundError:
            parent, _, last = path.rpartition(".")
            owner = getattr(importlib.import_module(parent), last)
        whole, calls = getattr(owner, attribute), [0]

        def killed(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*given, **named)

        setattr(owner, attribute, killed)

    return plant


def at_operation(place: Path, number: int) -> Callable[[], None]:
    """Plants a kill before an operation on the disk below a path."""

    def plant() -> None:
        files.disk = disks.KillAt(number, place)

    return plant


def _kill(folder: Path, output: str, name: str, plant: Callable[[Path], Callable[[], None]], reference: Path) -> str:
    child = runs.start(folder, output, plant(folder / output))
    code = child.wait()
    if code != -signal.SIGKILL:
        return f"{name}: ended with {code} before it was killed"
    wrong = runs.finish(folder, output, reference)
    return f"{name}: {wrong}" if wrong else ""
