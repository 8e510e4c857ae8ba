"""What `deft.encode` gives: rows as other trainers take them, each with what deft knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from deft.core.types import Encoded, Origin

COLUMNS = ("input_ids", "attention_mask", "labels")
"""What models of transformers take, as they call it."""


@dataclass(frozen=True, slots=True)
class TrainerRow(Encoded, Mapping[str, Any]):
    """An encoded row that is also a mapping of COLUMNS to lists.

    >>> row = TrainerRow(Origin("rows", 1), np.array([5, 6, 7], np.int32), np.array([0, 1, 1], np.float32))
    >>> dict(row)
    {'input_ids': [5, 6, 7], 'attention_mask': [1, 1, 1], 'labels': [-100, 6, 7]}
    """

    def __getitem__(self, name: str) -> list[int]:
        if name == "attention_mask":
            return [1] * len(self.tokens)
        found: list[int] = {"input_ids": self.tokens, "labels": self.labels}[name].tolist()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)

    @property
    def is_in_labels(self) -> bool:
        """Whether labels say all that its weights do: a token is learnt, or it is not."""
        return bool(np.isin(self.weights, (0, 1)).all())


@dataclass(frozen=True)
class EncodedRows(Sequence[TrainerRow]):
    """Encoded rows in their order, and the refused: [(origin, reason), ...]."""

    rows: tuple[TrainerRow, ...]
    refused: tuple[tuple[Origin, str], ...]

    @overload
    def __getitem__(self, index: int) -> TrainerRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TrainerRow]: ...
    def __getitem__(self, index: int | slice) -> TrainerRow | Sequence[TrainerRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"EncodedRows({len(self.rows)} rows, {len(self.refused)} refused)"

    def to_list(self) -> list[dict[str, list[int]]]:
        """The rows as plain dicts: `datasets.Dataset.from_list(batch.to_list())`."""
        return [dict(row) for row in self.rows]
