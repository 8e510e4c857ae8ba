"""Lion: the sign of a momentum that is interpolated with the gradient. arXiv 2302.06675, algorithm 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deft.training.masters import Masters, copy_state, rates_of

IS_ELEMENTWISE = True
"""A number's update depends on that number and its own gradients alone."""


class Lion:
    """update = sign(b1 m + (1 - b1) g);  w -= lr (update + weight_decay w);  m = b2 m + (1 - b2) g.

    Weight decay acts on matrices only, as adamw's does. lr is to be 3 to 10 times lower than adamw's.
    """

    def __init__(
        self,
        masters: Masters,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.betas, self.weight_decay = betas, weight_decay
        self._masters = masters
        self._rates = rates_of(masters.parameters, rates or {})
        self._moments = {
            name: torch.zeros_like(each, dtype=torch.float32, requires_grad=False)
            for name, each in masters.parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """One update at rate `lr`, with gradients times `scale`, which are dropped."""
        one, two = self.betas
        for name, moment in self._moments.items():
            if self._masters.gradient(name) is None:
                continue
            rate = lr * self._rates[name]
            decay = 1.0 - rate * self.weight_decay if moment.ndim >= 2 else 1.0
            for master_B, gradient_B, moment_B in self._masters.updates(name, moment, scale=scale):
                update_B = torch.lerp(gradient_B, moment_B, one).sign_()
                master_B.mul_(decay).sub_(update_B, alpha=rate)
                moment_B.lerp_(gradient_B, 1.0 - two)

    def served(self) -> Iterable[tuple[str, Tensor]]:
        """None: the masters that are trained are those that are served."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """The live tensors: `exp_avg.NAME`, fp32."""
        return {f"exp_avg.{name}": moment for name, moment in self._moments.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave. Raises ValueError, with nothing changed, where it does not fit."""
        copy_state(self.state(), state)


make = Lion
"""What `optimizer.name: lion` is."""
