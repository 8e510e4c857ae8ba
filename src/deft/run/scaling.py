"""What one optimizer step takes on each of many ranks, from a model's shapes alone. docs/scaling.md has it in tables.

One copy of the model is spread over `shard` ranks: 1 is a whole copy on each, the ranks of a node is HSDP, all ranks
is FSDP2. Bytes, FLOP and seconds throughout; B/P are bytes a parameter. Everything is arithmetic: no weight, no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.core import hardware
from deft.core.errors import InputError
from deft.core.registry import closest
from deft.model import quantized
from deft.model.checkpointing import Checkpointing
from deft.model.multimodal import text_body
from deft.training import chunked

LOW, MOMENTS, SUM = 2, 8, 4
"""B/P of what is trained: the low bits of a master beside bf16, AdamW's two moments, a gradient's sum in fp32."""
UPDATE = 104
"""B/P that an update moves on CUDA, norm included: counted in the code of training/optim/adamw.py, not measured."""
SPARE = 0.05
"""Of a GPU's memory, left to its context, NCCL's buffers and what the allocator cannot use."""
LINK_SHARE = 0.8
"""Of a link's speed that large collectives reach: an assumption."""
NEAR = 0.05
"""A difference of time that is not trusted."""
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""From least to most computed twice."""
LEAST_TOKENS = 1024
"""Matrix products of fewer tokens are slow."""


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters that are trained and that are frozen; bytes of codes, which stay whole on each rank."""

    trained: int = 0
    frozen: int = 0
    codes: int = 0

    @property
    def plain(self) -> int:
        """Those that are no codes."""
        return self.trained + self.frozen

    def __add__(self, other: Count) -> Count:
        return Count(self.trained + other.trained, self.frozen + other.frozen, self.codes + other.codes)


@dataclass(frozen=True, slots=True)
class Flop:
    """What the work of a micro-batch is made of: parameters that its layers multiply with and that its head does, those
    of them that are trained, and elements of a token's queries in all layers."""

    layers: int
    layers_trained: int
    head: int
    head_trained: int
    queries: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Flop:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = {id(each.weight): each.weight for each in ends if each is not None}
        head = [*weights.values()][-1]
        rest = [each for each in model.parameters() if id(each) not in weights]
        text = model.config.get_text_config()
        return cls(
            layers=quantized.size(model) - sum(each.numel() for each in weights.values()),
            layers_trained=sum(each.numel() for each in rest if each.requires_grad),
            head=head.numel(),
            head_trained=head.numel() if head.requires_grad else 0,
            queries=text.num_hidden_layers * _queries(text),
        )

    def __call__(self, tokens: float, targets: float, squares: float, mode: Checkpointing = "none") -> float:
        """Forward 2 and backward 4 for each parameter and token, 2 of them where it is frozen; the head for targets;
        attention 2 and 5 for each element of queries and square of a document's length (causal: half of all pairs).

        squares  the sum of the squares of documents' lengths
        mode     full computes every layer's forward twice, selective that of attention

        >>> Flop(100, 100, 10, 10, 8)(5, 4, 9 + 4) == 6 * (5 * 100 + 4 * 10) + 7 * 8 * (9 + 4)
        True
        """
        again = 2 * self.layers if mode == "full" else 0
        layers = tokens * (4 * self.layers + 2 * self.layers_trained + again)
        head = targets * (4 * self.head + 2 * self.head_trained)
        return layers + head + (7.0 if mode == "none" else 9.0) * self.queries * squares


