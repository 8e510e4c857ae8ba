"""Peak memory of an optimizer step, before weights are loaded: the code that will run, on fake tensors.

torch computes their shapes, and the bytes of those alive are counted as each is made and freed.

So there is no formula for any architecture, and what changes in the model, the loss or the attention is followed.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from deft.core import files, hardware
from deft.core.errors import MemoryShort
from deft.core.files import Staging
from deft.core.hardware import Machine
from deft.core.types import MicroBatch, Objective
from deft.dataset import cache
from deft.dataset.cache import Cache
from deft.model import attention, base_config, fused_layers, multimodal
from deft.model.causal_lm import CausalLM, Mode
from deft.model.checkpointing import Checkpointing
from deft.model.load import Base, skeleton, unpackable
from deft.model.trainable import ALL, Trainable
from deft.plan.loader import Loader
from deft.run import resume, scaling
from deft.run.scaling import Groups, StepLayout
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.state import TrainState

PROCESS = 2**30
"""What Python, torch and the plan may take besides, where it is asked whether a run fits."""
HEAP = 1.06
"""On CPUs: resident memory per byte of live tensors. Freed pieces stay with the allocator."""
BESIDE = {torch.float32: 48 * 2**20, torch.bfloat16: 192 * 2**20}
"""On CPUs: what no tensor holds. Reading and planning leave 41 to 54 MiB; in bf16 the kernels that torch and oneDNN
keep by shape add up to 150 MiB on documents of many lengths, 30 on those of one."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of a model that several compute, and of their memory.

    shard       ranks that share one copy, and `most` that could: all, or 1 where something of the run is against it
    is_ordered  whether these add gradients in the order of the micro-batches
    whole_in    the dtype of weights that are whole on each rank before it keeps its rows; None where it reads its rows
    memory      the least that any rank may use, so that all decide alike; 0 is what this one may
    """

    ranks: int = 1
    shard: int = 1
    most: int = 1
    is_ordered: bool = True
    whole_in: torch.dtype | None = None
    memory: int = 0

    def memory_bytes(self, machine: Machine) -> int:
        return self.memory or hardware.memory_bytes(machine.device)

    @property
    def spread_out(self) -> Share:
        """One copy over as many ranks as can share it."""
        return replace(self, shard=self.most)


ALONE = Share()


@dataclass(frozen=True, slots=True)
class Trace:
    """The bytes of one micro-batch, forward and backward, on fake tensors.

    parameters   those that are trained
    state_bytes  weights and what the optimizer keeps of them
    peak_bytes   the most that is alive at once, state included, gradients of earlier micro-batches as well
    kept_bytes   what is alive between forward and backward
    end_bytes    what is alive after it: state and gradients
    """

    parameters: int
    state_bytes: int
    peak_bytes: int
    kept_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's memory. peak_bytes and state_bytes are beside what the process has taken before it loads a model."""

    state_bytes: int
    peak_bytes: int
    memory_bytes: int
    checkpointing: Checkpointing

    @property
    def is_safe(self) -> bool:
        """Whether memory suffices even if the forecast is far off."""
        return 2 * self.peak_bytes <= self.memory_bytes

    def __str__(self) -> str:
        """
        >>> str(Forecast(2**30, 3 * 2**30, 16 * 2**30, "selective"))
        'at most 3.0 of 16.0 GiB, 1.0 for weights and optimizer, selective checkpointing'
        """
        peak, memory, state = (size / 2**30 for size in (self.peak_bytes, self.memory_bytes, self.state_bytes))
        text = f"at most {peak:.1f} of {memory:.1f} GiB, {state:.1f} for weights and optimizer"
        return text if self.checkpointing == "none" else f"{text}, {self.checkpointing} checkpointing"


