"""AdamW over fp32 masters, with decoupled weight decay as in arXiv 1711.05101."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from deft.training.masters import Masters, copy_state, rates_of

IS_ELEMENTWISE = True
"""A number's update depends on that number and its own gradients alone."""

VECTOR = 16
"""Elements that torch's fused rule takes at a time, at most."""


class AdamW:
    """torch's AdamW. Weight decay acts on matrices and embeddings only, not on biases and norms."""

    def __init__(
        self,
        masters: Masters,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._rates = rates_of(masters.parameters, rates or {})
        self._masters = masters
        self._steps = torch.tensor(0)
        self._moments = {name: (_zeros(each), _zeros(each)) for name, each in masters.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """One update at rate `lr`, with gradients times `scale`, which are dropped."""
        self._steps += 1
        for name, parameter in self._masters.parameters.items():
            if self._masters.gradient(name) is not None:
                self._update(name, parameter, lr * self._rates[name], scale)

    def _update(self, name: str, parameter: Tensor, lr: float, scale: Tensor | None) -> None:
        done = torch.full((), int(self._steps) - 1, dtype=torch.float32, device=parameter.device)
        for block in self._masters.updates(name, *self._moments[name], scale=scale):
            master_B, gradient_B, first_B, second_B = filled = [_filled(each) for each in block]
            adamw(
                [master_B],
                [gradient_B],
                [first_B],
                [second_B],
                [],
                [done.clone()],
                fused=parameter.device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=self.weight_decay if parameter.ndim >= 2 else 0.0,
                eps=self.eps,
                maximize=False,
            )
            for own, each in zip(block, filled, strict=True):
                if each is not own:
                    own.copy_(each[: len(own)])

    def served(self) -> Iterable[tuple[str, Tensor]]:
        """None: the masters that are trained are those that are served."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """The live tensors: `steps` (int64), and the moments `exp_avg.NAME` and `exp_avg_sq.NAME` (fp32)."""
        found = {"steps": self._steps}
        for name, (first, second) in self._moments.items():
            found |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave, on any device.

        Raises ValueError, with nothing changed, where it does not fit.
        """
        copy_state(self.state(), state)


make = AdamW
"""What `optimizer.name: adamw` is."""


def _filled(block: Tensor) -> Tensor:
    """The block with zeros behind it, where it ends within a vector of the processor: torch's fused rule rounds what is
    left over otherwise, and which elements these are depends on how a parameter is cut."""
    missing = -len(block) % VECTOR
    return functional.pad(block, (0, missing)) if missing else block


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
