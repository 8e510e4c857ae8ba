"""Peak memory and time of an optimizer step, before weights are loaded: the code that will run, on tensors that hold
nothing. torch computes their shapes, and each tensor's birth and death is counted, each operation's work priced.

So there is no formula for any architecture, and what changes in the model, the loss or the attention is followed.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig

from deft import hardware
from deft.errors import MemoryShort
from deft.hardware import Machine
from deft.loader import Loader
from deft.model import attention, fused_layers, multimodal
from deft.model.causal_lm import CausalLM, Mode
from deft.model.checkpointing import Checkpointing
from deft.model.load import Base
from deft.model.selftest import unpackable
from deft.optim.adamw import AdamW
from deft.plan.packs import pack
from deft.rates import Rates
from deft.training.masters import Masters
from deft.training.state import TrainState
from deft.types import MicroBatch, Objective

PROCESS = 2**30
"""What Python, torch and the plan may take besides, where it is asked whether a run fits."""
HEAP = 1.06
"""On CPUs: resident memory per byte of live tensors. Freed pieces stay with the allocator."""
BESIDE = {"fp32": 48 * 2**20, "bf16": 192 * 2**20}
"""On CPUs: what no tensor holds. Reading and planning leave 41 to 54 MiB; in bf16 the kernels that torch and oneDNN
keep by shape add up to 150 MiB on documents of many lengths, 30 on those of one."""
LEAST_TOKENS = 1024
"""Below so many tokens matrix products slow down."""
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""From least to most computed twice."""
LOOKED_AT_STEPS = 256
"""The largest micro-batch is sought among those of so many steps, evenly spread over the plan."""
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32", torch.float64: "fp32"}

CACHE = 2**21
"""Bytes that each thread of a CPU has close by, and gets almost for nothing."""
SAMPLES = 3
"""So many micro-batches tell of the time of all."""