def forecast(fit: Fit, machine: Machine, share: Share = ALONE) -> Forecast | None:
    """Memory of a rank from the largest micro-batch; None where it could not be traced."""
    traced = fit.traced
    if traced is None:
        return None
    heap, beside = (HEAP, BESIDE[machine.dtype]) if machine.device.type == "cpu" else (1.0, 0)
    return Forecast(
        state_bytes=round(heap * traced.state_bytes),
        peak_bytes=round(heap * traced.peak_bytes) + beside,
        memory_bytes=share.memory_bytes(machine),
        checkpointing=fit.checkpointing,
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan whose micro-batches fit in memory, what layers keep for their backward pass, and what that takes.

    traced  the largest micro-batch; None where the architecture cannot be run without values, as it routes tokens by
            them
    """

    planned: Loader
    checkpointing: Checkpointing
    traced: Trace | None


def fit(
    planned: Loader,
    base: Base,
    objective: Objective,
    machine: Machine,
    *,
    is_auto: bool,
    trainable: Trainable = ALL,
    share: Share = ALONE,
) -> Fit:
    """The fastest way through the plan that fits, of `scaling.ways`; if `is_auto` its micro-batches may be halved.

    Decided by shapes and the memory that is built in, not by what is free, so that it is the same each time. Raises
    MemoryShort where not even the longest document alone fits.
    """
    memory = share.memory_bytes(machine)

    def of_rank(plan: Loader, mode: Checkpointing, share: Share) -> Trace:
        config, is_shared = base_config.read(base.path), share.shard > 1
        batch, is_alone = largest(plan, share.ranks if is_shared else 1)
        traced = trace(config, batch, objective, machine, is_alone or is_shared, mode, trainable, is_shared)
        return rows_of(traced, Groups.of(*skeleton(base, trainable)), machine, share, is_alone) if is_shared else traced

    def fits(traced: Trace) -> bool:
        return traced.peak_bytes + PROCESS <= memory

    for mode, tokens in scaling.ways(planned.microbatch_tokens, lambda: max(largest(planned)[0].documents), is_auto):
        plan = replace(planned, microbatch_tokens=tokens)
        try:
            traced = of_rank(plan, mode, share)
        except Exception:  # Whatever an architecture objects to, it means the same: it has to be seen in the run.
            return Fit(plan, mode, None)
        if fits(traced):
            return Fit(plan, mode, traced)
    if is_auto:
        would = share.shard < share.most and fits(of_rank(plan, mode, share.spread_out))
        raise MemoryShort(_short(traced, memory, ways_out(trainable, share if would else replace(share, most=1))))
    return Fit(plan, mode, traced)


def rows_of(traced: Trace, groups: Groups, machine: Machine, share: Share, is_alone: bool) -> Trace:
    """Of a model that ranks share, what one needs whose gradients were let go: state, sums, gathered weights and moved
    gradients by the formulas of `scaling`, and what else was alive as it was traced.

    Most is alive at the beginning of a backward pass, where the head's gradients or those of a layer are on their way,
    or at its end, where those of the root are; or where weights are whole at first.

    is_alone  whether no step has a second round
    """
    layout = StepLayout(share.ranks, share.ranks, share.shard, 0, 0, dtype=machine.dtype, is_ordered=share.is_ordered)
    state = scaling.state(groups.whole, machine.dtype, share.shard).total
    gathered, sums = scaling.gathered(groups, layout), scaling.SUM * groups.whole.trained / share.shard
    first = scaling.moved(max(groups.head.trained, groups.largest.trained), layout)
    work, moment = traced.peak_bytes - traced.state_bytes, traced.peak_bytes - traced.kept_bytes
    begin = state + gathered + (0 if is_alone else sums) + first + work
    end = state + gathered + scaling.gradients(groups, layout) + moment
    return Trace(
        parameters=traced.parameters,
        state_bytes=round(state),
        peak_bytes=round(max(begin, end, scaling.loading(groups.whole, machine.dtype, share.whole_in))),
        kept_bytes=round(state + gathered + traced.kept_bytes - traced.state_bytes),
        end_bytes=round(state + sums),
    )


def kept_fit(
    kept_in: Cache,
    planned: Loader,
    digests: np.ndarray,
    machine: Machine,
    share: Share,
    make: Callable[[], Fit],
    *more: str,
) -> Fit:
    """The fit that an earlier start has kept for this plan, these examples, this machine and deft's code; else `make`s.

    more  whatever else it depends on
    """
    orders = (array for epoch in planned.epochs for array in (epoch.order, epoch.starts))
    plan = [resume.plan_digest([*orders, digests]), planned.microbatch_tokens, planned.normalize, planned.limit]
    plan += [planned.lanes] if planned.lanes > 1 else []
    here = [hardware.describe(machine.device), str(machine.dtype), share.memory_bytes(machine)]
    more = (*more, repr(share)) if share.shard > 1 else more

    def write(staging: Staging) -> None:
        fit = make()
        traced = fit.traced and asdict(fit.traced)
        staging.write_json("fit.json", [fit.planned.microbatch_tokens, fit.checkpointing, traced])

    folder, manifest = kept_in.get(cache.digest([plan, here, cache.package(), more]), write)
    tokens, mode, traced = json.loads(files.read(folder / "fit.json", manifest.files["fit.json"]))
    return Fit(replace(planned, microbatch_tokens=tokens), mode, traced and Trace(**traced))


def _short(traced: Trace, memory: int, ways: str) -> str:
    needed, there, state = (f"{size / 2**30:.1f} GiB" for size in (traced.peak_bytes, memory, traced.state_bytes))
    return (
        f"out of memory: a step needs about {needed} of this machine's {there}, {state} of them for weights and "
        f"optimizer; take a smaller model, or a smaller max_length{ways}"
    )


def ways_out(trainable: Trainable, share: Share) -> str:
    """What else makes a rank hold less of a model, each after ", or ".

    >>> ways_out(ALL, Share(ranks=4, most=4))
    ', or share one copy between the ranks (shard=4), or train an adapter (adapter=lora)'
    """
    shard = share.most if share.shard < share.most else 0
    fix = f", or share one copy between the ranks (shard={shard})" if shard else ""
    fix += "" if trainable.adapter else ", or train an adapter (adapter=lora)"
    is_plain = trainable.adapter and trainable.quantize == "off" and share.shard == 1
    return fix + (", or quantize its base (quantize=nf4)" if is_plain else "")


def largest(planned: Loader, ranks: int = 1) -> tuple[MicroBatch, bool]:
    """The micro-batch with the most tokens, and whether no step has more of them than ranks, as far as `spread_steps`
    look."""
    best, most, is_alone = (0, 0), 0, True
    for step in planned.spread_steps():
        sizes = planned.sizes(step)
        is_alone &= len(sizes) <= ranks
        if max(sizes) > most:
            most, best = max(sizes), (step, sizes.index(max(sizes)))
    step, index = best
    return planned.step(step).micro_batches[index], is_alone


def too_large(base: Base, machine: Machine, trainable: Trainable, share: Share = ALONE) -> str:
    """Said of a model whose state alone does not fit a rank."""
    whole = Groups.of(*skeleton(base, trainable)).whole
    state = (
        scaling.state(whole, machine.dtype, share.shard).total + machine.dtype.itemsize * whole.trained / share.shard
    )
    need = max(state, scaling.loading(whole, machine.dtype, share.whole_in)) / 2**30
    fix = f"take a smaller model{ways_out(trainable, share)}"
    where = f" on each of {share.ranks} ranks" if share.ranks > 1 else ""
    return f"{base.path} needs {need:.1f} GiB for weights, gradients and optimizer alone{where}; {fix}"


def too_long(step: int, microbatch_tokens: int, longest: int, ways: str = "") -> str:
    """Said of a step that does not fit: smaller micro-batches may, or shorter rows where one fills it alone; `ways` of
    having less of the model."""
    if longest < microbatch_tokens:
        fix = f"microbatch_tokens={max(longest, microbatch_tokens // 2)} needs less memory and changes no result"
    else:
        fix = f"the longest row has {longest} tokens; max_length={longest // 2} cuts such rows"
    return f"step {step} with micro-batches of {microbatch_tokens} tokens; {fix}{ways}"


def trace(
    config: PreTrainedConfig,
    batch: MicroBatch,
    objective: Objective,
    machine: Machine,
    is_alone: bool,
    checkpointing: Checkpointing = "none",
    trainable: Trainable = ALL,
    is_shared: bool = False,
) -> Trace:
    """What training a model of this configuration on this micro-batch takes.

    is_alone   whether the step has no other micro-batch, so that no gradients are summed
    is_shared  whether each gradient is let go once it is made, as where ranks share the model and send them

    Where all layers are alike, one and two of them tell of any number: every figure grows by the same with each.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers <= 3 or not _are_alike(config) or not trainable.is_alike:
        return _trace(config, batch, objective, machine, is_alone, checkpointing, trainable, is_shared)
    shallow = (_of_depth(config, depth) for depth in (1, 2))
    given = (batch, objective, machine, is_alone, checkpointing, trainable, is_shared)
    one, two = (_trace(each, *given) for each in shallow)
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
        state_bytes=round(many(one.state_bytes, two.state_bytes)),
        peak_bytes=max(one.peak_bytes + growth, two.peak_bytes) + (layers - 2) * growth,
        kept_bytes=round(many(one.kept_bytes, two.kept_bytes)),
        end_bytes=round(many(one.end_bytes, two.end_bytes)),
    )


