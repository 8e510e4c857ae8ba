"""AdamW on fp32 masters, which in bf16 are kept as the weight itself and its 16 low bits ("16+16").

    bits = the master's, as int32     weight = (bits + 0x8000) >> 16, as bf16     low = int16(bits - (weight << 16))

Nothing is lost: weight << 16 plus low are the master's bits again, and the update is the one of torch's AdamW on an
fp32 master. Decoupled weight decay as in arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

CPU_BLOCK, GPU_BLOCK = 2**18, 2**24
"""Elements that are updated at a time, on CPUs by each thread: their fp32 masters and gradients stay in its cache. 16 M
elements take 30 ms on one core in blocks of 2**18, 34 ms of 2**17, 38 ms of 2**20 (AMD EPYC, torch 2.13)."""


class AdamW:
    """torch's AdamW over fp32 masters; the parameters are their copies in the compute `dtype`, fp32 or bf16.

    Where it is fp32 a parameter is its own master. Weight decay acts on matrices and embeddings only, not on biases and
    norms. Frozen parameters are cast, no more.
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
        assert dtype in (torch.float32, torch.bfloat16)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.parameters: dict[str, nn.Parameter] = {}
        self._low: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        for name, parameter in parameters:
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                continue
            self.parameters[name] = parameter
            low = _store(parameter, dtype)
            if low is not None:
                self._low[name] = low
            self._moments[name] = (_zeros(parameter), _zeros(parameter))

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """The fp32 master of each parameter, made when it is asked for."""
        return _Masters(self)

    def master(self, name: str) -> Tensor:
        """fp32, the parameter's shape: the parameter itself in fp32, else a new tensor."""
        weight = self.parameters[name].detach()
        return compose(weight, self._low[name]) if name in self._low else weight

    def collect(self) -> None:
        """To be called before each backward pass: gradients of earlier micro-batches go into sums in fp32.

        A step of one micro-batch needs no sums.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None or parameter.dtype == torch.float32:
                continue
            if name in self._sums:
                _add(self._sums[name], parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

    def gradient(self, name: str) -> Tensor | None:
        """What the backward passes since the last step left for a parameter, all together; in fp32 where summed."""
        latest, earlier = self.parameters[name].grad, self._sums.get(name)
        if earlier is None:
            return latest
        if latest is not None:
            _add(earlier, latest)
            self.parameters[name].grad = None
        return earlier

    def norm(self) -> Tensor:
        """The global norm of all gradients: fp32 scalar."""
        gradients = [gradient for name in self.parameters if (gradient := self.gradient(name)) is not None]
        squares = [_square(block) for gradient in gradients for block in _blocks(gradient)]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def step(self, factor: float, scale: Tensor | None = None) -> None:
        """One update at `factor` times the learning rate, with gradients times `scale`; they are gone after it."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            gradient = self.gradient(name)
            if gradient is not None:
                self._update(name, parameter.detach(), gradient, self.lr * factor, scale)
            parameter.grad = None
            self._sums.pop(name, None)

    @torch.no_grad()
    def _update(self, name: str, weight: Tensor, gradient: Tensor, lr: float, scale: Tensor | None) -> None:
        decay = self.weight_decay if weight.ndim >= 2 else 0.0
        done = torch.full((), self.steps - 1, dtype=torch.float32, device=weight.device)
        low = self._low.get(name)
        rows = zip(
            _blocks(weight),
            _blocks(gradient),
            *(_blocks(moment) for moment in self._moments[name]),
            [None] * len(_blocks(weight)) if low is None else _blocks(low),
            strict=True,
        )
        for weight_B, gradient_B, first_B, second_B, low_B in rows:
            master_B = weight_B if low_B is None else compose(weight_B, low_B)
            gradient_B = gradient_B.float()
            adamw(
                [master_B],
                [gradient_B if scale is None else gradient_B.mul_(scale)],
                [first_B],
                [second_B],
                [],
                [done.clone()],
                fused=weight.device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )
            if low_B is not None:
                decompose(master_B, weight_B, low_B)

    def zero_grad(self) -> None:
        self._sums.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside the base model, to the bit and without copies: the live tensors.

        steps int64; for each parameter `weight.NAME`, its moments `exp_avg.NAME` and `exp_avg_sq.NAME` (fp32), all of
        its shape, and where the weight is bf16 the master's `low.NAME` (int16).
        """
        found = {"steps": torch.tensor(self.steps)}
        for name, parameter in self.parameters.items():
            first, second = self._moments[name]
            found |= {f"weight.{name}": parameter.detach(), f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        return found | {f"low.{name}": low for name, low in self._low.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave, on any device.

        Raises ValueError, with nothing changed, where it does not fit.
        """
        own = self.state()
        if odd := sorted(own.keys() ^ state.keys()):
            raise ValueError(f"{odd[0]}: only in {'the optimizer' if odd[0] in own else 'the state'}")
        for key, mine in own.items():
            theirs = state[key]
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(f"{key}: {theirs.dtype} {[*theirs.shape]}, not {mine.dtype} {[*mine.shape]}")
        self.zero_grad()
        self.steps = int(state["steps"])
        for key, mine in own.items():
            mine.copy_(state[key])


make = AdamW
"""What `optimizer.name: adamw` is."""


class _Masters(Mapping[str, Tensor]):
    """The masters of an optimizer by name; none is held."""

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = optimizer

    def __getitem__(self, name: str) -> Tensor:
        return self._optimizer.master(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizer.parameters)

    def __len__(self) -> int:
        return len(self._optimizer.parameters)


def clip_scale(norm: Tensor, limit: float | None) -> Tensor | None:
    """What gradients of this norm are multiplied by to come down to `limit`, as torch's clip_grad_norm_ has it."""
    return None if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)


def compose(weight: Tensor, low: Tensor) -> Tensor:
    """bf16 and int16 of one shape -> the fp32 master."""
    master = weight.float()
    master.view(torch.int32).add_(low)
    return master


def decompose(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Writes an fp32 master, which is used up, into its bf16 copy and its low bits.

    Half a unit is added to the bits, and they are cut: what is cut away and what was added are the low 16 bits as they
    stand, read as a signed number.

    >>> weight, low = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    >>> decompose(torch.tensor([1.0 + 2**-8]), weight, low)
    >>> weight.item(), low.item(), compose(weight, low).item() == 1.0 + 2**-8
    (1.0078125, -32768, True)
    """
    bits = master.view(torch.int32)
    low.copy_(bits)  # its low 16 bits: integers lose their upper ones
    weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


@torch.no_grad()
def _store(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor | None:
    """Casts a parameter to `dtype`; the low bits of its master, or None where it is its own."""
    if dtype == torch.float32:
        parameter.data = parameter.detach().float().contiguous()
        return None
    master = parameter.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    parameter.data, low = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    decompose(master, parameter.data, low)
    return low


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def _square(block: Tensor) -> Tensor:
    """The sum of the squares, in fp32."""
    return block.to(torch.float32, copy=True).square_().sum()


def _add(total: Tensor, latest: Tensor) -> None:
    """total += latest, which may be narrower. Blocks: a whole sum of two dtypes would copy the narrower one first."""
    assert total.is_contiguous()
    for total_B, latest_B in zip(_blocks(total), _blocks(latest), strict=True):
        total_B += latest_B


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of the elements in order."""
    is_cpu = tensor.device.type == "cpu"
    return tensor.reshape(-1).split(CPU_BLOCK * torch.get_num_threads() if is_cpu else GPU_BLOCK)
