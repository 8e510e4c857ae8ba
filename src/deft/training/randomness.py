"""The state of torch's random generators, from which dropout draws."""

from __future__ import annotations

import torch
from torch import Tensor


def snapshot(device: torch.device) -> dict[str, Tensor]:
    """uint8 tensors on the CPU: the CPU's generator's state, and the device's where it has its own.

    >>> before = snapshot(torch.device("cpu"))
    >>> drawn = torch.rand(3)
    >>> restore(before, torch.device("cpu"))
    >>> bool((torch.rand(3) == drawn).all())
    True
    """
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Puts the generators back to what `snapshot` found."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
