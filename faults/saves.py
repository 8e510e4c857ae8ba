"""Saving without a model: logs, checkpoints, retention and an export of a few bytes, and what is left of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deft.core import files
from deft.core.errors import DeftError
from deft.tracking import jsonl
from deft.tracking.jsonl import Logs
from deft.training import checkpoint
from deft.training.checkpoint import Checkpoint, Keep
from deft.training.saving import Saver

STRANGERS = ("my-notes-step-5", "step-10.backup", "step-000001.old", "step-5")
"""Folders of the user's, in the folder of checkpoints."""


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where syncing takes no time."""


def state(step: int, size: int = 5) -> Checkpoint:
    """A checkpoint whose every byte follows from its step; `size` numbers a tensor."""
    torch.manual_seed(step)
    tensors = {part: {f"{part}.{name}": torch.rand(size) for name in "ab"} for part in ("model", "optimizer", "rows")}
    values = {part: {"step": step, "of": part} for part in ("schedule", "cursor", "inputs", "random-00000")}
    return Checkpoint(step, tensors, values)


def prepare(folder: Path) -> None:
    """The user's own folders."""
    for name in STRANGERS:
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "mine.txt").write_text(name)


def save(
    folder: Path, steps: Sequence[int], mark: Callable[[str], None] = lambda what: None, first: int = 1
) -> list[str]:
    """Logs steps from `first` on, saves after each of `steps`, keeping one, as a run does, and exports; what was said.

    A save that fails is told; an export that fails raises DiskError.
    """
    said: list[str] = []
    logs = Logs.of(folder)
    with Saver(folder / "checkpoints", 1, Keep(1), said.append) as saver:
        for step in range(first, steps[-1] + 1):
            logs.metrics.write({"step": step, "loss": 1 / step})
            if step in steps:
                mark(f"begin {step}")
                saver.begin(state(step), logs.flush)
                unsaved = saver.finish()
                said += [str(unsaved)] if unsaved else []
                mark(f"failed {step}" if unsaved else f"saved {step}")
    files.write_text(folder / "config.yaml", f"steps: {steps[-1]}\n")
    with files.staged(folder / "final") as staging:
        (staging.path / "model.safetensors").write_bytes(b"weights" * 20)
        staging.write_text("README.md", "card")
    mark("exported")
    return said


def look(folder: Path, at_least: int, at_most: int, logged: bool = True) -> str:
    """What is wrong with what is left of a run, "" if a start can go on with it: whole steps only, none lost."""
    try:
        for each in (folder, folder / "checkpoints"):
            files.sweep(each)
        found = checkpoint.find(folder / "checkpoints")
    except DeftError as error:
        return f"not usable: {error}"
    step = found.checkpoint.step if found else 0
    if not at_least <= step <= at_most:
        return f"step {step} was found, {at_least} to {at_most} should be"
    if found and found.notes:
        return f"damage under a final name: {found.notes}"
    if found and not is_state(found.checkpoint):
        return f"step {step} is not what was saved"
    if logged and [line["step"] for line in jsonl.cut(folder / "metrics.jsonl", step)] != list(range(1, step + 1)):
        return f"the log does not have the steps until {step}"
    return debris(folder)


def debris(folder: Path) -> str:
    """What lies about that should not, or is damaged; "" if nothing."""
    left = [path.name for path in folder.rglob("*") if ".deft-" in path.name]
    if left:
        return f"left behind: {left}"
    lost = [name for name in STRANGERS if not (folder / "checkpoints" / name / "mine.txt").is_file()]
    if lost and (folder / "checkpoints").exists():
        return f"the user's {lost} are gone"
    try:
        if (folder / "final").exists():
            files.verify(folder / "final")
    except DeftError as error:
        return f"final: {error}"
    config = folder / "config.yaml"
    return "" if not config.exists() or config.read_text() in ("steps: 5\n", "steps: 8\n") else "config.yaml is cut"


def is_state(found: Checkpoint) -> bool:
    """Whether a checkpoint is that of its step, to the bit."""
    meant = state(found.step, len(found.tensors["model"]["model.a"]))
    return json.dumps(found.values, sort_keys=True) == json.dumps(meant.values, sort_keys=True) and all(
        torch.equal(found.tensors[part][name], tensor)
        for part, tensors in meant.tensors.items()
        for name, tensor in tensors.items()
    )
