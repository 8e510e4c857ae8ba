"""The random generators of this process, from which dropout and users' functions draw."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft.distributed.world import World


def snapshot() -> dict[str, Any]:
    """The state of every random generator of this process: Python's, numpy's, torch's, and each GPU's."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": cards,
    }


def restore(state: Mapping[str, Any]) -> None:
    """Puts the generators back to what `snapshot` found.

    >>> before = snapshot()
    >>> drawn = random.random(), np.random.rand(), torch.rand(1).item()
    >>> restore(from_json(as_json(before)))
    >>> drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    True
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def follow_first(world: World, name: str) -> None:
    """The generators of every rank become those of rank 0. No two `name`s are alike in a run."""
    state = from_json(world.from_first(name, lambda: as_json(snapshot())))
    restore({**state, "cuda": state["cuda"][:1] * torch.cuda.device_count()})


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever the body draws or seeds, the generators are as they were after it."""
    before = snapshot()
    try:
        yield
    finally:
        restore(before)


def as_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """A snapshot as JSON."""
    version, numbers, gauss = state["python"]
    inner = state["numpy"]["state"]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": state["numpy"] | {"state": {"key": inner["key"].tolist(), "pos": inner["pos"]}},
        "torch": _text(state["torch"]),
        "cuda": [_text(each) for each in state["cuda"]],
    }


def from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The snapshot that `as_json` was given."""
    version, numbers, gauss = value["python"]
    inner = value["numpy"]["state"]
    return {
        "python": (version, tuple(numbers), gauss),
        "numpy": dict(value["numpy"]) | {"state": {**inner, "key": np.array(inner["key"], np.uint32)}},
        "torch": _tensor(value["torch"]),
        "cuda": [_tensor(each) for each in value["cuda"]],
    }


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())
