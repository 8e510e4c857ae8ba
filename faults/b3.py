"""B3: a checkpoint that lacks a part, well formed otherwise."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from deft.core import files
from deft.training import checkpoint
from faults.harness import Result, Scale, tally
from faults.runs import killed, message, start
from faults.scenes import scene

TITLE = "parts missing: weights, optimizer, schedule, random numbers, position in the data, inputs: refused by name"
FIGURE = 6
LACKS = {part: text for part, text in checkpoint.PARTS.items() if part != "rows"}


def run(scale: Scale) -> Result:
    return _thrown(scale.of(2, 6, 6))


def control() -> Result:
    """Nobody looks for the parts; what has no optimizer state starts with none."""

    def careless() -> None:
        checkpoint.PARTS.clear()
        from deft.training.state import TrainState

        restore = TrainState.restore
        TrainState.restore = lambda state, tensors, step: restore(
            state,
            {"optimizer": state.optimizer.state(), **tensors},
            step,
        )

    return _thrown(1, careless, ["optimizer"])


def _thrown(count: int, before: Callable[[], None] = lambda: None, parts: list[str] | None = None) -> Result:
    sees, points = "", []
    with scene() as folder:
        killed(folder, "run", step=4)
        for place in (folder / "run" / "checkpoints").iterdir():
            if place.name != "step-000004":
                shutil.rmtree(place)
        for part in (parts or [*LACKS])[-count:]:
            run = folder / f"no-{part}"
            shutil.copytree(folder / "run", run)
            take_out(run / "checkpoints" / "step-000004", part)
            child = start(folder, run.name, before=before)
            code, said = child.wait(), message(child.output) or child.output[-300:]
            text = f"checkpoint has {LACKS[part]}"
            points.append("" if code == 3 and text in child.output else f"{part}: exit code {code}: {said}")
            sees = next((line.strip() for line in child.output.splitlines() if text in line), sees)
    return tally(points, re.sub(r"\S*/(?=step-)", "", sees))


def take_out(place: Path, part: str) -> None:
    """Makes a checkpoint as a tool would that does not know a part: without it, and with a manifest that agrees."""
    manifest = json.loads((place / files.MANIFEST).read_text())
    for name in [each for each in manifest["files"] if re.match(rf"{part}[-.]", each)]:
        (place / name).unlink()
        del manifest["files"][name]
    (place / files.MANIFEST).write_bytes(files._sealed({key: manifest[key] for key in ("files", "about")}))
