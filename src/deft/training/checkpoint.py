"""Checkpoints: all that a run needs to go on to the same bits, verified before any of it is used.

checkpoints/step-000400/  model-00001.safetensors  optimizer-00001.safetensors  rows-00001.safetensors
                          cursor.json  schedule.json  inputs.json  random-00000.json  manifest.json

Of a state that ranks share out each writes the rows that are its own, rank 1 as model-00001-of-rank-00001.safetensors:
nothing says how many ranks have to read them.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deft.core import files
from deft.core.errors import DamagedError, DiskError, InputError
from deft.core.files import FileRecord, Staging
from deft.distributed.notes import Notes
from deft.distributed.owners import Owners
from deft.distributed.shards import Rows
from deft.distributed.world import World
from deft.training.pieces import Stored, StoredTensors, written

PARTS = {
    "model": "no weights",
    "optimizer": "no optimizer state",
    "schedule": "no schedule",
    "cursor": "no position in the data",
    "random": "no random state",
    "rows": "no digests of the rows",
    "inputs": "no record of what it was trained on",
}
"""Parts that every checkpoint has, and what is said of one that lacks it."""

_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"([a-z]+)(-\d+)?(-of-rank-\d+)?\.(safetensors|json)")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps. `values` are JSON; `loss` is the held-out one where it is known.

    rows  those of tensors that no rank holds whole, by key: then `tensors` has this rank's alone
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    loss: float | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the tensors, whole."""
        every = {key: tensor for part in self.tensors.values() for key, tensor in part.items()}
        whole = {
            key: math.prod(each.shape) * every[key].element_size() for key, each in self.rows.items() if key in every
        }
        return sum(whole.values()) + sum(tensor.nbytes for key, tensor in every.items() if key not in whole)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last ones, the best by held-out loss, and those of every n-th step."""

    last: int
    best: int = 0
    every: int | None = None


@dataclass(frozen=True)
class Found:
    """A verified checkpoint. `notes` say which newer ones are not usable, and why."""

    checkpoint: Checkpoint
    files: int
    notes: tuple[str, ...] = ()


def name(step: int) -> str:
    """
    >>> name(400)
    'step-000400'
    """
    return f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, in ascending order; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if not path.is_symlink())
    return sorted(int(match[1]) for match, path in found if match and path.name == name(int(match[1])))


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `step-000400` into `folder`, whole or not at all. Raises DiskError."""
    place = folder / name(checkpoint.step)
    with files.staged(place, _about(checkpoint)) as staging:
        _write_tensors(staging, checkpoint)
        _write_values(staging, checkpoint)
    return place


def write_own(folder: Path, checkpoint: Checkpoint, owners: Owners, notes: Notes) -> None:
    """`write` on every rank of a state that they share out: each writes what is its own, and tells rank 0 by a note
    what that was; rank 0 writes the manifest. No rank returns before all is done.

    notes  of this save alone

    Raises DiskError, on every rank, where one of them cannot write, and LostProcessError where one is lost.
    """
    try:
        if owners.world.is_first:
            _write_first(folder / name(checkpoint.step), checkpoint, owners, notes)
        else:
            _write_other(checkpoint, owners, notes)
    except Exception as error:
        if owners.world.is_first:
            notes.leave("place", "")
            notes.leave("end", str(error) or type(error).__name__)
        raise


def _write_first(place: Path, checkpoint: Checkpoint, owners: Owners, notes: Notes) -> None:
    others = range(1, owners.world.size)
    with files.staged(place, _about(checkpoint)) as staging:
        notes.leave("place", str(staging.path.absolute()))
        try:
            _write_tensors(staging, checkpoint, owners)
            _write_values(staging, checkpoint)
        finally:  # They write in this folder until they have said so.
            answers = {rank: notes.take(f"wrote/{rank}") for rank in others}
        for rank, answer in answers.items():
            if answer["error"]:
                raise DiskError(f"rank {rank}: {answer['error']}")
            staging.files.update({file: FileRecord(**each) for file, each in answer["files"].items()})
            if lost := [file for file in answer["files"] if not (staging.path / file).is_file()]:
                raise DiskError(f"{staging.path / lost[0]}: rank {rank} has written it, and rank 0 does not see it")
    notes.leave("end", "")


