"""fp32 masters of a model's weights, which in bf16 are kept as the weight itself and its 16 low bits ("16+16").

    bits = the master's, as int32     weight = (bits + 0x8000) >> 16, as bf16     low = int16(bits - (weight << 16))

Nothing is lost: weight << 16 plus low are the master's bits again, and the weight is the master rounded to bf16.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from deft.core.errors import InputError

CPU_BLOCK, GPU_BLOCK = 2**18, 2**24
"""Elements that are updated at a time, on CPUs by each thread: their fp32 masters and gradients stay in its cache."""


class Masters(Mapping[str, Tensor]):
    """The fp32 masters of all parameters by name, and the fp32 sums of the gradients of those that are trained.

    The parameters become the masters' copies in the compute `dtype`, fp32 or bf16; in fp32 each is its own master. A
    frozen parameter (requires_grad False) is cast as well, and has neither gradient nor state.

    rows        parameters of which only some rows are trained, and which. Each such part is a parameter of its own that
                shares their memory, NAME[4:6]: nothing is ever written to other rows, and they have no state
    parameters  the trained ones by name

    >>> net = nn.Linear(2, 1, bias=False)
    >>> masters = Masters([("weight", nn.Parameter(torch.tensor([[1.0, 1.0 + 2**-9]])))], torch.bfloat16)
    >>> masters.parameters["weight"].tolist(), masters["weight"].tolist() == [[1.0, 1.0 + 2**-9]]
    ([[1.0, 1.0]], True)
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        rows: Mapping[str, slice] = MappingProxyType({}),
    ) -> None:
        assert dtype in (torch.float32, torch.bfloat16)
        self._all = dict(parameters)
        self.parameters = {name: each for name, each in self._all.items() if each.requires_grad}
        self._low: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self._all.items():
            is_cast = name in self.parameters or (parameter.is_floating_point() and parameter.dtype != dtype)
            if is_cast and (low := _store(parameter, dtype)) is not None:
                self._low[name] = low
        self._parts = dict(self._part(name, each) for name, each in rows.items())

    def _part(self, name: str, rows: slice) -> tuple[str, tuple[nn.Parameter, slice]]:
        """Puts rows of a parameter in its place among the trained ones: their name, and what they are a part of."""
        whole, key = self.parameters.pop(name), f"{name}[{rows.start}:{rows.stop}]"
        self.parameters[key] = nn.Parameter(whole.detach()[rows])
        if name in self._low:
            self._low[key] = self._low[name][rows]
        return key, (whole, rows)

    def __getitem__(self, name: str) -> Tensor:
        """fp32, the parameter's shape: the parameter itself in fp32, else a new tensor."""
        weight = self._named(name).detach()
        if name in self._low:
            return compose(weight, self._low[name])
        return weight.float() if weight.is_floating_point() else weight

    @torch.no_grad()
    def assign(self, name: str, master: Tensor) -> None:
        """Gives a parameter another fp32 master, which is used up; in bf16 it has low bits from then on."""
        parameter = self._named(name)
        if parameter.dtype != torch.bfloat16:
            parameter.copy_(master)
            return
        low = self._low.setdefault(name, torch.empty_like(parameter, dtype=torch.int16))
        decompose(master, parameter.data, low)

    def fill(self, name: str, value: Tensor) -> None:
        """Gives a parameter its first value, which is used up: as if these masters had been made of it."""
        parameter = self._named(name)
        if name in self.parameters or value.dtype != parameter.dtype:
            self.assign(name, value.to(parameter.device, torch.float32))
        else:
            parameter.data.copy_(value)

    def adopt(self, parameters: Mapping[str, nn.Parameter], device: torch.device | str) -> None:
        """Takes frozen parameters that have been made since; low bits go to the device where all parameters now are."""
        self._all |= parameters
        self._low = {name: low.to(device) for name, low in self._low.items()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Keeps those of `names`, what each is called from here on -> what it was called, and drops the others."""
        self._all = {name: self._all[old] for name, old in names.items()}
        self._low = {name: self._low[old] for name, old in names.items() if old in self._low}
        self.parameters = {name: each for name, each in self._all.items() if each.requires_grad}
        self._sums.clear()
        self._parts.clear()

    def _named(self, name: str) -> nn.Parameter:
        return self._all[name] if name in self._all else self.parameters[name]

    def _take_parts(self) -> None:
        """Of the gradients of whole matrices, those of the rows that are trained."""
        for key, (whole, rows) in self._parts.items():
            if whole.grad is None:
                continue
            part, latest = self.parameters[key], whole.grad[rows].clone()
            part.grad = latest if part.grad is None else part.grad.add_(latest)
            whole.grad = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def collect(self) -> None:
        """To be called before each backward pass: gradients of earlier micro-batches go into sums in fp32.

        A step of one micro-batch needs no sums.
        """
        self._take_parts()
        for name, parameter in self.parameters.items():
            if parameter.grad is None or parameter.dtype == torch.float32:
                continue
            if name in self._sums:
                _add(self._sums[name], parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

    def take_gradients(self) -> dict[str, Tensor]:
        """What the last backward pass left, by name, which is gone from here: for a sum over several ranks."""
        self._take_parts()
        found = {name: each.grad for name, each in self.parameters.items() if each.grad is not None}
        for name in found:
            self.parameters[name].grad = None
        return found

    def put_gradients(self, sums: Mapping[str, Tensor]) -> None:
        """Such a sum, fp32 by name, in place of all that was left here."""
        self.zero_grad()
        self._sums.update(sums)

    def gradient(self, name: str) -> Tensor | None:
        """The sum of what the backward passes since the last update left for a parameter; in fp32 where summed."""
        self._take_parts()
        latest, earlier = self.parameters[name].grad, self._sums.get(name)
        if earlier is None:
            return latest
        if latest is not None:
            _add(earlier, latest)
            self.parameters[name].grad = None
        return earlier

    def squared_norm(self) -> Tensor:
        """The square of the global norm of all gradients: a scalar in fp64, but on MPS, which has none.

        So exact that its root, rounded to fp32, does not depend on how the ranks share the gradients.
        """
        gradients = [gradient for name in self.parameters if (gradient := self.gradient(name)) is not None]
        squares = [_square(block) for gradient in gradients for block in _blocks(gradient)]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def updates(self, name: str, *state: Tensor, scale: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Blocks of a parameter for an update rule to change in place: master, gradient, and the same of each `state`.

        master and gradient are fp32 [B], the gradient is multiplied by `scale`. What the body leaves in the master is
        stored, and the gradient is dropped after the last block. To be used without autograd, for a parameter that has
        a gradient.
        """
        weight, gradient, low = self.parameters[name].detach(), self.gradient(name), self._low.get(name)
        assert gradient is not None, name
        weights = _blocks(weight)
        lows = [None] * len(weights) if low is None else _blocks(low)
        for weight_B, low_B, *rest in zip(weights, lows, *map(_blocks, (gradient, *state)), strict=True):
            master_B = weight_B if low_B is None else compose(weight_B, low_B)
            gradient_B, *state_B = rest
            gradient_B = gradient_B.float()
            yield master_B, gradient_B if scale is None else gradient_B.mul_(scale), *state_B
            if low_B is not None:
                decompose(master_B, weight_B, low_B)
        self.drop_gradient(name)

    def drop_gradient(self, name: str) -> None:
        """The gradient of a parameter and its sum are gone."""
        self.parameters[name].grad = None
        self._sums.pop(name, None)

    def zero_grad(self) -> None:
        """Drops all gradients and their sums."""
        self._sums.clear()
        for parameter in (*self.parameters.values(), *(whole for whole, _ in self._parts.values())):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The trained masters, to the bit and without copies: `weight.NAME`, and in bf16 `low.NAME` (int16)."""
        weights = {f"weight.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return weights | {f"low.{name}": self._low[name] for name in self.parameters if name in self._low}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state()` gave, on any device; gradients are dropped.

        Raises ValueError, with nothing changed, where it does not fit.
        """
        copy_state(self.state(), state)
        self.zero_grad()


def rates_of(names: Collection[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Each trained parameter's multiple of the learning rate: that of the first pattern found in its name, else 1.

    Raises InputError for a pattern that fits no name.

    >>> rates_of(["q.lora_A", "q.lora_B"], {"lora_B": 16.0})
    {'q.lora_A': 1.0, 'q.lora_B': 16.0}
    """
    for pattern in rates:
        if not any(re.search(pattern, name) for name in names):
            what = f"{pattern!r} is in no trained parameter's name"
            raise InputError(f"optimizer.rates: {what}; one is {next(iter(names))}")
    return {name: next((rate for pattern, rate in rates.items() if re.search(pattern, name)), 1.0) for name in names}


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where names, shapes or dtypes differ.

    >>> check_state({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    Traceback (most recent call last):
    ValueError: a: torch.float32 [3], not torch.float32 [2]
    """
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{odd[0]}: only in {'this run' if odd[0] in own else 'the state'}")
    for key, mine in own.items():
        theirs = state[key]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(f"{key}: {theirs.dtype} {[*theirs.shape]}, not {mine.dtype} {[*mine.shape]}")


@torch.no_grad()
def copy_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies `state` into the live tensors `own`; raises as `check_state` does, with nothing changed."""
    check_state(own, state)
    for key, mine in own.items():
        mine.copy_(state[key])


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


def rounded(master: Tensor) -> Tensor:
    """An fp32 master -> its bf16 copy, as `decompose` rounds it; the master is used up."""
    weight, low = (torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    decompose(master, weight, low)
    return weight


@torch.no_grad()
def _store(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor | None:
    """Casts a parameter to `dtype`; the low bits of its master, or None where it is its own."""
    if dtype == torch.float32 or parameter.dtype == dtype:
        parameter.data = parameter.detach().to(dtype).contiguous()
        return None if dtype == torch.float32 else torch.zeros_like(parameter.data, dtype=torch.int16)
    master = parameter.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    parameter.data, low = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    decompose(master, parameter.data, low)
    return low


def _square(block: Tensor) -> Tensor:
    wide = block.to(torch.float32 if block.device.type == "mps" else torch.float64)
    return torch.dot(wide, wide)


def _add(total: Tensor, latest: Tensor) -> None:
    """total += latest, which may be narrower. Blocks: a whole sum of two dtypes would copy the narrower one first."""
    assert total.is_contiguous()
    for total_B, latest_B in zip(_blocks(total), _blocks(latest), strict=True):
        total_B += latest_B


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of the elements in order."""
    is_cpu = tensor.device.type == "cpu"
    return tensor.reshape(-1).split(CPU_BLOCK * torch.get_num_threads() if is_cpu else GPU_BLOCK)
