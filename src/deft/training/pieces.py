"""Tensors in safetensors files, whole or as pieces: some rows of a tensor, in a file of the rank that held them.

A file says of a piece in its metadata where it begins and how many rows the whole has: {"weight.a": "4 of 10"}.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft.core import files
from deft.core.errors import DamagedError
from deft.distributed.shards import Rows

SHARD = 1 << 30
"""Tensors of a part go to files of about this many bytes, which are verified side by side."""

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""In the order of the safetensors library, which writes the last of them first."""
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}
_RANKS = {dtype: place for place, dtype in enumerate(_DTYPES)}


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Their names in the order of a file: larger elements first, so that each lies at a multiple of its element's size.

    >>> in_order({"a": torch.tensor([1, 2], dtype=torch.int8), "c": torch.tensor(0.5), "b": torch.tensor(0.5)})
    ['b', 'c', 'a']
    """
    return sorted(tensors, key=lambda key: (-_RANKS[tensors[key].dtype], key))


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """How a safetensors file begins, with the dtypes and shapes of its tensors, which may be on the meta device."""
    found: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in in_order(tensors):
        begin, end = end, end + tensors[key].nbytes
        place = {"shape": [*tensors[key].shape], "data_offsets": [begin, end]}
        found[key] = {"dtype": _DTYPES[tensors[key].dtype], **place}
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> Iterator[Any]:
    """Tensors on the CPU as the bytes of a safetensors file, piece by piece: no second copy is made.

    >>> import safetensors.torch
    >>> data = b"".join(bytes(piece) for piece in serialised({"a": torch.tensor([1, 2]), "b": torch.tensor(0.5)}))
    >>> sorted(safetensors.torch.load(data).items())
    [('a', tensor([1, 2])), ('b', tensor(0.5000))]
    """
    yield header(tensors, metadata)
    for key in in_order(tensors):
        yield bytes_of(tensors[key])


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, as an array."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def written(tensors: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> Iterator[Iterator[Any]]:
    """The bytes of files of about `SHARD` bytes each, at least of one; `rows` say which of a tensor's these are."""
    for shard in _shards(tensors):
        pieces = {key: each for key in shard if (each := rows.get(key)) and each.stop - each.start < each.shape[0]}
        yield serialised(shard, {key: f"{each.start} of {each.shape[0]}" for key, each in pieces.items()})


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


class Stored:
    """The tensors of a safetensors file that was verified, each read when it is asked for.

    rows  which rows of the whole each of them is

    Raises DamagedError where a byte has changed since.
    """

    def __init__(self, path: Path, record: files.FileRecord) -> None:
        self.path, self._file = path, files.Blocks(path, record)
        length = int.from_bytes(self._file.read(0, 8), "little")
        self._begin = 8 + length
        self._header = json.loads(self._file.read(8, self._begin))
        starts = self._header.pop("__metadata__", {})
        self.rows = {key: _rows(tuple(each["shape"]), starts.get(key)) for key, each in self._header.items()}

    def dtype(self, key: str) -> torch.dtype:
        return _TYPES[self._header[key]["dtype"]]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of the whole tensor, all of which this file has. Of a number, which has one, it is the number."""
        own, shape = self.rows[key], self._header[key]["shape"]
        begin, end = self._header[key]["data_offsets"]
        count = own.stop - own.start
        row = (end - begin) // count if count else 0
        first = self._begin + begin + (start - own.start) * row
        shape = [stop - start, *shape[1:]] if shape else []
        if not row or start == stop:
            return torch.empty(shape, dtype=self.dtype(key))
        data = np.empty((stop - start) * row, np.uint8)  # which is not filled with zeros first, and lies in huge pages
        self._file.fill(data.data, first, first + len(data))
        return torch.from_numpy(data).view(self.dtype(key)).reshape(shape)


def _rows(shape: tuple[int, ...], start: str | None) -> Rows:
    """
    >>> _rows((2, 3), "4 of 10")
    Rows(shape=(10, 3), start=4, stop=6)
    """
    held = shape[0] if shape else 1
    if start is None:
        return Rows(shape, 0, held)
    first, count = map(int, start.split(" of "))
    return Rows((count, *shape[1:]), first, first + held)


class StoredTensors(Mapping[str, Tensor]):
    """The whole tensors of a part of a checkpoint by name, or rows of them, from the files that have these.

    Raises DamagedError where the files do not have each row of each tensor once.
    """

    def __init__(self, stored: Collection[Stored]) -> None:
        homes: defaultdict[str, list[Stored]] = defaultdict(list)
        for each in stored:
            for key in each.rows:
                homes[key].append(each)
        self._homes = {key: sorted(found, key=lambda each: each.rows[key].start) for key, found in homes.items()}
        for key, found in self._homes.items():
            _stop_unless_whole(key, found)

    def shape(self, key: str) -> tuple[int, ...]:
        """That of the whole."""
        return self._homes[key][0].rows[key].shape

    def __getitem__(self, key: str) -> Tensor:
        shape = self.shape(key)
        return self.read(key, 0, shape[0] if shape else 1)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, wherever they are."""
        found = []
        for each in self._homes[key]:
            first, last = max(start, each.rows[key].start), min(stop, each.rows[key].stop)
            if first < last:
                found.append((each, first, last))
        if len(found) <= 1:
            each, first, last = found[0] if found else (self._homes[key][0], start, start)
            return each.read(key, first, last)
        shape = (stop - start, *self.shape(key)[1:])
        whole = torch.empty(shape, dtype=found[0][0].dtype(key))
        for each, first, last in found:
            whole[first - start : last - start] = each.read(key, first, last)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def _stop_unless_whole(key: str, found: list[Stored]) -> None:
    first, end = found[0], 0
    for each in found:
        own = each.rows[key]
        if (own.shape, each.dtype(key)) != (first.rows[key].shape, first.dtype(key)):
            raise DamagedError(f"{each.path}: {key} is not of the shape that {first.path.name} has it in")
        if own.start != end:
            kind = "missing" if own.start > end else "there twice"
            raise DamagedError(f"{each.path}: rows {min(end, own.start)}:{max(end, own.start)} of {key} are {kind}")
        end = own.stop
    count = first.rows[key].shape[0] if first.rows[key].shape else 1
    if end != count:
        raise DamagedError(f"{found[-1].path}: rows {end}:{count} of {key} are missing")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Those of whole tensors, which are not read where they are stored."""
    if isinstance(tensors, StoredTensors):
        return {key: tensors.shape(key) for key in tensors}
    return {key: tuple(each.shape) for key, each in tensors.items()}


class Held(Mapping[str, Tensor]):
    """Of tensors that are stored, what a rank holds: its rows of those in `rows`, and the others whole.

    Raises ValueError where the whole is of another shape.
    """

    def __init__(self, stored: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> None:
        self._stored, self._rows = stored, rows

    def __getitem__(self, key: str) -> Tensor:
        rows = self._rows.get(key)
        if rows is None:
            return self._stored[key]
        assert isinstance(self._stored, StoredTensors), key
        if (shape := self._stored.shape(key)) != rows.shape:
            raise ValueError(f"{key}: {[*shape]}, not {[*rows.shape]}")
        return self._stored.read(key, rows.start, rows.stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
