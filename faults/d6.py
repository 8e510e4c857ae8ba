"""D6: clocks that jump."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

from deft.training import checkpoint
from deft.training.checkpoint import Keep
from faults import saves
from faults.harness import Result, Scale, tally

TITLE = "clocks that jump by a day or a year: the order is that of steps"
FIGURE = 10
DAY = 86400


def run(scale: Scale) -> Result:
    return _thrown(scale.of(10, 10, 10))


def control() -> Result:
    """The newest is what the clock says."""
    steps = checkpoint.steps
    checkpoint.steps = lambda folder: sorted(
        steps(folder), key=lambda step: (folder / checkpoint.name(step)).stat().st_mtime
    )
    try:
        return _thrown(10)
    finally:
        checkpoint.steps = steps


def _thrown(count: int) -> Result:
    return tally(_jump(seed) for seed in range(count))


def _jump(seed: int) -> str:
    """Saves five steps with a clock that jumps before each; the two newest must stay, and the newest be found."""
    draw = random.Random(seed)
    clock, removed = time.time, []
    with tempfile.TemporaryDirectory(dir=saves.MEMORY) as name:
        folder = Path(name)
        try:
            for step in (90, 100, 110, 1000, 1010):
                now = clock() + draw.choice([-1, 1]) * draw.choice([DAY, 365 * DAY])
                time.time = lambda now=now: now
                place = checkpoint.write(folder, saves.state(step))
                os.utime(place, (now, now))
                removed += checkpoint.retain(folder, Keep(2))
            found = checkpoint.find(folder)
        finally:
            time.time = clock
    if removed != [90, 100, 110]:
        return f"clock {seed}: removed {removed}"
    return "" if found and found.checkpoint.step == 1010 else f"clock {seed}: found {found and found.checkpoint.step}"
