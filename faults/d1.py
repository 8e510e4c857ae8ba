"""D1: one of two ranks is killed, or raises."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from deft.distributed.watch import Watch
from faults import ranks, runs
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "one of two ranks is killed or raises: all gone within 15 s, its rank, step and rows named, resumed to the bit"
FIGURE = 50
SECONDS = 15.0


def run(scale: Scale) -> Result:
    count, seconds = scale.of(2, 6, 50), scale.of(150, 15, 15)  # tests run on machines that are busy
    with scene() as folder:
        reference, _ = runs.undisturbed(folder, **ranks.SETTINGS)
        found = [_point(folder, number, reference, seconds) for number in range(count)]
    told = next((told for _, told in found if told.startswith("deft: rank ")), "")
    return tally((wrong for wrong, _ in found), told)


def control() -> Result:
    """Nobody says what has happened."""

    def mute() -> None:
        Watch._tell = lambda *given: None  # type: ignore[assignment,method-assign]

    with scene() as folder:
        return tally([_point(folder, 1, Path(), 150, mute)[0]])


def _point(
    folder: Path, number: int, reference: Path, seconds: float, before: Callable[[], None] = lambda: None
) -> tuple[str, str]:
    """What went wrong, "" if nothing; and what the user was told."""
    draw, output = random.Random(number), f"run-{number}"
    victim, step, is_kill = draw.randrange(2), draw.randrange(1, 13), number % 2 == 0
    mark = folder / f"{output}.mark"

    def plant(rank: int) -> None:
        before()
        if rank == victim:
            ranks.at_step(step, _kill if is_kill else _raise, mark)

    started = ranks.start(folder, output, 2, plant)
    started.children[victim].wait_until(mark.exists)
    began = time.monotonic()
    codes = started.wait(seconds)
    took, other = time.monotonic() - began, 1 - victim
    told = ranks.said(folder, output, other if is_kill and victim == 0 else 0)
    what = "was lost" if is_kill else "failed first"
    # Rank 0, where it is the one that raises, says what: its rank, step and rows are in the log of the other.
    heard = told if victim or is_kill else (folder / output / "logs" / "rank-1.txt").read_text()
    wrong = (
        "" if f"rank {victim} {what} at step {step}, {mark.read_text()}: " in heard else f"{heard[-300:]!r} was said"
    )
    if took > seconds:
        wrong = f"gone after {took:.1f} s"
    elif codes[other] != 6:
        wrong = f"exit codes {codes}"
    wrong = wrong or ranks.finish(folder, output, 2, reference)
    return ranks.in_folder(folder, f"rank {victim}, step {step}: {wrong}") if wrong else "", ranks.in_folder(
        folder, told
    )


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("no luck")