def _write_other(checkpoint: Checkpoint, owners: Owners, notes: Notes) -> None:
    rank, found, said = owners.world.rank, {}, ""
    if place := notes.take("place"):
        try:
            with files.shared(Path(place)) as staging:
                _write_tensors(staging, checkpoint, owners)
            found = {file: asdict(record) for file, record in staging.files.items()}
        except Exception as error:
            said = str(error) or type(error).__name__
        notes.leave(f"wrote/{rank}", {"error": said, "files": found})
    if failed := notes.take("end"):
        raise DiskError(failed)


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    held_out = checkpoint.values["inputs"].get("held_out")
    parts = [*checkpoint.tensors, *checkpoint.values]
    return {"step": checkpoint.step, "loss": checkpoint.loss, "held_out": held_out, "parts": parts}


def _write_tensors(staging: Staging, checkpoint: Checkpoint, owners: Owners | None = None) -> None:
    """What this rank has to write: its own rows, and on rank 0 all that is whole; without other ranks all there is."""
    rank, rows = owners.world.rank if owners else 0, checkpoint.rows
    others = rows.keys() - owners.own if owners else frozenset()
    for part, tensors in checkpoint.tensors.items():
        own = {key: each for key, each in tensors.items() if (key not in others if key in rows else rank == 0)}
        for number, data in enumerate(written(own, rows) if own or rank == 0 else (), 1):
            staging.write(f"{part}-{number:05d}{f'-of-rank-{rank:05d}' if rank else ''}.safetensors", data)


def _write_values(staging: Staging, checkpoint: Checkpoint) -> None:
    for part, value in checkpoint.values.items():
        staging.write_json(f"{part}.json", value)


def read(folder: Path, step: int, world: World = World()) -> Found:  # noqa: B008  frozen
    """A checkpoint, every byte of it verified before any is used; its tensors are read when they are asked for, and
    checked again while they are.

    world  of ranks that all read it: each verifies its share of the files

    Raises DamagedError that names the file, or the part that is missing, on every rank; so does a tensor.
    """
    place = folder / name(step)
    try:
        manifest = _manifest(place, step)
        _stop_if_parts_lack(place, list(manifest.files))
        files.verify(place, share=(world.rank, world.size))
        tensors, values = _opened(place, manifest)
        complaint = ""
    except DamagedError as error:
        complaint = str(error)
    if complaint := world.first_complaint(complaint):
        raise DamagedError(complaint)
    return Found(Checkpoint(step, tensors, values, manifest.about.get("loss")), len(manifest.files) + 1)


def _opened(place: Path, manifest: files.Manifest) -> tuple[dict[str, StoredTensors], dict[str, Any]]:
    tensors: dict[str, list[Stored]] = {}
    values: dict[str, Any] = {}
    for file, record in manifest.files.items():
        if file.endswith(".safetensors"):
            tensors.setdefault(file.partition("-")[0], []).append(Stored(place / file, record))
        else:
            values[file.removesuffix(".json")] = json.loads(files.read(place / file, record))
    return {part: StoredTensors(stored) for part, stored in tensors.items()}, values


def find(folder: Path, wanted: str = "auto", world: World = World()) -> Found | None:  # noqa: B008  frozen
    """The newest usable checkpoint, or the one that is `wanted`; None where there is none at all.

    world  of ranks that all look for it

    Raises DamagedError where there are some, but none is usable; InputError where the one wanted does not exist.
    """
    there = world.from_first("checkpoints", lambda: steps(folder))
    if wanted != "auto":
        match = _NAME.fullmatch(wanted)
        if match is None or int(match[1]) not in there:
            known = ", ".join(map(name, there)) or "none"
            raise InputError(f"resume: there is no {wanted} in {folder}; there is {known}")
        return read(folder, int(match[1]), world)
    complaints: list[str] = []
    for step in reversed(there):
        try:
            found = read(folder, step, world)
        except DamagedError as error:
            complaints.append(str(error))
            continue
        redone = f"Using step-{step}; {there[-1] - step} steps will be redone"
        notes = (*complaints[:-1], f"{complaints[-1]}. {redone}") if complaints else ()
        return Found(found.checkpoint, found.files, notes)
    if complaints:
        fix = "bring the files back from a copy, or train anew with another output="
        raise DamagedError("\n  ".join([f"{folder}: no checkpoint is usable; {fix}", *complaints]))
    return None