@dataclass(frozen=True, slots=True)
class Groups:
    """What of a model is gathered by itself where ranks share it.

    layers  all layers together, and `largest` the largest of them; `root` is all else: embeddings, head, norms
    head    that of the root, where its weights are its own
    """

    layers: Count
    largest: Count
    root: Count
    head: Count

    @property
    def whole(self) -> Count:
        return self.layers + self.root

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Mapping[str, slice] = MappingProxyType({})) -> Groups:
        """From a model without weights (`model.load.skeleton`), adapters and frozen parameters as they will be.

        rows  parameters of which only some rows are trained
        """
        names = {id(each): name for name, each in model.named_parameters()}
        counts = [_count([block], names, rows) for block in _blocks(model)]
        layers, whole = sum(counts, Count()), _count([model], names, rows)
        root = Count(whole.trained - layers.trained, whole.frozen - layers.frozen, whole.codes - layers.codes)
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        own = [ends[1]] if ends[1] is not None and ends[1].weight is not ends[0].weight else []
        largest = max(counts, key=lambda count: count.plain, default=Count())
        return cls(layers, largest, root, _count(own, names, rows))


@dataclass(frozen=True, slots=True)
class Sizes(Groups):
    """A model's shapes, as far as memory, work and traffic follow from them.

    outputs  elements of a token that the products of a mean layer make, and `inputs` those that they take, each once
             where several take the same
    queries  elements of a token's queries in a layer, and `attention` those of queries, keys and values
    """

    depth: int
    hidden: int
    vocabulary: int
    outputs: int
    inputs: int
    queries: int
    attention: int
    heads: int
    flop: Flop

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Mapping[str, slice] = MappingProxyType({})) -> Sizes:
        """As `Groups.of`. Raises InputError where layers are not made of plain products, as those with experts are."""
        head, text, blocks = model.get_output_embeddings(), model.config.get_text_config(), _blocks(model)
        queries, key_heads = _queries(text), text.to_dict().get("num_key_value_heads") or text.num_attention_heads
        groups, (outputs, inputs) = Groups.of(model, rows), _products(model, blocks)
        return cls(
            layers=groups.layers,
            largest=groups.largest,
            root=groups.root,
            head=groups.head,
            depth=len(blocks),
            hidden=text.hidden_size,
            vocabulary=len(head.weight),
            outputs=round(outputs / len(blocks)),
            inputs=round(inputs / len(blocks)),
            queries=queries,
            attention=queries * (text.num_attention_heads + 2 * key_heads) // text.num_attention_heads,
            heads=text.num_attention_heads,
            flop=Flop.of(model),
        )


