"""D2: one of two ranks is stopped, or its main thread hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from deft.distributed import watch
from faults import ranks
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "one of two ranks is stopped, or hangs for 5 s: all gone within 35 s more, its rank, step and rows named"
FIGURE = 10
HANG, SECONDS = 5.0, 40.0


def run(scale: Scale) -> Result:
    with scene() as folder:
        found = [_point(folder, number) for number in range(scale.of(2, 4, 10))]
    return tally((wrong for wrong, _ in found), found[-1][1])


def control() -> Result:
    """Nobody looks whether a rank goes on."""

    def blind() -> None:
        watch.Watch._look_at_self = lambda *given: None  # type: ignore[assignment,method-assign]

    with scene() as folder:
        return tally([_point(folder, 1, blind, 2.0)[0]])


def _point(
    folder: Path, number: int, before: Callable[[], None] = lambda: None, seconds: float = SECONDS
) -> tuple[str, str]:
    """What went wrong, "" if nothing; and what the user was told."""
    draw, output = random.Random(number), f"run-{number}"
    victim, step, is_stop = draw.randrange(2), draw.randrange(1, 13), number % 2 == 0
    mark = folder / f"{output}.mark"

    def plant(rank: int) -> None:
        before()
        if not is_stop:
            watch.HANG, watch.TIMES = HANG, 0
        if rank == victim:
            ranks.at_step(step, _stop if is_stop else _hang, mark)

    started = ranks.start(folder, output, 2, plant)
    started.children[victim].wait_until(mark.exists)
    codes = started.wait(seconds)
    told = ranks.said(folder, output, 1 if is_stop and victim == 0 else 0)
    logs = [folder / output / "logs" / f"rank-{rank}.txt" for rank in (0, 1) if not is_stop or rank != victim]
    what = "was lost" if is_stop else "hangs"
    wrong = "" if codes == [-9 if is_stop and rank == victim else 6 for rank in (0, 1)] else f"exit codes {codes}"
    if f"rank {victim} {what} at step {step}, {mark.read_text()}: " not in told:
        wrong = wrong or f"{told!r} was said"
    if not all("File " in log.read_text() for log in logs):
        wrong = wrong or "a rank has not said where it was"
    return ranks.in_folder(folder, f"rank {victim}, step {step}: {wrong}") if wrong else "", ranks.in_folder(
        folder, told
    )


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    time.sleep(1e6)
