"""Encoded rows -> a padded batch, for trainers that are not deft's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deft.core.errors import InputError
from deft.core.types import IGNORED
from deft.encoding import tokenizer as tokenizers

Batch = dict[str, Tensor]


def collator(tokenizer: Any) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """What makes batches of the rows of `deft.encode`: `data_collator` of a Trainer, `collate_fn` of a DataLoader.

    Rows are padded on the right to the longest: `input_ids` with the tokenizer's pad token (EOS where it has none),
    `labels` with -100, `attention_mask` with 0.

    tokenizer  a fast Hugging Face tokenizer, or the folder of one
    """
    held = tokenizers.of(tokenizer)
    pad = next((each for each in (held.hf.pad_token_id, held.eos_id) if each is not None), None)
    if pad is None:
        raise InputError("tokenizer: it has neither a pad token nor EOS to pad with; set tokenizer.pad_token")
    padding = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        return {name: _padded([row[name] for row in rows], filler) for name, filler in padding.items()}

    return collate


def _padded(values: Sequence[Sequence[int]], filler: int) -> Tensor:
    """int64 [rows, longest].

    >>> _padded([[5, 6], [7]], 0).tolist()
    [[5, 6], [7, 0]]
    """
    width = max(map(len, values))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])
