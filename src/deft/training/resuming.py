"""What a run puts into a checkpoint, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from deft.core.errors import DiskError
from deft.training import randomness
from deft.training.checkpoint import Checkpoint
from deft.training.pieces import Held, shapes
from deft.training.saving import Saver
from deft.training.state import TrainState


def take(
    state: TrainState,
    rows: Mapping[str, Tensor],
    *,
    cursor: Mapping[str, Any],
    schedule: Mapping[str, Any],
    inputs: Mapping[str, Any],
    loss: float | None = None,
) -> Checkpoint:
    """All that the run needs to go on from here, copied.

    rows      the digests of the rows that are trained
    cursor    where the run is in its data, beside its step; schedule, inputs: what both follow from
    loss      the held-out one, where it was measured

    Raises NumbersError where a value is not finite: a run would come to the same end from it again.
    """
    state.stop_if_broken(f"the update of step {state.step} leaves values that are not finite")
    values = {
        "cursor": {"step": state.step, "skipped": state.skipped, **cursor},
        "schedule": {**schedule, "step": state.step},
        "random-00000": randomness.as_json(randomness.snapshot()),
        "inputs": inputs,
    }
    return Checkpoint(state.step, {**state.tensors(), "rows": rows}, values, loss, state.rows())


def restore(state: TrainState, stored: Checkpoint) -> None:
    """State and random generators as they were when the checkpoint was taken, by however many ranks.

    Raises NumbersError where it is not finite.
    """
    held = {part: Held(tensors, state.rows_of(shapes(tensors))) for part, tensors in stored.tensors.items()}
    state.restore(held, stored.step)
    state.skipped = stored.values["cursor"]["skipped"]
    randomness.restore(randomness.from_json(stored.values["random-00000"]))
    state.stop_if_broken(f"step-{stored.step:06d} holds values that are not finite; resume= names one before it")


def save_rest(
    state: TrainState, saver: Saver, make: Callable[[], Checkpoint], flush: Callable[[], None]
) -> DiskError | None:
    """Saves the steps that are done, unless they are saved; what was wrong with that.

    An update that was broken off is not saved: some weights have had it, some not. All ranks that share a model do it.
    """
    try:
        unsaved = saver.finish()
        if state.step and not state.is_torn and (unsaved or saver.newest != state.step):
            saver.begin(make(), flush)
            unsaved = saver.finish()
    except Exception as error:  # What ended the run may have taken the device with it; it is what the user must see.
        return DiskError(f"step {state.step} could not be saved ({type(error).__name__}: {error})")
    return unsaved
