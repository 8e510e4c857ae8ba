"""`shard` in the configuration -> over how many ranks one copy of the model is spread, or why it cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import torch

from deft.core import hardware
from deft.core.errors import InputError, Problem, Problems
from deft.distributed.sharding import Layout
from deft.distributed.world import World
from deft.model.trainable import NOTHING_FROZEN
from deft.run.config import Config
from deft.training import objectives, optimizers

ROOM = 1 / 8
"""The share of a device's memory that layers may take which stay gathered through a step."""


def ranks(config: Config, world: World) -> int:
    """`of` the ranks that are there."""
    return of(config, world.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def of(config: Config, size: int, machine: int) -> int:
    """How many of `size` ranks, `machine` on each machine, share one copy of the model; a rank that is alone has it
    whole, whatever is said.

    Raises Problems where it is said how many, and they cannot.
    """
    reasons = [*_against(config)]
    if isinstance(config.shard, str):
        return machine if not reasons and size % machine == 0 else 1
    if size > 1 and size % config.shard:
        what = f"there are {size} ranks, which {config.shard} does not divide"
        raise Problems("the model cannot be sharded:", [Problem("shard", what, "leave it out, or shard=1")])
    if config.shard > 1 and reasons:
        raise Problems("the model cannot be sharded:", [Problem("shard", each, "shard=1") for each in reasons])
    return min(config.shard, size)


def most(config: Config, world: World) -> int:
    """How many ranks could share one copy: all, or 1 where something of the run is against it."""
    return 1 if any(_against(config)) else world.size


def is_ordered(config: Config, device: torch.device) -> bool:
    """Whether ranks that share a copy add gradients in the order of the micro-batches."""
    return config.sums == "ordered" or (config.sums == "auto" and device.type != "cuda")


def layout(config: Config, shard: int, world: World, device: torch.device) -> Layout | None:
    """How the ranks share the model; None where each has all of it."""
    if shard == 1:
        return None
    return Layout(world, shard, is_ordered(config, device), int(ROOM * hardware.memory_bytes(device)))


def _against(config: Config) -> Iterator[str]:
    """What of a run needs the whole model on each rank. Names that are not there are told elsewhere."""
    with suppress(InputError):
        if not optimizers.is_elementwise(config.optimizer):
            yield f"optimizer.name: {config.optimizer.name} may update matrices as a whole, and a rank has some rows"
    with suppress(InputError):
        if objectives.load(config.loss.name, config.loss.options).uses_start:
            yield f"loss.name: {config.loss.name} uses the model that the run began with, which is whole on each rank"
    if config.adapter is not None and config.adapter.is_virtual:
        yield f"adapter: {config.adapter.name} tuning goes through the model in a way of its own"
    if config.quantize != "off":
        yield f"quantize: codes of {config.quantize} are not cut into rows"
    if config.data.add_tokens and (config.adapter is not None or config.freeze != NOTHING_FROZEN):
        yield "data.add_tokens: rows of new tokens alone are trained, which lie with one rank"
