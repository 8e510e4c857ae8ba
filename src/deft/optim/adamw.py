"""AdamW with fp32 master weights, whatever the compute dtype. Decoupled weight decay as in arXiv 1711.05101."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class AdamW:
    """torch's AdamW over fp32 masters; the parameters become their copies, rounded to the compute `dtype`.

    Where `dtype` is fp32 a parameter is its own master. Otherwise gradients are summed over micro-batches in fp32.
    Weight decay acts on matrices and embeddings only, not on biases and norms. Frozen parameters are cast, no more.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr = lr
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                self.parameters[name] = parameter
                self.masters[name] = _master(parameter, dtype)
            else:
                parameter.data = parameter.data.to(dtype)
        decayed = [master for master in self.masters.values() if master.ndim >= 2]
        others = [master for master in self.masters.values() if master.ndim < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, weight_decay), (others, 0.0))
            if group
        ]
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=_can_fuse(self.masters))

    def collect(self) -> None:
        """Adds the gradients that a backward pass left on lower-precision parameters to their masters'."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def clip(self, limit: float | None) -> Tensor:
        """The global norm of all gradients (fp32 scalar), which are scaled down to `limit` where it is larger."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), limit, norm)
        return norm

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; the gradients are gone after it."""
        for group in self._adamw.param_groups:
            group["lr"] = self.lr * factor
        self._adamw.step()
        self.zero_grad()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                round_into(self.masters[name], parameter)

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None


@torch.no_grad()
def round_into(master: Tensor, copy: Tensor) -> None:
    """Writes an fp32 tensor into its lower-precision copy; to bf16 by adding half a unit to the bits and cutting.

    >>> copy = torch.empty(1, dtype=torch.bfloat16)
    >>> round_into(torch.tensor([1.0 + 2**-8]), copy)
    >>> copy.item()
    1.0078125
    """
    if copy.dtype != torch.bfloat16:
        copy.copy_(master)
        return
    bits = master.detach().contiguous().view(torch.int32)
    copy.copy_(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))


def _master(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """The fp32 master of a parameter, which becomes its copy in `dtype`."""
    if dtype == torch.float32 and parameter.dtype == dtype:
        return parameter
    master = nn.Parameter(parameter.detach().float().clone())
    parameter.data = torch.empty_like(parameter.data, dtype=dtype)
    round_into(master, parameter)
    return master


def _can_fuse(masters: Mapping[str, nn.Parameter]) -> bool:
    return all(master.device.type in ("cpu", "cuda") for master in masters.values())
