"""D5: second starts in one folder, and locks of runs that are gone."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from deft.core import lock
from faults.forking import Child, deft
from faults.harness import Result, Scale, spread, tally
from faults.scenes import Ended, arguments, ended, scene

TITLE = "second starts in one folder refused before they touch a file; locks left behind taken over"
FIGURE = 25


def run(scale: Scale) -> Result:
    with scene() as folder:
        seconds = [_second(folder, wait) for wait in spread(0, scale.of(1, 10, 16), 0.0, 1.0)]
        races = [_race(folder) for _ in range(scale.of(1, 4, 4))]
        left = [_left(folder, wait) for wait in spread(1, scale.of(1, 5, 5), 0.2, 1.0)]
        shown = f"{folder}/run"
        return tally([text for text, _ in seconds] + races + left, seconds[-1][1].replace(shown, "/out"))


def control() -> Result:
    """Nobody takes the lock."""

    def unlocked() -> None:
        lock.held = lambda folder: nullcontext("")

    with scene() as folder:
        return tally([_second(folder, 0.7, unlocked)[0]])


@contextmanager
def _first(folder: Path, before: Callable[[], object] = lambda: None) -> Iterator[Child]:
    """A run that takes its time; killed in the end, its folder removed."""
    child = deft("train", *_long(folder), log=folder / "first", before=before)
    try:
        yield child
    finally:
        child.kill(signal.SIGKILL)
        child.wait()
        shutil.rmtree(folder / "run", ignore_errors=True)


def _long(folder: Path) -> list[str]:
    return arguments(folder, epochs=1000, batch__examples=8)


def _second(folder: Path, wait: float, before: Callable[[], object] = lambda: None) -> tuple[str, str]:
    """A start while another run holds the folder, which is stopped so that only the second could change a file."""
    with _first(folder, before) as first:
        if not first.wait_until(lambda: _is_on(folder / "run")):
            return f"the first run did not start: {first.output[-300:]}", ""
        time.sleep(wait)
        first.kill(signal.SIGSTOP)
        found = _tree(folder / "run")
        try:
            done = ended(folder, "train", *_long(folder), before=before, seconds=6)
        except TimeoutError:
            return "not refused: it trained", ""
        after = _tree(folder / "run")
        if done.code != 2 or f"run is in use by pid {first.pid} on host" not in done.message:
            return f"exit code {done.code}: {done.output[-300:]}", done.message
        if done.computed > 5:
            return f"took {done.computed:.1f} s", done.message
        return ("" if found == after else f"files changed: {found ^ after}"), done.message


def _is_on(run: Path) -> bool:
    """Whether a run has signed its lock, or trains without one."""
    signed = run / lock.NAME
    return (run / "metrics.jsonl").exists() or (signed.exists() and signed.stat().st_size > 0)


def _race(folder: Path) -> str:
    """Two starts at the same moment: one goes on, the other is refused."""
    there = [folder / f"there-{n}" for n in range(2)]

    def meet(own: Path) -> None:
        own.touch()
        while not all(each.exists() for each in there):
            time.sleep(0.001)

    words = arguments(folder, epochs=30)
    children = [
        deft("train", *words, log=folder / f"race-{n}", before=partial(meet, own)) for n, own in enumerate(there)
    ]
    codes = sorted(child.wait() for child in children)
    outputs = [child.output for child in children]
    shutil.rmtree(folder / "run", ignore_errors=True)
    for path in (*there, *(child.log for child in children)):
        path.unlink()
    refused = sum("is in use by" in output for output in outputs)
    return "" if codes == [0, 2] and refused == 1 else f"exit codes {codes}: {outputs[0][-200:]} {outputs[1][-200:]}"


def _left(folder: Path, wait: float) -> str:
    """A start in the folder of a run that was killed."""
    words = arguments(folder, epochs=40)
    first = deft("train", *words, log=folder / "killed")
    first.wait_until(lambda: _is_on(folder / "run"))
    time.sleep(wait)
    first.kill()
    first.wait()
    pid = json.loads((folder / "run" / lock.NAME).read_text())["pid"]
    done: Ended = ended(folder, "train", *words)
    shutil.rmtree(folder / "run", ignore_errors=True)
    is_said = f"taken over from pid {pid} on host" in done.output and "which is gone" in done.output
    return "" if done.code == 0 and is_said else f"exit code {done.code}: {done.output[-300:]}"


def _tree(folder: Path) -> set[tuple[str, int, int]]:
    """Every file with its size and time of change."""
    return {
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()
    }
