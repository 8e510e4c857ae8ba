"""One copy of a model over several ranks, by FSDP2: of each weight, gradient and optimizer tensor a rank has its rows.

A layer's weights are gathered when it computes, and let go after it, or after the step where there is room. The
gradients of a round's micro-batches are sent to whoever has their rows, and added in fp32 there: in the order of the
micro-batches, which gives the bits of one rank, or as the backend adds them. Where the copies are several (HSDP) each
rank adds up the gradients of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from deft.core.errors import InputError
from deft.distributed.shards import Rows
from deft.distributed.world import ALL_GATHER, REDUCE_SCATTER, WAIT, World


@dataclass
class Layout:
    """How ranks share copies of a model.

    shard       ranks that one copy is spread over; rank r has part r mod shard of copy r div shard
    is_ordered  whether gradients are added in the order of the micro-batches
    room        bytes that layers may take which stay gathered through a step
    computing   ranks that have a micro-batch in this round: the first ones
    gathers     how often weights were gathered
    """

    world: World
    shard: int
    is_ordered: bool
    room: int = 0
    computing: int = 0
    gathers: int = 0
    _part: Any = None
    _same: Any = None

    def __post_init__(self) -> None:
        """Every rank makes every group, in one order."""
        size, shard = self.world.size, self.shard
        self._part = self._mine([range(first, first + shard) for first in range(0, size, shard)])
        self._same = self._mine([range(part, size, shard) for part in range(shard)])

    @property
    def copies(self) -> int:
        return self.world.size // self.shard

    def _mine(self, groups: Sequence[range]) -> Any:
        """The group among these that this rank is in; all ranks together are a group already."""
        if len(groups) == 1:
            return dist.group.WORLD
        made = [dist.new_group([*ranks], timeout=WAIT) for ranks in groups]
        return next(group for group, ranks in zip(made, groups, strict=True) if self.world.rank in ranks)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks that this one shares a copy with."""
        return DeviceMesh.from_group(self._part, device.type)

    def has_room(self, needed: int, device: torch.device) -> bool:
        """Whether bytes are not too many for any rank."""
        short = torch.tensor([float(needed > self.room)], device=device)
        return not self.world.sum(short).item()

    def gathered(self, part: Tensor) -> Tensor:
        """[shard, ...]: every part `part` [...] of this rank's copy, on every rank."""
        found = part.new_empty(self.shard, *part.shape)
        with self.world.reaching():
            ALL_GATHER(found.view(-1), part.contiguous().view(-1), group=self._part)
        return found

    def add_copies(self, total: Tensor) -> Tensor:
        """The sum over ranks that have the same rows."""
        if self.copies > 1:
            with self.world.reaching():
                dist.all_reduce(total, group=self._same)
        return total


class _Allocated:
    """What FSDP asks of any means of communication."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


@dataclass
class _Gather(_Allocated):
    """torch's own; where a rank is lost it fails as all collectives do here."""

    layout: Layout

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.layout.gathers += 1
        with self.layout.world.reaching():
            return ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


@dataclass
class _Sums(_Allocated):
    """The gradients of one group's weights, for this rank's rows, summed over the micro-batches of a step.

    FSDP makes each weight's .grad a view of what it takes for the reduced gradients. That is of one round, and rounded
    to the weight's dtype; the sum lies in `total` where .grad lies in it.

    weights  sharded, by name
    total    fp32, flat
    """

    layout: Layout
    weights: Mapping[str, nn.Parameter]
    total: Tensor | None = None

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **sent: Any) -> None:
        layout = self.layout
        if layout.is_ordered:
            parts = input_tensor.view(layout.shard, -1)
            parts = parts if layout.copies == 1 else parts.repeat(layout.copies, 1)
            received = layout.world.exchange(parts)[: layout.computing]
        else:
            with layout.world.reaching():
                REDUCE_SCATTER(output_tensor, input_tensor, group=group)
            received = output_tensor[None]
        for part in received:
            if self.total is None:
                self.total = part.to(torch.float32, copy=True)
            else:
                self.total += part

    def take(self) -> dict[str, Tensor]:
        """The sums by name, fp32, in the shapes of this rank's rows; they are gone from here."""
        found: dict[str, Tensor] = {}
        if self.total is not None and not self.layout.is_ordered:
            self.layout.add_copies(self.total)
        for name, weight in self.weights.items():
            if self.total is not None and weight.grad is not None:
                local = cast(DTensor, weight.grad).to_local()
                start = int(local.storage_offset())
                found[name] = self.total[start : start + local.numel()].view(local.shape)
        self.drop()
        return found

    def drop(self) -> None:
        self.total = None
        for weight in self.weights.values():
            weight.grad = None


