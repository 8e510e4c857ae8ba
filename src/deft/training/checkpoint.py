"""Checkpoints: all that a run needs to go on to the same bits, verified before any of it is used.

checkpoints/step-000400/  model-00001.safetensors  optimizer-00001.safetensors  rows-00001.safetensors
                          cursor.json  schedule.json  inputs.json  random-00000.json  manifest.json
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deft.core import files
from deft.core.errors import DamagedError, InputError

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

SHARD = 1 << 30
"""Tensors of a part go to files of about this many bytes, which are verified side by side."""

_NAME = re.compile(r"step-(\d{6,})")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps. `values` are JSON; `loss` is the held-out one where it is known."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    loss: float | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for part in self.tensors.values() for tensor in part.values())


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
    about = {"step": checkpoint.step, "loss": checkpoint.loss, "parts": [*checkpoint.tensors, *checkpoint.values]}
    place = folder / name(checkpoint.step)
    with files.staged(place, about) as staging:
        for part, tensors in checkpoint.tensors.items():
            for number, shard in enumerate(_shards(tensors), 1):
                staging.write(f"{part}-{number:05d}.safetensors", serialised(shard))
        for part, value in checkpoint.values.items():
            staging.write_json(f"{part}.json", value)
    return place


def read(folder: Path, step: int) -> Found:
    """A checkpoint, every byte of it verified before any is used; its tensors are read when they are asked for, and
    checked again while they are.

    Raises DamagedError that names the file, or the part that is missing; so does a tensor.
    """
    place = folder / name(step)
    manifest = _manifest(place, step)
    _stop_if_parts_lack(place, list(manifest.files))
    files.verify(place)
    tensors: dict[str, list[Any]] = {}
    values: dict[str, Any] = {}
    for file, record in manifest.files.items():
        if file.endswith(".safetensors"):
            tensors.setdefault(file.rpartition("-")[0], []).append(Stored(place / file, record))
        else:
            values[file.removesuffix(".json")] = json.loads(files.read(place / file, record))
    stored = {part: ChainMap(*shards) for part, shards in tensors.items()}
    return Found(Checkpoint(step, stored, values, manifest.about.get("loss")), len(manifest.files) + 1)


def find(folder: Path, wanted: str = "auto") -> Found | None:
    """The newest usable checkpoint, or the one that is `wanted`; None where there is none at all.

    Raises DamagedError where there are some, but none is usable; InputError where the one wanted does not exist.
    """
    there = steps(folder)
    if wanted != "auto":
        match = _NAME.fullmatch(wanted)
        if match is None or int(match[1]) not in there:
            known = ", ".join(map(name, there)) or "none"
            raise InputError(f"resume: there is no {wanted} in {folder}; there is {known}")
        return read(folder, int(match[1]))
    complaints: list[str] = []
    for step in reversed(there):
        try:
            found = read(folder, step)
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
    """The held-out loss of each checkpoint whose files are all there, by step; None where it was not measured."""
    found: dict[int, float | None] = {}
    for step in steps(folder):
        with suppress(DamagedError):
            found[step] = _complete(folder / name(step), step).about.get("loss")
    return found


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


def serialised(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Tensors on the CPU as the bytes of a safetensors file, piece by piece: no second copy is made.

    >>> import safetensors.torch
    >>> data = b"".join(bytes(piece) for piece in serialised({"a": torch.tensor([1, 2]), "b": torch.tensor(0.5)}))
    >>> sorted(safetensors.torch.load(data).items())
    [('a', tensor([1, 2])), ('b', tensor(0.5000))]
    """
    # Larger elements first, so that each tensor lies at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard


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
        own = [file for file in listed if re.fullmatch(rf"{part}(-\d+)?\.(safetensors|json)", file)]
        lost = [file for file in own if not (place / file).is_file()]
        if not own or lost:
            raise DamagedError(f"{place}: checkpoint has {complaint}" + (f" ({lost[0]} is missing)" if lost else ""))


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file that was verified, each read when it is asked for.

    Raises DamagedError where a byte has changed since.
    """

    def __init__(self, path: Path, record: files.FileRecord) -> None:
        self._file = files.Blocks(path, record)
        length = int.from_bytes(self._file.read(0, 8), "little")
        self._begin = 8 + length
        self._header = json.loads(self._file.read(8, self._begin))
        self._header.pop("__metadata__", None)

    def __getitem__(self, key: str) -> Tensor:
        found = self._header[key]
        begin, end = (self._begin + offset for offset in found["data_offsets"])
        dtype, shape = _TYPES[found["dtype"]], found["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._file.read(begin, end), dtype=dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
