"""Which step of a run becomes final/: the last, or with `checkpoint.keep_best` the best checkpoint by held-out loss."""

from __future__ import annotations

from pathlib import Path

from deft.distributed.world import World
from deft.tracking import jsonl
from deft.training import checkpoint, resuming
from deft.training.state import TrainState


def take(folder: Path, state: TrainState, keep_best: int) -> str:
    """Moves a state at the end of its run to the best checkpoint, the last step among them; says which that is.

    Nothing where no best one is kept. Raises DamagedError where the best one is not as it was written.
    """
    world = state.world if state.rows() else World()
    step, text = world.from_first("the best step", lambda: _best(folder, state.step, keep_best))
    if step != state.step:
        resuming.restore(state, checkpoint.read(folder / "checkpoints", step, world).checkpoint)
    return str(text)


def _best(folder: Path, last: int, keep_best: int) -> tuple[int, str]:
    """The step to hand over, and what is said of it."""
    saved = checkpoint.losses(folder / "checkpoints")
    evaluated = {
        each["step"]: each["loss"] for each in jsonl.read(folder / "eval.jsonl") if _is_number(each.get("loss"))
    }
    evaluated |= {step: loss for step, loss in saved.items() if loss is not None}
    found = {step: loss for step, loss in evaluated.items() if step in saved or step == last}
    if not keep_best or not found:
        return last, ""
    step = min(found, key=lambda each: (found[each], each))
    return step, described(step, last, evaluated)


def described(step: int, last: int, losses: dict[int, float]) -> str:
    """
    >>> described(6, 12, {3: 0.7, 6: 0.5, 12: 0.9})
    'step 6 of 12, the best checkpoint by held-out loss: 0.5000, the last has 0.9000'
    >>> described(12, 12, {0: 0.4, 6: 0.8, 12: 0.5})
    'step 12 of 12, the best checkpoint by held-out loss: 0.5000; step 0, which is not saved, had 0.4000'
    """
    best, after = min(losses, key=lambda each: (losses[each], each)), losses.get(last)
    against = f", the last has {after:.4f}" if step != last and after is not None else ""
    unsaved = f"; step {best}, which is not saved, had {losses[best]:.4f}" if losses[best] < losses[step] else ""
    return f"step {step} of {last}, the best checkpoint by held-out loss: {losses[step]:.4f}{against}{unsaved}"


def _is_number(value: object) -> bool:
    """A loss that is not finite is text in a log."""
    return isinstance(value, int | float)
