"""Runs faults in processes of their own and collects what became of them."""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from deft.core import versions

ROOT = Path(__file__).parents[1]
SHOWN_FAILURES = 5


class Scale(StrEnum):
    """quick: inside the tests, two minutes for all faults; short: `make faults`; full: `make faults-nightly`."""

    QUICK = "quick"
    SHORT = "short"
    FULL = "full"

    def of(self, quick: int, short: int, full: int) -> int:
        """The number of points of this scale.

        >>> Scale.SHORT.of(3, 20, 200)
        20
        """
        return {"quick": quick, "short": short, "full": full}[self]


@dataclass(frozen=True)
class Result:
    """What became of a fault's points. `sees` is a message that a user reads, `failures` one line per failed point."""

    points: int
    passed: int
    failures: tuple[str, ...] = ()
    sees: str = ""

    @property
    def is_green(self) -> bool:
        return self.passed == self.points > 0


def tally(points: Iterable[str], sees: str = "") -> Result:
    """Points as text, "" for those that passed, else what went wrong.

    >>> tally(["", "b: lost"])
    Result(points=2, passed=1, failures=('b: lost',), sees='')
    """
    found = list(points)
    failures = tuple(text for text in found if text)
    return Result(len(found), len(found) - len(failures), failures, sees)


@dataclass(frozen=True)
class Outcome:
    """A fault's result and its control's; `seconds` is for both."""

    id: str
    title: str
    figure: int
    scale: str
    result: Result
    control: Result
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.result.is_green and not self.control.is_green and self.control.points > 0


def ids() -> list[str]:
    """Every fault there is: a letter and a number.

    >>> "f1" in ids()
    True
    """
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z][0-9].py"))


def load(fault: str) -> ModuleType:
    return importlib.import_module(f"faults.{fault}")


def run_all(faults: Sequence[str], scale: Scale, jobs: int, say: Callable[[str], None]) -> list[Outcome]:
    """The outcomes in the order of `faults`, `jobs` at a time, each in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        reports = {fault: Path(folder) / f"{fault}.json" for fault in faults}
        waiting, running = list(faults), dict[int, str]()
        while waiting or running:
            while waiting and len(running) < jobs:
                fault = waiting.pop(0)
                running[_start(fault, scale, reports[fault])] = fault
            pid, _ = os.wait()
            say(described(_read(running.pop(pid), scale, reports)))
        return [_read(fault, scale, reports) for fault in faults]


def described(outcome: Outcome) -> str:
    """An outcome for people."""
    result, control = outcome.result, outcome.control
    mark = "ok  " if outcome.is_good else "FAIL"
    red = (
        f"control red ({control.passed}/{control.points})"
        if control.points and not control.is_green
        else "CONTROL NOT RED"
    )
    lines = [
        f"{mark} {outcome.id.upper()} {result.passed}/{result.points} {outcome.title}; {red}; {outcome.seconds:.0f} s"
    ]
    shown = result.failures[:SHOWN_FAILURES] + (control.failures[:SHOWN_FAILURES] if not control.points else ())
    return "\n".join(lines + [f"       {line}" for text in shown for line in text.splitlines()])


def _start(fault: str, scale: Scale, report: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            report.write_text(json.dumps(asdict(_outcome(fault, scale))))
        finally:
            sys.stdout.flush()
            os._exit(0)
    return pid


def _outcome(fault: str, scale: Scale) -> Outcome:
    began = time.monotonic()
    module = load(fault)
    result, control = _caught(lambda: module.run(scale)), _caught(module.control)
    return Outcome(fault, module.TITLE, module.FIGURE, scale, result, control, round(time.monotonic() - began, 1))


def _caught(run: Callable[[], Result]) -> Result:
    try:
        return run()
    except Exception:
        return Result(0, 0, (traceback.format_exc(),))


def _read(fault: str, scale: Scale, reports: dict[str, Path]) -> Outcome:
    if not reports[fault].is_file():
        lost = Result(0, 0, ("its process died",))
        return Outcome(fault, load(fault).TITLE, load(fault).FIGURE, scale, lost, lost, 0.0)
    return outcome_of(json.loads(reports[fault].read_text()))


def outcome_of(record: dict[str, Any]) -> Outcome:
    """An outcome from its JSON."""
    results = {name: record[name] | {"failures": tuple(record[name]["failures"])} for name in ("result", "control")}
    return Outcome(**record | {name: Result(**result) for name, result in results.items()})


def about_the_machine() -> dict[str, Any]:
    """Machine, versions and date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores {_processor()}, {platform.system()}",
        "versions": versions.installed(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(seed: int, count: int, low: float, high: float) -> Iterator[float]:
    """`count` moments between low and high, the same for the same seed, evenly spread with a random offset each."""
    draw = random.Random(seed)
    for index in range(count):
        yield low + (high - low) * (index + draw.random()) / count
