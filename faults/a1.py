"""A1: kill -9 at a random moment."""

from __future__ import annotations

from pathlib import Path

from faults import runs
from faults.harness import Result, Scale, spread, tally
from faults.scenes import scene

TITLE = "kill -9 at random moments: resumed to the same bits by the same command"
FIGURE = 200
PRECISIONS = ("fp32", "bf16")


def run(scale: Scale) -> Result:
    return _thrown(scale.of(20, 60, 200))


def control() -> Result:
    """The random numbers of dropout are not put back."""

    def forget() -> None:
        from deft.training import randomness

        randomness.restore = lambda state: None

    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        runs.killed(folder, "run", step=4)
        return tally([runs.finish(folder, "run", reference, forget)])


def _thrown(count: int) -> Result:
    points, sees = list[str](), ""
    for seed, precision in enumerate(PRECISIONS):
        with scene() as folder:
            reference, seconds = runs.undisturbed(folder, precision=precision)
            for number, moment in enumerate(spread(seed, count // 2, 0.25 * seconds, seconds)):
                points.append(_kill(folder, f"run-{number}", moment, reference, precision))
                sees = runs.resumed(folder, f"run-{number}") or sees
    return tally(points, sees)


def _kill(folder: Path, output: str, moment: float, reference: Path, precision: str) -> str:
    child = runs.start(folder, output, precision=precision)
    child.wait_until(lambda: False, moment)
    child.kill()
    child.wait()
    wrong = runs.finish(folder, output, reference, precision=precision)
    return f"killed at {moment:.2f} s: {wrong}" if wrong else ""