def _queries(text: Any) -> int:
    described = text.to_dict()
    return text.num_attention_heads * (described.get("head_dim") or text.hidden_size // text.num_attention_heads)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [each for each in text_body(model).modules() if isinstance(each, GradientCheckpointingLayer)]


def _count(parts: Sequence[nn.Module], names: Mapping[int, str], rows: Mapping[str, slice]) -> Count:
    """Parameters of some modules, each once. names: of the model's, by their id."""
    inside = {id(each): each for part in parts for each in part.parameters()}
    trained = {key: each for key, each in inside.items() if each.requires_grad}
    learnt = sum((each[rows[name]] if (name := names[key]) in rows else each).numel() for key, each in trained.items())
    total = sum(each.numel() for each in inside.values())
    return Count(learnt, total - learnt, sum(map(quantized.code_bytes, parts)))


@torch.no_grad()
def _products(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """Elements of a token that products in all layers make, and that they take: told by two tokens without values.

    What narrow products of adapters make is added to another's output, and so counts no second time.
    """
    taken: dict[int, torch.Tensor] = {}
    made: list[int] = []

    def see(is_narrow: bool, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        taken[id(arguments[0])] = arguments[0]
        made.append(0 if is_narrow else output.shape[-1])

    hooks = []
    for block in blocks:
        if any(each.ndim > 2 for each in block.parameters()):
            raise _unknown(model)
        for name, module in block.named_modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(each.ndim == 2 for each in tensors) and not isinstance(module, nn.Embedding):
                is_narrow = ".lora_" in f".{name}"
                hooks.append(module.register_forward_hook(partial(see, is_narrow)))
    tokens, mask = (torch.ones(shape, dtype=torch.int64, device="meta") for shape in ((1, 2), (1, 1, 2, 2)))
    try:
        text_body(model)(input_ids=tokens, attention_mask=mask, use_cache=False)  # such a mask is handed on as it is
    except Exception as error:  # Whatever an architecture objects to, it means the same: it has to be seen in the run.
        raise _unknown(model) from error
    finally:
        for hook in hooks:
            hook.remove()
    return sum(made), sum(each.shape[-1] for each in taken.values())


def _unknown(model: PreTrainedModel) -> InputError:
    what = f"what layers of {model.config.model_type} keep does not follow from their shapes"
    return InputError(f"model: {what}; deft check --time on the GPUs themselves says what a step takes")


@dataclass(frozen=True, slots=True)
class StepLayout:
    """One step, laid out over ranks.

    tokens      of a micro-batch, and `targets` those of them that are learnt
    rounds      micro-batches that a rank computes one after another
    is_ordered  whether the ranks of a copy add gradients in the order of the micro-batches
    """

    ranks: int
    per_node: int
    shard: int
    tokens: int
    targets: int
    rounds: int = 1
    mode: Checkpointing = "none"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    is_ordered: bool = False

    @property
    def replicas(self) -> int:
        return self.ranks // self.shard


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a rank when most are alive: at the beginning of a backward pass, or at its end.

    gathered  whole weights of the layers at work, where the model is spread
    """

    weights: float
    low_bits: float
    moments: float
    gradients: float = 0
    gathered: float = 0
    activations: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        return sum(astuple(self))


def memory(sizes: Sizes, layout: StepLayout) -> Memory:
    """The most that a step needs on a rank: `begin` or `end`."""
    return max(begin(sizes, layout), end(sizes, layout), key=lambda each: each.total)


def begin(sizes: Sizes, layout: StepLayout) -> Memory:
    """The beginning of a backward pass: state, the activations of all layers, the gradient of the head, fp32 sums of
    earlier rounds (4/s B/P on each of s ranks that share a copy), and what a layer or the head needs for a moment."""
    kept, work = head(sizes, layout)
    of_layers, of_one = activations(sizes, layout)
    return replace(
        state(sizes.whole, layout.dtype, layout.shard),
        gradients=SUM * sizes.whole.trained / layout.shard if layout.rounds > 1 else 0,
        gathered=gathered(sizes, layout),
        activations=of_layers + of_one,
        head=kept + max(0, work - of_one),
    )


def end(sizes: Sizes, layout: StepLayout) -> Memory:
    """The end of a backward pass: state, all gradients, and a layer's activations with their gradients."""
    return replace(
        state(sizes.whole, layout.dtype, layout.shard),
        gradients=gradients(sizes, layout),
        gathered=gathered(sizes, layout),
        activations=2 * activations(sizes, layout)[1],
    )


def state(whole: Count, dtype: torch.dtype, shard: int = 1) -> Memory:
    """What is there between two steps: weights in the compute dtype, low bits of masters in bf16, moments.

    >>> state(Count(trained=1000), torch.bfloat16).total, state(Count(trained=1000), torch.float32, shard=2).total
    (12000.0, 6000.0)
    """
    return Memory(
        weights=dtype.itemsize * whole.plain / shard + whole.codes,
        low_bits=LOW * whole.trained / shard if dtype == torch.bfloat16 else 0.0,
        moments=MOMENTS * whole.trained / shard,
    )


def loading(whole: Count, dtype: torch.dtype, whole_in: torch.dtype | None) -> float:
    """Weights that are whole on each rank before it keeps its rows, in the dtype that they are read in, and then in the
    compute dtype with low bits. None: a rank reads its rows alone.

    >>> [loading(Count(trained=10), torch.bfloat16, each) for each in (None, torch.bfloat16)]
    [0, 40.0]
    """
    if whole_in is None:
        return 0
    made = state(whole, dtype)
    return max(made.weights + made.low_bits, whole_in.itemsize * whole.plain)


def gathered(groups: Groups, layout: StepLayout) -> float:
    """Where a copy is spread: all but the layers through the whole pass, and two layers, one at work and the next on
    its way. 2 B/P in bf16."""
    if layout.shard == 1:
        return 0
    return layout.dtype.itemsize * (groups.root.plain + 2 * groups.largest.plain)


def gradients(groups: Groups, layout: StepLayout) -> float:
    """At the end of a backward pass. Whole copies: the latest gradient in the compute dtype, and in bf16 a sum in fp32
    where there are several rounds or ranks. Spread: fp32 sums of the rank's own part, and those of one layer or of all
    but the layers whole."""
    trained, width = groups.whole.trained, layout.dtype.itemsize
    if layout.shard > 1:
        return SUM * trained / layout.shard + moved(max(groups.largest.trained, groups.root.trained), layout)
    is_summed = layout.dtype == torch.bfloat16 and (layout.rounds > 1 or layout.ranks > 1)
    return (width + (SUM if is_summed else 0)) * trained


def moved(trained: int, layout: StepLayout) -> float:
    """The gradients of what is gathered by itself, on their way into the sum: as computed, and in fp32, or where sums
    are ordered as they are sent to each copy and come from it."""
    width = layout.dtype.itemsize
    return trained * (width + (2 * layout.replicas * width if layout.is_ordered else SUM))


def activations(sizes: Sizes, layout: StepLayout) -> tuple[float, float]:
    """What all layers keep, and what one needs for a moment in its backward pass.

    Elements a token and layer: compiled layers on GPUs keep what their products make and take (Llama: 4H + 2Q + 2KV +
    3I, 139 kB at 8B); selective what products make, and the layer's input. Layers by hand on CPUs (model/cpu/llama.py)
    keep what products make and attention's output; selective all that but the MLP's. full keeps the layer's input
    alone. Attention adds 4 bytes a head. For a moment a layer needs gradients of what it made, and what it makes again.
    """
    by_hand = layout.device == "cpu"
    kept = {
        "none": sizes.outputs + (sizes.queries if by_hand else sizes.inputs),
        "selective": 2 * sizes.hidden + sizes.attention + sizes.queries if by_hand else sizes.outputs + sizes.hidden,
        "full": sizes.hidden,
    }
    width = layout.dtype.itemsize
    statistics = 4 * sizes.heads if layout.mode == "none" else 0
    again = kept["none"] - kept[layout.mode]
    of_one = layout.tokens * width * (sizes.outputs + again)
    return layout.tokens * sizes.depth * (width * kept[layout.mode] + statistics), of_one


def head(sizes: Sizes, layout: StepLayout) -> tuple[float, float]:
    """What the loss leaves for the backward pass: hidden states of targets and their gradient, and the gradient of the
    head's weight, whole on each rank; and what it needs for a moment: a block of logits, and a slice of it in fp32."""
    width, vocabulary = layout.dtype.itemsize, sizes.vocabulary
    rows, slice_rows, sum_width = chunked.room(layout.targets, vocabulary, layout.dtype, torch.device(layout.device))
    kept = 2 * layout.targets * sizes.hidden * width
    kept += sum_width * vocabulary * sizes.hidden if sizes.flop.head_trained else 0
    return kept, vocabulary * (rows * width + (4 * slice_rows if width < 4 else 0))


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU. Memory as torch reports it, in bytes; products in FLOP/s; the others in bytes/s, one direction.

    products    the rate of large products in bf16, and `share` what a step reaches of it
    memory_rate of its memory
    nvlink      to the GPUs of its node; `infiniband` its part of the links to other nodes
    """

    name: str
    memory: float
    products: float
    memory_rate: float
    nvlink: float
    infiniband: float
    share: float = 0.6


_UNITS = {"memory": 2**30, "products": 1e12, "memory_rate": 1e9, "nvlink": 1e9, "infiniband": 1e9, "share": 1.0}
"""GiB, TFLOP/s, GB/s."""

_KINDS = {
    "a100": (79.2, 250, 2000, 300, 25),
    "h100": (79.2, 790, 3350, 450, 50),
    "h200": (139.8, 790, 4800, 450, 50),
}
"""Memory, products, memory_rate, nvlink, infiniband. Products: 80 % of the data sheet's dense bf16 (312, 989, 989), as
was measured on an H200. NVLink: half of the sheet's sum of both directions. InfiniBand: one port of 200 or 400 Gbit/s a
GPU, as in DGX A100 and H100."""


def gpu(text: str) -> Gpu:
    """A kind by name, and what is different here. Raises InputError for another name or key.

    >>> gpu("h100").memory == 79.2 * 2**30, gpu("h100,infiniband=12.5,share=0.5").infiniband
    (True, 12500000000.0)
    >>> gpu("h100,nvlnk=3")
    Traceback (most recent call last):
    deft.core.errors.InputError: --gpu: 'nvlnk=3' is no setting; did you mean 'nvlink'?
    """
    name, *settings = text.split(",")
    if name not in _KINDS:
        there = f"{', '.join(_KINDS)}, with memory=GiB for one like it"
        raise InputError(f"--gpu: {name!r} is not known; {closest(name, _KINDS) or f'there is {there}'}")
    values = dict(zip(_UNITS, _KINDS[name], strict=False))
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in _UNITS:
            fix = closest(key, _UNITS) or f"one is KEY=NUMBER with {', '.join(_UNITS)}"
            raise InputError(f"--gpu: {setting!r} is no setting; {fix}")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = 0.0
        if not values[key] > 0:
            raise InputError(f"--gpu: {setting!r}: {key} is a number above 0; write {key}=1.5")
    return Gpu(name, **{key: value * _UNITS[key] for key, value in values.items()})


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends in a step: weights to those that share its copy and gradients to them, and sums of
    gradients to the other copies."""

    gathers: float
    scatters: float
    sums: float


def traffic(sizes: Sizes, layout: StepLayout) -> Traffic:
    """With s ranks to a copy, r copies and k rounds: weights of layers twice a round, forward and backward, all others
    once, (s-1)/s of 2 B/P each; gradients once a round, (s-1)/s of 4 B/P; their sums once a step,
    2 (r-1)/r of 4/s B/P."""
    width, shard, copies = layout.dtype.itemsize, layout.shard, layout.replicas
    others = (shard - 1) / shard
    weights = width * (2 * sizes.layers.plain + sizes.root.plain)
    trained = SUM * sizes.whole.trained
    return Traffic(
        gathers=layout.rounds * others * weights,
        scatters=layout.rounds * others * trained,
        sums=2 * (copies - 1) / copies * trained / shard,
    )


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of a step: compute and communication, which overlap, and the update after both."""

    compute: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        return max(self.compute, self.communication) + self.update

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        found = {"compute": self.compute, "communication": self.communication, "update": self.update}
        return max(found, key=lambda each: found[each])


@dataclass(frozen=True, slots=True)
class Load:
    """What one optimizer step holds, whatever computes it.

    tokens    of all documents; `longest` of the longest one
    learnt    share of tokens that are targets
    attended  tokens of the document that a token is in, on average: sum of squares of lengths / sum of lengths
    """

    tokens: float
    longest: int
    learnt: float
    attended: float


def seconds(sizes: Sizes, layout: StepLayout, load: Load, gpu: Gpu) -> Seconds:
    """compute = FLOP of the busiest rank / (share * products), communication = bytes / link, update = UPDATE bytes of
    each trained parameter of its part / memory_rate.

    No latency of collectives is in it, and that communication overlaps with compute is an assumption.
    """
    busiest = busy(load, layout.ranks)
    flop = sizes.flop(busiest, busiest * load.learnt, busiest * load.attended, layout.mode)
    sent, inside = traffic(sizes, layout), min(layout.shard, layout.per_node)
    copy = link(gpu, layout.shard, inside)
    across = link(gpu, layout.ranks if layout.replicas > 1 else 1, max(1, layout.per_node // inside))
    return Seconds(
        compute=flop / (gpu.share * gpu.products),
        communication=(sent.gathers + sent.scatters) / copy + sent.sums / across,
        update=UPDATE * sizes.whole.trained / layout.shard / gpu.memory_rate,
    )


def link(gpu: Gpu, ranks: int, in_node: int) -> float:
    """Bytes/s of a collective of these ranks, of which `in_node` are in each node: NVLink, or across nodes the
    InfiniBand links of all of them together."""
    return LINK_SHARE * (gpu.nvlink if ranks <= in_node else min(gpu.nvlink, in_node * gpu.infiniband))


def busy(load: Load, ranks: int) -> float:
    """Tokens of the busiest rank in a step: its part of them, at least the longest row."""
    return max(load.tokens / ranks, float(load.longest))


@dataclass(frozen=True, slots=True)
class Way:
    """How a step is computed by a number of ranks, what it takes, and whether it fits."""

    layout: StepLayout
    memory: Memory
    seconds: Seconds
    fits: bool


def way(sizes: Sizes, load: Load, gpu: Gpu, layout: StepLayout, microbatch_tokens: int | None = None) -> Way:
    """The first of `ways` that fits; where none does, the last.

    layout             ranks, nodes, shard and dtype; its micro-batch and mode are chosen
    microbatch_tokens  where it is not to be halved until it fits
    """
    found = None
    most = max(load.longest, min(microbatch_tokens or hardware.GPU_TOKENS, ceil(busy(load, layout.ranks))))
    for mode, tokens in ways(most, lambda: load.longest, is_auto=microbatch_tokens is None):
        rounds = max(1, ceil(busy(load, layout.ranks) / tokens - 1e-9))
        made = replace(layout, mode=mode, tokens=tokens, targets=ceil(tokens * load.learnt), rounds=rounds)
        needed = memory(sizes, made)
        fits = needed.total <= (1 - SPARE) * gpu.memory
        found = Way(made, needed, seconds(sizes, made, load, gpu), fits)
        if fits:
            break
    assert found is not None
    return found


def best(found: Iterable[Way]) -> Way | None:
    """Of those that fit the first that is, but for NEAR, the fastest: a smaller shard keeps its traffic near, and
    latency, which counts more in larger ones, is not in the formulas. None where none fits."""
    fitting = [each for each in found if each.fits]
    limit = (1 + NEAR) * min((each.seconds.total for each in fitting), default=0.0)
    return next((each for each in fitting if each.seconds.total <= limit), None)


def ways(tokens: int, longest: Callable[[], int], is_auto: bool) -> Iterator[tuple[Checkpointing, int]]:
    """Checkpointing and tokens of a micro-batch, from least to most computed twice.

    If `is_auto`, micro-batches are halved: that costs less than computing twice until they are below LEAST_TOKENS. Only
    the last may be cut down to the longest document.

    >>> [f"{mode} {tokens}" for mode, tokens in ways(3000, lambda: 700, is_auto=True)]
    ['none 3000', 'none 1500', 'selective 3000', 'selective 1500', 'full 3000', 'full 1500', 'full 750']
    """
    for mode in CHECKPOINTING:
        size, least = tokens, LEAST_TOKENS if mode != CHECKPOINTING[-1] else 1
        yield mode, size
        while is_auto and size // 2 >= max(least, longest()):
            size //= 2
            yield mode, size


def shards(ranks: int, per_node: int) -> list[int]:
    """1, a node's ranks, all: those that divide the ranks.

    >>> shards(64, 8), shards(8, 8), shards(12, 8)
    ([1, 8, 64], [1, 8], [1, 12])
    """
    return [size for size in sorted({1, min(per_node, ranks), ranks}) if ranks % size == 0]


def least_ranks(sizes: Sizes, load: Load, gpu: Gpu, layout: StepLayout, microbatch_tokens: int | None) -> int | None:
    """The fewest GPUs that fit one copy spread over all of them, by ones within a node and by nodes beyond; None where
    1,024 nodes do not."""
    nodes = (layout.per_node * nodes for nodes in range(2, 1025))
    for ranks in (*range(1, layout.per_node + 1), *nodes):
        if way(sizes, load, gpu, replace(layout, ranks=ranks, shard=ranks), microbatch_tokens).fits:
            return ranks
    return None
