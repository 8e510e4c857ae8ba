"""Models of which a rank gets its rows: their weights have no memory, and rows of them are asked for by name.

They come from the files, where these have each weight as it is, or from a whole model on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.model import adapters
from deft.model.load import Base, StoredRows, shared_names
from deft.model.trainable import Trainable

Rows = Callable[[str, int, int], Tensor]
"""Name of a parameter, which is asked for once, start and stop -> these rows, on the CPU, which may be written to."""


def of_whole(model: PreTrainedModel, dtype: torch.dtype) -> Rows:
    """The rows of a model's weights, which it no longer has: its own are in `dtype`, without memory."""
    held = {name: each.detach() for name, each in model.named_parameters()}
    _replace(model, partial(torch.empty_like, device="meta", dtype=dtype))
    return lambda name, start, stop: held.pop(name)[start:stop]


def of_files(model: PreTrainedModel, base: Base, trainable: Trainable, dtype: torch.dtype) -> Rows | None:
    """The same of a model that `without_weights` has made, into which this puts what `trainable` says.

    Adapters have the values that they would have in a whole model; torch's generators are left as that leaves them.

    None where these are made of whole matrices of the base.
    """
    stored, names = StoredRows(base), {each[0]: each for each in shared_names(model)}
    start = None if trainable.adapter is None else trainable.adapter.start
    if start is not None and not adapters.is_alone(Path(start)):
        return None
    # What takes no memory has a device and a dtype all the same, which peft gives the adapters.
    _replace(model, lambda each: torch.zeros((), dtype=each.dtype).expand(each.shape))
    trainable.apply(model)
    if start is not None:
        adapters.fill(model, Path(start))
    lengths = {} if start is not None else adapters.lengths(model)
    if lengths is None:
        return None
    own = {name: each.detach() for name, each in model.named_parameters() if _in_files(name) not in names}
    kinds = {name: each.dtype for name, each in model.named_parameters()}
    _replace(model, partial(torch.empty_like, device="meta", dtype=dtype))

    def rows(name: str, start: int, stop: int) -> Tensor:
        if name in lengths:
            weight, length = lengths[name]
            return length(stored.read(names[_in_files(weight)], start, stop).to(kinds[weight]), start, stop)
        return own[name][start:stop].clone() if name in own else stored.read(names[_in_files(name)], start, stop)

    return rows


def _in_files(name: str) -> str:
    """What the files call a weight that may have an adapter."""
    return name.replace(f"{adapters.BASE}.", ".")


def _replace(model: nn.Module, make: Callable[[nn.Parameter], Any]) -> None:
    """Gives a model other parameters; what is one stays one."""
    made = {id(each): nn.Parameter(make(each), requires_grad=each.requires_grad) for each in model.parameters()}
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = made[id(each)]
