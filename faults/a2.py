"""A2: ten kills in a row, each in the run that goes on from the one before."""

from __future__ import annotations

from pathlib import Path

from faults import runs
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "runs that are killed ten times in a row: the same bits"
FIGURE = 20


def run(scale: Scale) -> Result:
    return _thrown(scale.of(1, 4, 20), scale.of(3, 10, 10))


def control() -> Result:
    """The moments of the optimizer are not put back."""

    def forget() -> None:
        from deft.training.optim.adamw import AdamW

        restore = AdamW.restore
        AdamW.restore = lambda self, state: restore(
            self, {**self.state(), **_only(state, ("weight.", "low.", "steps"))}
        )

    return _thrown(1, 2, forget)


def _only(state: object, prefixes: tuple[str, ...]) -> dict[str, object]:
    return {key: state[key] for key in state if key.startswith(prefixes)}  # type: ignore[attr-defined, index]


def _thrown(count: int, kills: int, before: object = lambda: None) -> Result:
    with scene() as folder:
        reference, _ = runs.undisturbed(folder, checkpoint__every=1)
        points = [_kills(folder, f"run-{number}", number, kills, reference, before) for number in range(count)]
        return tally(points, runs.resumed(folder, f"run-{count - 1}"))


def _kills(folder: Path, output: str, number: int, kills: int, reference: Path, before: object) -> str:
    """Kills the run each time it has saved one step more, a little later in each run."""
    for step in range(1, kills + 1):
        child = runs.start(folder, output, before, checkpoint__every=1)  # type: ignore[arg-type]
        child.wait_until((folder / output / "checkpoints" / f"step-{step:06d}").exists)
        child.wait_until(lambda: False, 0.002 * number)
        child.kill()
        child.wait()
    return runs.finish(folder, output, reference, before, checkpoint__every=1)  # type: ignore[arg-type]
