"""What the headers of a model's safetensors files say: names, dtypes and shapes, without reading a weight."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from deft.core.errors import Problem, Problems
from deft.model.security import INDEX

SINGLE = "model.safetensors"
CARRIED = "carried.safetensors"
"""Weights that a model does not take, which an export of deft has taken over from its base."""
_AGAIN = "download or save the model again"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor of a file; dtype as safetensors names it, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the files that transformers would read from a model folder, by name.

    Raises Problems, one a file, where one is missing, cut, or is no safetensors file; where a tensor lies in two of
    them, or in another one than their index says.
    """
    found: dict[str, TensorHeader] = {}
    problems = []
    index = _index(folder)
    for path in _files(folder):
        header = _header(path)
        if isinstance(header, Problem):
            problems.append(header)
            continue
        if twice := sorted(header.keys() & found.keys()):
            problems.append(
                Problem(str(path), f"has {twice[0]}, which {found[twice[0]].file.name} has as well", _AGAIN)
            )
        if elsewhere := sorted(name for name in header if folder / index.get(name, path.name) != path):
            what = f"has {elsewhere[0]}, which {INDEX} says is in {index[elsewhere[0]]}"
            problems.append(Problem(str(path), what, _AGAIN))
        found |= header
    if problems:
        raise Problems("the weights cannot be loaded:", problems)
    return found


def dtype(tensors: dict[str, TensorHeader]) -> str | None:
    """In which of torch's floating dtypes most of the weights lie; None where there are none."""
    sizes = _sizes(tensors)
    return max(sizes, key=sizes.__getitem__, default=None)


def dtypes(tensors: dict[str, TensorHeader]) -> tuple[str, ...]:
    """All of torch's floating dtypes that weights lie in."""
    return tuple(sorted(_sizes(tensors)))


def _sizes(tensors: dict[str, TensorHeader]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for each in tensors.values():
        if each.dtype in _DTYPES:
            sizes[_DTYPES[each.dtype]] += prod(each.shape)
    return sizes


def _files(folder: Path) -> list[Path]:
    listed = sorted(set(_index(folder).values()))
    return [folder / name for name in listed or (SINGLE, CARRIED) if listed or (folder / name).is_file()]


def _index(folder: Path) -> dict[str, str]:
    """Which file has which tensor, as the index of several says; nothing where there is one file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    found: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return found


def _header(path: Path) -> dict[str, TensorHeader] | Problem:
    """The format of safetensors: 8 bytes with the length of a JSON header, the header, the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(start := file.read(8), "little")
            text = file.read(length) if length < size else b""
    except OSError as error:
        return Problem(str(path), f"cannot be read ({error.strerror})", _AGAIN)
    if start == b"version ":
        return Problem(str(path), "is a pointer of git-lfs, not the weights", "run git lfs pull in the folder")
    if size < 8 + length:
        return Problem(str(path), "is cut off inside its header, or no safetensors file", _AGAIN)
    try:
        entries = {name: each for name, each in json.loads(text).items() if name != "__metadata__"}
        found = {name: TensorHeader(path, each["dtype"], tuple(each["shape"])) for name, each in entries.items()}
        ends = max((each["data_offsets"][1] for each in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return Problem(str(path), "has a header that is none of safetensors", _AGAIN)
    if size != 8 + length + ends:
        return Problem(
            str(path), f"has {size:,} bytes, its header says {8 + length + ends:,}: it is cut or damaged", _AGAIN
        )
    return found
