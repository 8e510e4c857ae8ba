"""A1: kill -9 at a random moment, of runs that train all weights, and of one that trains an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from faults import ranks, runs
from faults.harness import Result, Scale, spread, tally
from faults.scenes import scene

TITLE = "kill -9 at random moments, of full fine-tuning, an adapter, one of two ranks: resumed to the same bits"
FIGURE = 280
ADAPTER = {"adapter__name": "lora", "adapter__r": 8, "adapter__dropout": 0.1, "precision": "bf16"}


def run(scale: Scale) -> Result:
    each = scale.of(10, 30, 100)
    arms = [({"precision": "fp32"}, each), ({"precision": "bf16"}, each), (ADAPTER, scale.of(3, 10, 30))]
    points, sees = list[str](), ""
    for seed, (settings, count) in enumerate(arms):
        thrown, seen = _thrown(seed, count, settings)
        points, sees = points + thrown, seen or sees
    return tally(points + _thrown_at_ranks(scale.of(1, 5, 50)), sees)


def control() -> Result:
    """The random numbers of dropout are not put back."""

    def forget() -> None:
        from deft.training import randomness

        randomness.restore = lambda state: None

    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        runs.killed(folder, "run", step=4)
        return tally([runs.finish(folder, "run", reference, forget)])


def _thrown(seed: int, count: int, settings: dict[str, Any]) -> tuple[list[str], str]:
    """The points of one arm, and what a user sees."""
    points, sees = list[str](), ""
    with scene() as folder:
        reference, seconds = runs.undisturbed(folder, **settings)
        for number, moment in enumerate(spread(seed, count, 0.25 * seconds, seconds)):
            points.append(_kill(folder, f"run-{number}", moment, reference, settings))
            sees = runs.resumed(folder, f"run-{number}") or sees
    return points, sees


def _thrown_at_ranks(count: int) -> list[str]:
    """The same with two ranks, one of which is killed; the other sees it and ends."""
    points = list[str]()
    with scene() as folder:
        reference, seconds = runs.undisturbed(folder, **ranks.SETTINGS)
        for number, moment in enumerate(spread(9, count, 0.25 * seconds, 2 * seconds)):
            started = ranks.start(folder, f"run-{number}", 2)
            victim = started.children[number % 2]
            victim.wait_until(lambda: False, moment)
            victim.kill()
            started.wait()
            wrong = ranks.finish(folder, f"run-{number}", 2, reference)
            points.append(f"rank {number % 2} of 2 killed at {moment:.2f} s: {wrong}" if wrong else "")
    return points


def _kill(folder: Path, output: str, moment: float, reference: Path, settings: dict[str, Any]) -> str:
    child = runs.start(folder, output, **settings)
    child.wait_until(lambda: False, moment)
    child.kill()
    child.wait()
    wrong = runs.finish(folder, output, reference, **settings)
    if settings is ADAPTER:
        wrong = wrong or _of_the_base(reference) or _of_the_base(folder / output)
    return f"killed at {moment:.2f} s: {wrong}" if wrong else ""


def _of_the_base(run: Path) -> str:
    """What of the base is in the checkpoints of a run, which are to hold the adapter alone."""
    parts = sorted((run / "checkpoints").glob("step-*/[mo]*.safetensors"))
    if not parts:
        return f"{run} has no checkpoints"
    for part in parts:
        with safe_open(part, "pt") as tensors:
            # Beside weights: the optimizer's count of steps, and the tables of rotary positions.
            odd = [key for key in tensors.keys() if not key.startswith(("buffer.", "steps")) and "lora_" not in key]  # noqa: SIM118
        if odd:
            return f"{part} holds {odd[0]}"
    return ""