Kind = tuple[str, str]
"""Of a matrix product: gemm, batched or attention, and its precision."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One micro-batch, forward and backward, on tensors that hold nothing.

    parameters   those that are trained
    tokens       of all documents but the last of each, which predicts nothing
    state_bytes  weights and what the optimizer keeps of them
    peak_bytes   the most that is alive at once, state included, gradients of earlier micro-batches as well
    kept_bytes   what is alive between forward and backward
    end_bytes    what is alive after it: state and gradients
    products     FLOP of matrix products
    carried      bytes of their factors and of what they make
    sizes        of how many different sizes they are
    moved        bytes of all other operations that are not in the cache
    exponents    elements of softmaxes
    operations   how many there are, views left out
    """

    parameters: int
    tokens: int
    state_bytes: int
    peak_bytes: int
    kept_bytes: int
    end_bytes: int
    products: Mapping[Kind, float]
    carried: Mapping[Kind, float]
    sizes: Mapping[Kind, int]
    moved: float
    exponents: float
    operations: int

    @property
    def precision(self) -> str:
        """That of most products."""
        totals: dict[str, float] = defaultdict(float)
        for (_, precision), work in self.products.items():
            totals[precision] += work
        return max(totals, key=totals.__getitem__)

    def seconds(self, rates: Rates) -> float:
        """The time of this micro-batch, without the sums of gradients and the update, as the sum of its parts."""
        others = self.moved / rates.moved + self.exponents / rates.exponents + self.operations / rates.operations
        return sum(self._product_seconds(kind, rates) for kind in self.products) + others

    def _product_seconds(self, kind: Kind, rates: Rates) -> float:
        name, precision = kind
        if name == "attention":
            return self.products[kind] / rates.attention[precision]
        return rates.product_seconds(precision, self.products[kind], self.carried[kind])

    def unseen_seconds(self, rates: Rates) -> float:
        """What is added where no product of these sizes was made shortly before."""
        known = rates.unseen
        return sum(count * known.get(precision, {}).get(kind, 0.0) for (kind, precision), count in self.sizes.items())


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run in numbers. peak_bytes and state_bytes are beside what the process has taken before it loads a model.

    Speed and time are None where this machine's rates are not known.
    """

    state_bytes: int
    peak_bytes: int
    memory_bytes: int
    checkpointing: Checkpointing
    tokens_per_second: float | None
    seconds: float | None

    @property
    def is_safe(self) -> bool:
        """Whether memory suffices even if the forecast is far off."""
        return 2 * self.peak_bytes <= self.memory_bytes

    def __str__(self) -> str:
        """
        >>> str(Forecast(2**30, 3 * 2**30, 16 * 2**30, "none", 1234.5, 7200.0))
        'at most 3.0 of 16.0 GiB, 1.0 for weights and optimizer; about 1,230 tokens/s, 2.0 hours in all'
        """
        peak, memory, state = (size / 2**30 for size in (self.peak_bytes, self.memory_bytes, self.state_bytes))
        text = f"at most {peak:.1f} of {memory:.1f} GiB, {state:.1f} for weights and optimizer"
        if self.checkpointing != "none":
            text += f", {self.checkpointing} checkpointing"
        if self.tokens_per_second is None or self.seconds is None:
            return text
        speed = float(f"{self.tokens_per_second:.3g}")
        return f"{text}; about {speed:,.0f} tokens/s, {_duration(self.seconds)} in all"


def forecast(fit: Fit, device: torch.device, rates: Rates | None) -> Forecast | None:
    """Memory from the largest micro-batch, time from the samples; None where nothing could be traced."""
    traced = fit.traced
    if traced is None:
        return None
    heap, beside = (HEAP, _beside(traced)) if device.type == "cpu" else (1.0, 0)
    speed = seconds = None
    if rates is not None and fit.samples:
        counts = _count(fit.planned)
        seconds = _seconds(fit, counts, rates)
        speed = counts.tokens / seconds
    return Forecast(
        state_bytes=round(heap * traced.state_bytes),
        peak_bytes=round(heap * traced.peak_bytes) + beside,
        memory_bytes=hardware.memory_bytes(device),
        checkpointing=fit.checkpointing,
        tokens_per_second=speed,
        seconds=seconds,
    )


def _seconds(fit: Fit, counts: Counts, rates: Rates) -> float:
    """The time of all steps."""
    one = fit.samples[0][0]
    together = rates.together[one.precision]
    parts = sum(share * each.seconds(rates) for each, share in fit.samples)
    parts += one.parameters * (fit.planned.steps / rates.updated + counts.sums / rates.summed)
    besides = counts.micro_batches * one.parameters * together["parameter"]
    unseen = sum(share * each.unseen_seconds(rates) for each, share in fit.samples)
    return together["parts"] * parts + besides + counts.changed * unseen


def _beside(traced: Trace) -> int:
    return BESIDE[traced.precision]


def _duration(seconds: float) -> str:
    """
    >>> _duration(59), _duration(900), _duration(90_000)
    ('59 seconds', '15 minutes', '25.0 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan whose micro-batches fit in memory, what layers keep for their backward pass, and what that takes.

    traced   the largest micro-batch; None where the architecture cannot be run without values, as it routes tokens by
             them
    samples  for the time, where it is asked for: micro-batches, and how many of each have as many tokens as all
    """

    planned: Loader
    checkpointing: Checkpointing
    traced: Trace | None
    samples: tuple[tuple[Trace, float], ...] = ()


def fit(
    planned: Loader, base: Base, objective: Objective, machine: Machine, *, is_auto: bool, is_timed: bool = False
) -> Fit:
    """The fastest way through the plan that fits; if `is_auto` its micro-batches may be halved, if `is_timed` the time
    can be foretold.

    Smaller micro-batches cost less than computing twice, until they are below LEAST_TOKENS. Decided by shapes and the
    memory that is built in, not by what is free, so that it is the same each time. Raises MemoryShort where not even
    the longest document alone fits.
    """
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    memory = hardware.memory_bytes(machine.device)
    for plan, mode in _ways(planned) if is_auto else ((planned, mode) for mode in CHECKPOINTING):
        batch, is_alone = largest(plan)
        fit = Fit(plan, mode, _attempt(config, batch, objective, machine, is_alone, mode))
        if fit.traced is None:
            return fit
        if fit.traced.peak_bytes + PROCESS <= memory:
            break
    else:
        if is_auto and fit.traced:
            raise MemoryShort(_too_large(fit.traced, memory))
    return replace(fit, samples=_samples(fit, config, objective, machine)) if is_timed else fit


def _ways(planned: Loader) -> Iterator[tuple[Loader, Checkpointing]]:
    """From least to most computed twice. Only the last may cut micro-batches down to the longest document."""
    for mode in CHECKPOINTING:
        for plan in _halved(planned, LEAST_TOKENS if mode != CHECKPOINTING[-1] else 1):
            yield plan, mode


def _halved(planned: Loader, least: int) -> Iterator[Loader]:
    """Plans with ever smaller micro-batches, the first as it is, down to `least` tokens or the longest document."""
    yield planned
    longest = max(largest(planned)[0].documents)
    while planned.microbatch_tokens // 2 >= max(least, longest):
        planned = replace(planned, microbatch_tokens=planned.microbatch_tokens // 2)
        yield planned


def _too_large(traced: Trace, memory: int) -> str:
    needed, there, state = (f"{size / 2**30:.1f} GiB" for size in (traced.peak_bytes, memory, traced.state_bytes))
    return (
        f"out of memory: a step needs about {needed} of this machine's {there}, {state} of them for weights and "
        "optimizer; take a smaller model, or a smaller max_length"
    )


def largest(planned: Loader) -> tuple[MicroBatch, bool]:
    """The micro-batch with the most tokens, and whether every step that was looked at has only one."""
    best, most, is_alone = (0, 0), 0, True
    for step in _looked_at(planned):
        sizes = _sizes(planned, step)
        is_alone &= len(sizes) == 1
        if max(sizes) > most:
            most, best = max(sizes), (step, sizes.index(max(sizes)))
    step, index = best
    return planned.step(step).micro_batches[index], is_alone


def _samples(
    fit: Fit, config: PreTrainedConfig, objective: Objective, machine: Machine
) -> tuple[tuple[Trace, float], ...]:
    """Of the smallest third of all micro-batches the middle one, traced, and for how many it stands by its tokens; and
    of the other two thirds. Empty if one of them could not be traced."""
    found: dict[Any, Trace | None] = {}
    samples = []
    for batch, share in _chosen(fit.planned):
        form = (batch.documents, len(batch.targets))
        if form not in found:
            found[form] = _attempt(config, batch, objective, machine, True, fit.checkpointing)
        traced = found[form]
        if traced is None:
            return ()
        samples.append((traced, share))
    return tuple(samples)


def _chosen(planned: Loader) -> Iterator[tuple[MicroBatch, float]]:
    """Micro-batches, each with how many of it have as many tokens as its part of the plan."""
    steps = _looked_at(planned)
    sized = sorted((size, step, i) for step in steps for i, size in enumerate(_sizes(planned, step)))
    for part in np.array_split(np.arange(len(sized)), min(SAMPLES, len(sized))):
        size, step, index = sized[part[len(part) // 2]]
        share = sum(sized[i][0] for i in part) / size * planned.steps / len(steps)
        yield planned.step(step).micro_batches[index], share


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a whole plan, as far as `largest` looks.

    changed  the share of micro-batches that are of another size than the one before
    sums     how many times gradients of a micro-batch go into sums: a step of one needs none
    """

    tokens: float
    micro_batches: float
    changed: float
    sums: float


def _count(planned: Loader) -> Counts:
    steps = _looked_at(planned)
    by_step = [_sizes(planned, step) for step in steps]
    sizes = [size for each in by_step for size in each]
    changes = sum(before != after for before, after in pairwise([0, *map(hardware.round_up_rows, sizes)]))
    sums = sum(len(each) for each in by_step if len(each) > 1)
    share = planned.steps / len(steps)
    return Counts(sum(sizes) * share, len(sizes) * share, changes / len(sizes), sums * share)


def _looked_at(planned: Loader) -> range:
    return range(0, planned.steps, max(1, planned.steps // LOOKED_AT_STEPS))


def _sizes(planned: Loader, step: int) -> list[int]:
    """The tokens of each micro-batch of a step."""
    lengths = [len(part.tokens) for example in planned.members(step) for part in example]
    return [sum(lengths[index] for index in members) for members in pack(lengths, planned.microbatch_tokens)]


def _attempt(
    config: PreTrainedConfig,
    batch: MicroBatch,
    objective: Objective,
    machine: Machine,
    is_alone: bool,
    mode: Checkpointing,
) -> Trace | None:
    """The trace, or None where this architecture cannot be run without values: one that routes tokens by them."""
    try:
        return trace(config, batch, objective, machine, is_alone, mode)
    except Exception:  # Whatever an architecture objects to, it means the same: it has to be seen in the run.
        return None


def trace(
    config: PreTrainedConfig,
    batch: MicroBatch,
    objective: Objective,
    machine: Machine,
    is_alone: bool,
    checkpointing: Checkpointing = "none",
) -> Trace:
    """What training a model of this configuration on this micro-batch takes.

    is_alone  whether the step has no other micro-batch, so that no gradients are summed

    Where all layers are alike, one and two of them tell of any number: every figure grows by the same with each.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers <= 3 or not _are_alike(config):
        return _trace(config, batch, objective, machine, is_alone, checkpointing)
    shallow = (_of_depth(config, depth) for depth in (1, 2))
    one, two = (_trace(each, batch, objective, machine, is_alone, checkpointing) for each in shallow)
    return _extended(one, two, layers)


def _are_alike(config: PreTrainedConfig) -> bool:
    """Whether nothing in a configuration differs from layer to layer."""
    text = config.get_text_config()
    is_uniform = all(len(set(map(str, each))) == 1 for each in _by_layer(text).values())
    return is_uniform and not multimodal.is_multimodal(config)


def _by_layer(text: PreTrainedConfig) -> dict[str, list[Any]]:
    """What a configuration says of each layer."""
    values = vars(text).items()
    return {name: list(each) for name, each in values if isinstance(each, list) and len(each) == text.num_hidden_layers}


def _of_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    values = {name: each[:depth] for name, each in _by_layer(config).items()}
    shallow = deepcopy(config)
    for name, value in {**values, "num_hidden_layers": depth}.items():
        setattr(shallow, name, value)
    return shallow


def _extended(one: Trace, two: Trace, layers: int) -> Trace:
    """From one layer and two to many. Backward frees activations and makes gradients: the most is alive at its
    beginning or at its end, whichever grows faster. What a layer takes for a moment, the last one less than others, is
    there once."""

    def many(first: float, second: float) -> float:
        return first + (layers - 1) * (second - first)

    growth = max(two.kept_bytes - one.kept_bytes, two.end_bytes - one.end_bytes)
    return Trace(
        parameters=round(many(one.parameters, two.parameters)),
        tokens=one.tokens,
        state_bytes=round(many(one.state_bytes, two.state_bytes)),
        peak_bytes=max(one.peak_bytes + growth, two.peak_bytes) + (layers - 2) * growth,
        kept_bytes=round(many(one.kept_bytes, two.kept_bytes)),
        end_bytes=round(many(one.end_bytes, two.end_bytes)),
        products={kind: many(one.products.get(kind, 0.0), work) for kind, work in two.products.items()},
        carried={kind: many(one.carried.get(kind, 0.0), size) for kind, size in two.carried.items()},
        sizes=two.sizes,
        moved=many(one.moved, two.moved),
        exponents=many(one.exponents, two.exponents),
        operations=round(many(one.operations, two.operations)),
    )


def _trace(
    config: PreTrainedConfig,
    batch: MicroBatch,
    objective: Objective,
    machine: Machine,
    is_alone: bool,
    checkpointing: Checkpointing,
) -> Trace:
    with torch.device("meta"):
        model = multimodal.auto_class(config).from_config(
            config, attn_implementation="eager", dtype=machine.dtype, trust_remote_code=False
        )
    device = machine.device
    mode: Mode = "alone" if unpackable(model) else "packed"
    if mode == "packed":
        model.set_attn_implementation(attention.NAME)
    cache = CACHE * torch.get_num_threads() if device.type == "cpu" else 0
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, _Watch(cache) as watch:
        model.to_empty(device=device)
        model.tie_weights()
        if mode == "packed":
            fused_layers.install(model)
        for parameter in model.parameters():
            watch.see(parameter)
        multimodal.freeze_all_but_text(model)
        model.train()
        masters = Masters(model.named_parameters(), machine.dtype)
        causal_lm = CausalLM(model, mode, checkpointing=checkpointing)
        state = TrainState(causal_lm, masters, AdamW(masters))
        state_bytes = watch.alive
        if not is_alone:
            for parameter in masters.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            masters.collect()
        watch.forget()
        total = state.causal_lm(_on(batch, fakes, device), objective).nll_sum
        kept_bytes = watch.alive
        total.backward()
        peak_bytes, end_bytes = watch.peak, watch.alive
    return Trace(
        parameters=sum(parameter.numel() for parameter in masters.parameters.values()),
        tokens=len(batch.tokens),
        state_bytes=state_bytes,
        peak_bytes=peak_bytes,
        kept_bytes=kept_bytes,
        end_bytes=end_bytes,
        products=dict(watch.products),
        carried=dict(watch.carried),
        sizes=Counter((kind, precision) for kind, precision, *_ in watch.sizes),
        moved=watch.moved,
        exponents=watch.exponents,
        operations=watch.operations,
    )


def _on(batch: MicroBatch, fakes: FakeTensorMode, device: torch.device) -> MicroBatch:
    names = ("tokens", "positions", "rows", "targets", "weights")
    moved: dict[str, Any] = {name: fakes.from_tensor(getattr(batch, name)).to(device) for name in names}
    return replace(batch, **moved)


class _Watch(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the work of operations.

    cache  bytes that are close by; an accelerator's are few beside its tensors
    """

    def __init__(self, cache: int = 0) -> None:
        super().__init__()
        self.alive = self._seen = 0
        self._cache = _Cache(cache)
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self.forget()

    def forget(self) -> None:
        """The work so far does not count, nor does the memory that it took for a moment."""
        self.peak = self.alive
        self.products: defaultdict[Kind, float] = defaultdict(float)
        self.carried: defaultdict[Kind, float] = defaultdict(float)
        self.sizes: set[tuple[Any, ...]] = set()
        self.moved = self.exponents = 0.0
        self.operations = 0

    def see(self, tensor: Tensor) -> bool:
        """Counts a tensor's memory, if it is new; whether it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self._numbers[key] = self._seen = self._seen + 1
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key)
        return True

    def _gone(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)
        del self._numbers[key]

    def _fetched(self, tensor: Tensor) -> int:
        """The bytes of a tensor that were not in the cache, and are now."""
        key = tensor.untyped_storage()._cdata
        piece = (self._numbers.get(key, -key), tensor.storage_offset(), tensor.numel())
        return self._cache.fetch(piece, _bytes([tensor]))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        are_new = [self.see(each) for each in outs]
        if outs and (any(are_new) or function._schema.is_mutable):
            self._price(function, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], outs)
        return out

    def _price(self, function: Any, inputs: list[Tensor], outs: list[Tensor]) -> None:
        """inputs are those given by position, which no `out=` is."""
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(("empty", "new_empty")):
            return
        self.operations += 1
        fetched = sum(self._fetched(tensor) for tensor in [*inputs, *outs])
        if "scaled_dot_product" in name:
            query = next(each for each in inputs if each.dim() == 4)
            n, heads, length, size = query.shape
            products = 5 if "backward" in name else 2
            self.products["attention", PRECISIONS[query.dtype]] += products * n * heads * length**2 * size
        elif name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            left, right = inputs[-2:]
            kind = ("batched" if "bmm" in name else "gemm", PRECISIONS[left.dtype])
            self.products[kind] += 2.0 * left.numel() * right.shape[-1]
            self.carried[kind] += _bytes([left, right, *outs])
            layouts = (each.stride()[-1] == 1 for each in (left, right))
            self.sizes.add((*kind, left.shape, right.shape, *layouts, "add" in name))
        elif "softmax" in name:
            self.exponents += outs[0].numel()
        else:
            self.moved += fetched


class _Cache:
    """The pieces of memory that were used last, `room` bytes of them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: dict[Any, int] = {}

    def fetch(self, piece: Any, size: int) -> int:
        """The bytes that have to be brought; to make room, what was used longest ago goes.

        >>> cache = _Cache(10)
        >>> cache.fetch("a", 6), cache.fetch("b", 4), cache.fetch("a", 6), cache.fetch("c", 2), cache.fetch("b", 4)
        (6, 4, 0, 2, 4)
        """
        is_held = self._held.pop(piece, None) is not None
        self._held[piece] = size
        if is_held:
            return 0
        self._room -= size
        while self._room < 0:
            self._room += self._held.pop(next(iter(self._held)))
        return size


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