@dataclass(frozen=True)
class Sharded:
    """What a rank has of a sharded model.

    parameters  its rows of each, by name; they share the memory of FSDP's
    rows        which ones these are
    keeps       whether layers stay gathered through a step, and are not gathered anew by each pass and each round
    """

    layout: Layout
    root: FSDPModule
    parameters: Mapping[str, nn.Parameter]
    rows: Mapping[str, Rows]
    keeps: bool
    _sums: list[_Sums] = field(default_factory=list)
    _head: Any = None

    def begin(self, ranks: int, is_last: bool = True) -> float:
        """To be called before each round's passes; `ranks`, the first ones, have a micro-batch in it. Until the last
        round of a step what every pass reads from beginning to end, embeddings and norms, stays gathered, and all else
        where that is kept.

        What a loss that every rank computes is multiplied by, so that only one counts where the backend adds them all.
        """
        self.layout.computing = ranks
        self.root.set_reshard_after_backward(is_last, recurse=self.keeps)
        if self.keeps:
            self.root.set_reshard_after_forward(False)
        for each in self._sums:
            for weight in each.weights.values():
                weight.grad = None
        return 1.0 if self.layout.is_ordered else 1.0 / self.layout.world.size

    def take(self) -> dict[str, Tensor]:
        """The sums of all rounds' gradients by name, fp32, for this rank's rows; they are gone from here."""
        return {name: total for each in self._sums for name, total in each.take().items()}

    def drop(self) -> None:
        """What passes have left is gone."""
        for each in self._sums:
            each.drop()
        self.let_go()

    def let_go(self) -> None:
        """What passes have left gathered, which later updates would not reach, is gone."""
        for module in cast(nn.Module, self.root).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather_head_again(self) -> None:
        """The head is no longer lent: what calls it needs its weights in the backward pass too."""
        if self._head is not None:
            self._head.set_unshard_in_backward(True)

    @contextmanager
    def with_head(self) -> Iterator[None]:
        """While it lasts, passes without gradients find the head's weights gathered before and after they call it."""
        if self._head is not None:
            self._head.set_reshard_after_forward(False)
            self._head.unshard()
        try:
            yield
        finally:
            self.let_go()
            if self._head is not None:
                self._head.set_reshard_after_forward(True)

    def whole(self, tensor: Tensor, rows: Rows) -> Tensor:
        """A tensor from every rank's rows of it, on every rank."""
        most = -(-rows.shape[0] // self.layout.shard)
        padded = tensor.new_zeros(most, *rows.shape[1:])
        padded[: len(tensor)] = tensor
        kind = torch.uint8 if padded.dtype in (torch.int16, torch.bfloat16) else padded.dtype  # gloo knows few
        found = self.layout.gathered(padded.view(-1).view(kind)).view(-1).view(padded.dtype)
        return found.view(-1, *rows.shape[1:])[: rows.shape[0]]

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks of one copy of what is of their rows, on every rank; `numbers` is used up."""
        return self.layout.world.sum(numbers if self.layout.world.rank < self.layout.shard else numbers.zero_())


def shard(
    root: nn.Module,
    named: Iterable[tuple[str, nn.Parameter]],
    layers: Sequence[nn.Module],
    head: Any,
    layout: Layout,
    device: torch.device,
) -> Sharded:
    """Spreads the weights of a model, whole on each rank or without memory yet, over the ranks of its copies.

    root    whatever reads weights runs inside its forward, or inside its method `inside`
    named   the weights and their names
    layers  each a group that is gathered by itself; all else is one group
    head    one more group, if any, which computes in a method of its own, lend(hidden, loss) -> loss(hidden), and whose
            gradients are made there: it is not gathered for the backward pass
    device  where the weights are, or are to be: rows that have had no memory hold nothing yet

    Raises InputError where a weight is a single number.
    """
    names = {id(weight): name for name, weight in named}
    if single := [names[id(weight)] for weight in root.parameters() if weight.ndim == 0]:
        raise InputError(f"shard: {single[0]} is a single number, which has no rows; shard=1")
    reduced = None if layout.is_ordered else torch.float32
    policy = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    mesh, taken, groups = layout.mesh(device), set[int](), list[dict[str, str]]()
    keeps = layout.has_room(sum(each.nbytes for layer in layers for each in layer.parameters()), device)
    modules = [*layers, *([] if head is None else [head]), root]
    for module in modules:
        own = {name: names[id(each)] for name, each in module.named_parameters() if id(each) not in taken}
        taken |= {id(each) for each in module.parameters()}
        groups.append(own)
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(root, "inside")
    if head is not None:
        head.lend = lambda hidden, loss: loss(hidden)
        register_fsdp_forward_method(head, "lend")
        head.set_unshard_in_backward(False)
    if any(each.is_meta for each in root.parameters()):
        _allocate(root, device)
    sums = []
    for module, own in zip(modules, groups, strict=True):
        weights = dict(module.named_parameters())
        sums.append(_Sums(layout, {name: weights[key] for key, name in own.items()}))
        _prepare(cast(FSDPModule, module), layout, sums[-1])
    weights = {name: each.weights[name] for name in names.values() for each in sums if name in each.weights}
    parameters = {name: _local(weight) for name, weight in weights.items()}
    rows = {name: _rows(cast(DTensor, weight), layout) for name, weight in weights.items()}
    return Sharded(layout, cast(FSDPModule, root), parameters, rows, keeps, sums, head)


def own_type(module: nn.Module) -> type:
    """The type of a module; that of a group, for which FSDP has made one of its own, as it was.

    >>> own_type(nn.Linear(1, 1)).__name__
    'Linear'
    """
    return type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)


def _allocate(root: Any, device: torch.device) -> None:
    """Gives weights memory; buffers that have some keep it. FSDP takes new weights in its first pass, an empty one."""
    kept = [(each, *named) for each in root.modules() for named in each.named_buffers(recurse=False)]
    root.to_empty(device=device)
    for module, name, buffer in kept:
        if not buffer.is_meta:
            setattr(module, name, buffer.to(device))
    root.inside(lambda: None)
    root.reshard()


def _prepare(module: FSDPModule, layout: Layout, sums: _Sums) -> None:
    """Sums are sums: FSDP would divide by the number of ranks, and a factor alone is multiplied in by the backend."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_custom_all_gather(cast(Any, _Gather(layout)))
    module.set_custom_reduce_scatter(cast(Any, sums))
    if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13: experts that no token of a rank has chosen
        module.set_reduce_scatter_unused_params(True, recurse=False)


def _local(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(cast(DTensor, weight.detach()).to_local(), requires_grad=weight.requires_grad)


def _rows(weight: DTensor, layout: Layout) -> Rows:
    """As FSDP cuts: parts of equal size, as far as there are rows."""
    size = -(-weight.shape[0] // layout.shard)
    start = min(layout.world.rank % layout.shard * size, weight.shape[0])
    return Rows(tuple(weight.shape), start, start + len(weight.to_local()))
