"""Whole runs that are stopped and started again, and whether they come out as one that was left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.forking import Child, deft
from faults.scenes import arguments

SETTINGS = {
    "dropout": "config",
    "checkpoint__every": 2,
    "evaluate__every": 5,
    "data__eval": 0.1,
    "microbatch_tokens": 128,
    "batch__examples": 11,
}
"""Steps of several packed micro-batches, dropout on, three epochs whose last step is short, held-out rows."""

IGNORED = ("seconds", "peak_bytes")


def start(folder: Path, output: str, before: Callable[[], object] = lambda: None, **settings: Any) -> Child:
    """`deft train` into a folder of the scene; its words go to a log beside it."""
    given = arguments(folder, output=folder / output, **{**SETTINGS, **settings})
    return deft("train", *given, log=folder / log_name(output), before=before)


def log_name(output: str) -> str:
    """
    >>> log_name("above/run")
    'above-run.log'
    """
    return output.replace("/", "-")[:100] + ".log"


def undisturbed(folder: Path, **settings: Any) -> tuple[Path, float]:
    """A run that is left alone, in `whole`, and its seconds."""
    began = time.monotonic()
    child = start(folder, "whole", **settings)
    if child.wait():
        raise RuntimeError(child.output)
    return folder / "whole", time.monotonic() - began


def killed(folder: Path, output: str, step: int, **settings: Any) -> None:
    """A run that is killed once it has saved `step`."""
    child = start(folder, output, **settings)
    place = folder / output / "checkpoints" / f"step-{step:06d}"
    if not child.wait_until(place.exists):
        raise RuntimeError(child.output)
    child.kill()
    child.wait()


def finish(folder: Path, output: str, reference: Path, before: Callable[[], object] = lambda: None, **more: Any) -> str:
    """Starts a run again and waits for its end; what is not as in `reference`, "" if all is, to the bit."""
    child = start(folder, output, before=before, **more)
    code = child.wait()
    if code:
        return f"exit code {code}: {child.output[-400:]}"
    return differences(reference, folder / output)


def differences(one: Path, other: Path) -> str:
    """What is not the same, to the bit, in two finished runs; "" where nothing is."""
    for log in ("metrics", "eval", "samples"):
        mine, theirs = (_lines(each / f"{log}.jsonl") for each in (one, other))
        for number, (a, b) in enumerate(zip(mine, theirs, strict=False), 1):
            if a != b:
                return f"{log}.jsonl:{number}: {b} instead of {a}"
        if len(mine) != len(theirs):
            return f"{log}.jsonl: {len(theirs)} lines instead of {len(mine)}"
    weights = [(each / "final" / "model.safetensors").read_bytes() for each in (one, other)]
    if weights[0] != weights[1]:
        return "the final weights differ"
    left = [path.name for path in other.rglob("*") if ".deft-" in path.name]
    return f"left behind: {left}" if left else ""


def resumed(folder: Path, output: str) -> str:
    """What the last start said of where it went on, "" if it began anew."""
    lines = (folder / log_name(output)).read_text().splitlines()
    return next((line for line in reversed(lines) if line.startswith("resumed step")), "")


def message(output: str) -> str:
    """The line that deft ended with."""
    return next((line for line in reversed(output.splitlines()) if line.startswith("deft: ")), "")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in each.items() if key not in IGNORED} for each in records]
