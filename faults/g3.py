"""G3: chat templates that try to be endless, to fill the memory, or to reach what is none of their business."""

from __future__ import annotations

import resource
from itertools import islice
from pathlib import Path

from test_template_limits import DEEP, HOSTILE
from test_template_limits import run as rendered

from deft.core.types import Message
from deft.encoding.render.sandbox import Meter
from deft.encoding.render.template import Template
from faults.forking import fork
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "hostile chat templates end with a message within 5 s and 512 MB"
FIGURE = 30
SECONDS, MIB = 6.0, 512.0
"""A render is stopped after 5 s; the rest is the way there."""
ENDLESS = ("nested loops", "silent nested loops")


def run(scale: Scale) -> Result:
    chosen = dict(islice((HOSTILE | DEEP).items(), None, None, scale.of(6, 1, 1)))
    found = rendered(chosen)
    return tally((_judged(name, *found.get(name, ("lost", 0.0, 0.0))) for name in chosen), found["nested loops"][0])


def control() -> Result:
    """The meter counts nothing."""

    def unmetered(source: str) -> None:
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 40
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Meter.tick = Meter.spend = Meter._check = lambda *given: None  # type: ignore[assignment, method-assign]
        Template(source, {}).render([Message("user", "Hi")])

    def ends(name: str, folder: Path) -> str:
        child = fork(lambda: unmetered(HOSTILE[name]), folder / "log")
        try:
            child.wait(SECONDS)
        except TimeoutError:
            return f"{name}: still running after {SECONDS} s"
        return ""

    with scene() as folder:
        return tally(ends(name, folder) for name in ENDLESS)


def _judged(name: str, ended: str, seconds: float, mib: float) -> str:
    if not ended.startswith("refused: "):
        return f"{name}: {ended}"
    return "" if seconds < SECONDS and mib < MIB else f"{name}: {seconds:.1f} s, {mib:.0f} MiB"
