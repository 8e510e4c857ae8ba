"""What training changes, and how it is put down and taken up again. It has one owner: the loop."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft.errors import InputError
from deft.model.learner import Learner
from deft.optim.adamw import AdamW


@dataclass
class TrainState:
    """What training changes.

    step     optimizer steps that are done
    skipped  those among them that changed nothing
    is_torn  an update was broken off: some weights have had it, some not, and nothing can be saved
    """

    learner: Learner
    optimizer: AdamW
    step: int = 0
    skipped: int = 0
    is_torn: bool = False

    def update(self, factor: float, scale: Tensor | None) -> None:
        """One optimizer step with the gradients that are collected."""
        self.is_torn = True
        self.optimizer.step(factor, scale)
        self.step += 1
        self.is_torn = False

    def skip(self) -> None:
        """Goes past a step that cannot be done."""
        self.step += 1
        self.skipped += 1

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that steps have changed, as copies in host memory: `model` and `optimizer`."""
        kept = {key: tensor.detach().to("cpu", copy=True) for key, tensor in self.optimizer.state().items()}
        buffers = {f"buffer.{key}": each.to("cpu", copy=True) for key, each in self.learner.model.named_buffers()}
        weights = {key: kept.pop(key) for key in [*kept] if key.startswith("weight.")}
        return {"model": weights | buffers, "optimizer": kept}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Goes back to what `tensors()` gave after `step` steps. Raises InputError where it is of another model."""
        model, buffers = tensors["model"], dict(self.learner.model.named_buffers())
        weights = [key for key in model if key.startswith("weight.")]
        try:
            self.optimizer.restore(
                _Joined(dict.fromkeys(weights, model) | dict.fromkeys(tensors["optimizer"], tensors["optimizer"]))
            )
        except ValueError as error:
            raise InputError(f"resume: the checkpoint is of another model or precision ({error})") from error
        for key, buffer in buffers.items():
            if f"buffer.{key}" in model:
                buffer.copy_(model[f"buffer.{key}"])
        self.step = step


def random_state() -> dict[str, Any]:
    """Every random number generator of this process, as JSON."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": legacy | {"state": {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}},
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(each) for each in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back to what `random_state` gave.

    >>> before = random_state()
    >>> drawn = random.random(), np.random.rand(), torch.rand(1).item()
    >>> set_random_state(before)
    >>> drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    True
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state(dict(state["numpy"]) | {"state": {**inner, "key": np.array(inner["key"], np.uint32)}})
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_tensor(each) for each in state["cuda"]][: torch.cuda.device_count()])


class _Joined(Mapping[str, Tensor]):
    """Tensors of several mappings, each read when it is asked for."""

    def __init__(self, homes: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._homes = homes

    def __getitem__(self, key: str) -> Tensor:
        return self._homes[key][key]

    def __iter__(self) -> Any:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())
