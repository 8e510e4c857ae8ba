"""What training changes, and how it is saved and restored. It has one owner: the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deft.core.errors import InputError, NumbersError
from deft.distributed import sharding
from deft.distributed.sharding import Layout, Sharded
from deft.distributed.shards import Rows
from deft.distributed.world import World
from deft.model import selftest
from deft.model.causal_lm import CausalLM
from deft.model.in_rows import Rows as ReadRows
from deft.training.masters import Masters, check_state

SHOWN = 3
"""How many tensors are named."""


class Optimizer(Protocol):
    """An update rule over `Masters`."""

    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """One update of all masters that have a gradient, at rate `lr`, with gradients times `scale`."""
        ...

    def served(self) -> Iterable[tuple[str, Tensor]]:
        """The fp32 masters, by name, that are evaluated and handed over in place of those that are trained."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The live tensors that a resumed run needs beside the masters."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave. Raises ValueError, with nothing changed, where it does not fit."""
        ...


@dataclass
class TrainState:
    """What training changes.

    step     optimizer steps that are done
    skipped  those among them that changed nothing
    is_torn  an update was broken off, some weights have had it, some not; or it left weights that are not finite: then
             nothing can be saved
    odd      what was not finite before the first step
    shards   what this rank has of the model, where several ranks share one copy of it; all then save, evaluate and look
             for what is not finite together
    suspects  micro-batches of the last step whose loss was not finite
    """

    causal_lm: CausalLM
    masters: Masters
    optimizer: Optimizer
    world: World = field(default_factory=World)
    step: int = 0
    skipped: int = 0
    is_torn: bool = False
    odd: frozenset[str] = frozenset()
    suspects: tuple[int, ...] = ()
    shards: Sharded | None = None

    def drop_gradients(self) -> None:
        """What backward passes have left is gone."""
        self.masters.zero_grad()
        if self.shards is not None:
            self.shards.drop()

    @property
    def trained(self) -> int:
        """How many numbers are trained, on all ranks."""
        rows = {} if self.shards is None else self.shards.rows
        named = self.masters.parameters.items()
        return sum(math.prod(rows[name].shape) if name in rows else each.numel() for name, each in named)

    def update(self, lr: float, scale: Tensor | None) -> None:
        """One update with the gradients that are collected, times `scale`."""
        self.is_torn = True
        self.optimizer.step(lr, scale)
        self.step += 1
        self.is_torn = False

    def skip(self) -> None:
        """Goes past a step that cannot be done."""
        self.step += 1
        self.skipped += 1

    def serve(self) -> None:
        """Weights become those to hand over, as of an average that the update rule keeps; it cannot train these on."""
        for name, master in self.optimizer.served():
            self.masters.assign(name, master)

    @contextmanager
    def as_served(self) -> Iterator[None]:
        """While it lasts, weights are those to hand over; then what they were, to the bit."""
        trained: dict[str, Tensor] = {}
        try:
            for name, master in self.optimizer.served():
                trained[name] = self.masters[name].clone()
                self.masters.assign(name, master)
            yield
        finally:
            for name, master in trained.items():
                self.masters.assign(name, master)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """While it lasts, passes without gradients are made: what they have left gathered is let go after it."""
        with nullcontext() if self.shards is None else self.shards.with_head():
            yield

    def not_finite(self) -> list[str]:
        """The masters and the optimizer's tensors with values that are not finite, by name."""
        live = {key: each for key, each in self._live().items() if each.is_floating_point()}
        if not live:
            return []
        # A sum makes no second copy; what it may overflow on is looked at once more.
        sums = torch.stack([each.sum(dtype=torch.float32).to("cpu") for each in live.values()]).isfinite().tolist()
        suspects = zip(live, sums, strict=True)
        broken = [not is_finite and not bool(live[key].isfinite().all()) for key, is_finite in suspects]
        if self.shards is not None:
            broken = self.world.sum(torch.tensor(broken, dtype=torch.float32, device=self.causal_lm.device)).tolist()
        return [key for key, is_broken in zip(live, broken, strict=True) if is_broken]

    def stop_if_broken(self, what: str) -> None:
        """Raises NumbersError where a tensor has become not finite since the first step; the state is not saved then.

        what  is said of the names, as "step 3 left these values not finite"
        """
        if broken := [key for key in self.not_finite() if key not in self.odd]:
            self.is_torn = True
            shown = ", ".join(key.removeprefix("weight.") for key in broken[:SHOWN])
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise NumbersError(f"{what}: {shown}{more}; none of them is saved, and a lower optimizer.lr may avoid it")

    def _live(self) -> dict[str, Tensor]:
        return self.masters.state() | self.optimizer.state()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that steps have changed, as copies in host memory: `model` and `optimizer`. Of what is sharded, `rows()`.

        Names are those of the Hugging Face model.
        """
        kept = {key: tensor.detach().to("cpu", copy=True) for key, tensor in self._live().items()}
        buffers = {f"buffer.{key}": each.to("cpu", copy=True) for key, each in self._buffers().items()}
        weights = {key: kept.pop(key) for key in [*kept] if key.startswith("weight.")}
        return {"model": weights | buffers, "optimizer": kept}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights, whole, one after the other; where ranks share them all have to ask for each."""
        for name, each in self.masters.parameters.items():
            own = each.detach()
            yield name, own if self.shards is None else self.shards.whole(own, self.shards.rows[name])

    def rows(self) -> dict[str, Rows]:
        """What this rank holds of tensors that no rank holds whole, by their keys in `tensors()`.

        Frozen parameters that are sharded are named as well, as weight.NAME.
        """
        if self.shards is None:
            return {}
        found = {f"weight.{name}": each for name, each in self.shards.rows.items()}
        live = {key: (name, each.shape) for key, each in self._live().items() if (name := self._sharded(key))}
        parameters = self.shards.parameters
        return found | {
            key: self.shards.rows[name] for key, (name, shape) in live.items() if shape == parameters[name].shape
        }

    def rows_of(self, whole: Mapping[str, Sequence[int]]) -> dict[str, Rows]:
        """What this rank is to hold of the tensors of a checkpoint, from their shapes: an update rule may make its own
        only in its first step."""
        if self.shards is None:
            return {}
        found = {key: self.shards.rows[name] for key in whole if (name := self._sharded(key))}
        return {key: each for key, each in found.items() if len(whole[key]) == len(each.shape)}

    def _sharded(self, key: str) -> str | None:
        """The sharded parameter that a tensor of `tensors()` is of, if any."""
        parts = key.split(".")
        names = (".".join(parts[start:]) for start in range(1, len(parts)))
        return next((name for name in names if self.shards and name in self.shards.rows), None)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Goes back to what `tensors()` gave after `step` steps; of what ranks share out it is given this rank's rows.

        Raises InputError, with nothing changed, where it is of another model.
        """
        model, optimizer = tensors["model"], tensors["optimizer"]
        weights = [key for key in model if key.startswith("weight.")]
        low = [key for key in optimizer if key.startswith("low.")]
        masters = _Joined(dict.fromkeys(weights, model) | dict.fromkeys(low, optimizer))
        rest = _Joined(dict.fromkeys(optimizer.keys() - set(low), optimizer))
        try:
            check_state(self.masters.state(), masters)
            self.optimizer.restore(rest)
            self.masters.restore(masters)
        except ValueError as error:
            raise InputError(f"resume: the checkpoint is of another model or precision ({error})") from error
        for key, buffer in self._buffers().items():
            if f"buffer.{key}" in model:
                buffer.copy_(model[f"buffer.{key}"])
        self.step = step

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.causal_lm.model.named_buffers())


def spread(
    model: PreTrainedModel, rows: ReadRows, dtype: torch.dtype, layout: Layout, device: torch.device
) -> tuple[CausalLM, Masters, Sharded]:
    """This rank's rows of a model, in `dtype` and without memory yet, and the way through it that is sound.

    The device never has more than these and a layer at a time. Raises InputError as `selftest.choose` does.
    """
    causal_lm = CausalLM(model, "packed")
    shards = sharding.shard(causal_lm, model.named_parameters(), causal_lm.layers(), causal_lm.lent(), layout, device)
    masters = Masters(shards.parameters.items(), dtype)
    for name, here in shards.rows.items():
        masters.fill(name, rows(name, here.start, here.stop))
    with shards.with_head():
        causal_lm.become(causal_lm.inside(lambda: selftest.choose(model)))
    if causal_lm.lent() is None:
        shards.gather_head_again()
    return causal_lm, masters, shards


class _Joined(Mapping[str, Tensor]):
    """Tensors of several mappings, each read when it is asked for."""

    def __init__(self, homes: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._homes = homes

    def __getitem__(self, key: str) -> Tensor:
        return self._homes[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)