def set_aside(folder: Path, step: int) -> list[str]:
    """Renames what is newer than `step`, so that it is never taken for a part of what comes now; says so."""
    notes = []
    for newer in reversed([each for each in steps(folder) if each > step]):
        target = files.set_aside(folder / name(newer))
        notes.append(f"{name(newer)} is set aside as {target.name}; delete it if it is not wanted")
    return notes


def retain(folder: Path, keep: Keep) -> list[int]:
    """Removes what need not be kept, and names it. What is not provably a whole checkpoint of deft is neither counted
    nor touched; the order is that of steps, whatever the clock says."""
    found = losses(folder)
    removed = []
    for step in sorted(found.keys() - kept(found, keep)):
        try:
            files.remove(folder / name(step))
            removed.append(step)
        except (InputError, DamagedError):
            continue
    return removed


def losses(folder: Path) -> dict[int, float | None]:
    """The held-out loss of each checkpoint whose files are all there, by step; None where it was not measured, or on
    other rows than the newest one's."""
    found: dict[int, Mapping[str, Any]] = {}
    for step in steps(folder):
        with suppress(DamagedError):
            found[step] = _complete(folder / name(step), step).about
    rows = found[max(found)].get("held_out") if found else None
    return {step: about.get("loss") if about.get("held_out") == rows else None for step, about in found.items()}


def kept(losses: Mapping[int, float | None], keep: Keep) -> set[int]:
    """The steps that stay, by step and held-out loss.

    >>> sorted(kept({100: 0.5, 200: 0.3, 300: 0.4, 400: None, 500: 0.6}, Keep(last=1, best=1, every=400)))
    [200, 400, 500]
    """
    measured = sorted((loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
    regular = {step for step in losses if keep.every is not None and step % keep.every == 0}
    return {*sorted(losses)[-keep.last :], *(step for _, step in measured[: keep.best]), *regular}


def unsaved(folder: Path, checkpoint: Checkpoint, error: Exception) -> str:
    """What a user should know of a checkpoint that could not be written."""
    older = [name(step) for step in steps(folder)]
    still = f"still have {older[-1]}" if older else "there is no checkpoint yet"
    if not is_full(error):
        return f"{error}; {still}"
    return (
        f"disk full: {name(checkpoint.step)} needs {size(checkpoint.bytes)}, "
        f"{size(_free(folder))} free in {folder}; {still}"
    )


def is_full(error: BaseException) -> bool:
    """Whether the disk, a quota or a limit on file sizes was behind an error."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def size(count: int) -> str:
    """
    >>> size(1_900_000_000), size(370_000), size(12)
    ('1.9 GB', '0.4 MB', '0.0 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _manifest(place: Path, step: int) -> files.Manifest:
    manifest = files.read_manifest(place)
    if manifest.about.get("step") != step:
        raise DamagedError(f"{place}: holds step {manifest.about.get('step')}, not {step}")
    return manifest


def _complete(place: Path, step: int) -> files.Manifest:
    """The manifest of a checkpoint whose files are all there; their content is not looked at."""
    manifest = _manifest(place, step)
    for file, record in manifest.files.items():
        path = place / file
        if path.is_symlink() or not path.is_file() or path.stat().st_size != record.bytes:
            raise DamagedError(f"{path}: is not as it was written")
    return manifest


def _stop_if_parts_lack(place: Path, listed: Sequence[str]) -> None:
    for part, complaint in PARTS.items():
        own = [file for file in listed if (match := _FILE.fullmatch(file)) and match[1] == part]
        lost = [file for file in own if not (place / file).is_file()]
        if not own or lost:
            raise DamagedError(f"{place}: checkpoint has {complaint}" + (f" ({lost[0]} is missing)" if lost else ""))


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free
