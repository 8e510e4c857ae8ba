"""D4: a run is ended by signals at random steps, and another number of ranks goes on each time."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from deft.distributed.world import World
from faults import ranks, runs
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "2, 1, 2 or 1, 2, 1 ranks, each ended by a signal at a random step: the same bits, each row once an epoch"
FIGURE = 20


def run(scale: Scale) -> Result:
    return _thrown(scale.of(1, 4, 20))


def control() -> Result:
    """Gradients are added in another order."""
    plain = World.exchange

    def turned() -> None:
        World.exchange = lambda world, parts: plain(world, parts).flip(0)  # type: ignore[method-assign]

    return _thrown(1, turned)


def _thrown(count: int, before: Callable[[], None] = lambda: None) -> Result:
    with scene() as folder:
        reference, _ = runs.undisturbed(folder, **ranks.SETTINGS)
        found = [_point(folder, number, reference, before) for number in range(count)]
    return tally(found, "SIGTERM: saved step 7, run the same command again to go on" if count else "")


def _point(folder: Path, number: int, reference: Path, before: Callable[[], None]) -> str:
    draw, output = random.Random(number), f"run-{number}"
    stops = sorted(draw.sample(range(2, 13), 2))
    for size, step in zip((2, 1) if number % 2 == 0 else (1, 2), stops, strict=True):
        victim, mark = draw.randrange(size), folder / f"{output}-{step}.mark"

        def plant(rank: int, victim: int = victim, step: int = step, mark: Path = mark) -> None:
            before()
            if rank == victim:
                ranks.at_step(step, _signal, mark)

        codes = ranks.start(folder, output, size, plant).wait()
        if codes != [75] * size:
            return f"{stops}: exit codes {codes} of {size}: {ranks.said(folder, output, 0)}"
    wrong = ranks.finish(folder, output, 2 if number % 2 == 0 else 1, reference)
    return f"stopped at {stops}: {wrong}" if wrong else ""


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