def _trace(
    config: PreTrainedConfig,
    batch: MicroBatch,
    objective: Objective,
    machine: Machine,
    is_alone: bool,
    checkpointing: Checkpointing,
    trainable: Trainable,
    is_shared: bool = False,
) -> Trace:
    with torch.device("meta"):
        model = multimodal.auto_class(config).from_config(
            config, attn_implementation="eager", dtype=machine.dtype, trust_remote_code=False
        )
        multimodal.freeze_all_but_text(model)
        rows = trainable.apply(model)
    device = machine.device
    mode: Mode = "alone" if unpackable(model) else "packed"
    if mode == "packed":
        model.set_attn_implementation(attention.NAME)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, LiveBytes() as live:
        model.to_empty(device=device)
        model.tie_weights()
        if mode == "packed":
            fused_layers.install(model)
        for parameter in model.parameters():
            live.see(parameter)
        model.train()
        masters = Masters(model.named_parameters(), machine.dtype, rows)
        causal_lm = CausalLM(model, mode, checkpointing=checkpointing)
        if objective.uses_start:
            causal_lm.keep_start()
        state = TrainState(causal_lm, masters, AdamW(masters))
        state_bytes = live.alive
        _prepare_gradients(masters, is_alone, is_shared)
        live.peak = live.alive
        total = state.causal_lm(_on(batch, fakes, device), objective).nll_sum
        kept_bytes = live.alive
        total.backward()
        peak_bytes, end_bytes = live.peak, live.alive
    return Trace(
        parameters=sum(parameter.numel() for parameter in masters.parameters.values()),
        state_bytes=state_bytes,
        peak_bytes=peak_bytes,
        kept_bytes=kept_bytes,
        end_bytes=end_bytes,
    )


def _prepare_gradients(masters: Masters, is_alone: bool, is_shared: bool) -> None:
    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in masters.parameters.values():
        if not is_alone:
            parameter.grad = torch.zeros_like(parameter)
        if is_shared:
            parameter.register_post_accumulate_grad_hook(let_go)
    if not is_alone:
        masters.collect()


def _on(batch: MicroBatch, fakes: FakeTensorMode, device: torch.device) -> MicroBatch:
    names = ("tokens", "positions", "rows", "targets", "weights")
    moved: dict[str, Any] = {name: fakes.from_tensor(getattr(batch, name)).to(device) for name in names}
    return replace(batch, **moved)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make: those `alive` now, and the `peak` of that."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def see(self, tensor: Tensor) -> None:
        """Counts a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out
