"""How fast this machine multiplies and moves: measured by `deft doctor`, kept in the cache folder.

They serve predictions only. Which way something is computed is never decided by a timing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from deft import cache, files, hardware

if TYPE_CHECKING:
    from deft.training.masters import Masters

ROWS = {"cpu": (67, 4093), "mps": (261, 4093), "cuda": (517, 8189)}
WIDTH = {"cpu": 1024, "mps": 2048, "cuda": 4096}
"""Matrix products are measured on few rows and on many, with a square weight of this width. As in training, the numbers
of rows are multiples of nothing."""
ELEMENTS = {"cpu": 2**18, "mps": 2**22, "cuda": 2**23}
"""Of what elementwise operations are measured on; on CPUs pieces as large as those of a layer's activations."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BESIDE_CACHE = 2**26
MATRICES, MATRIX = 16, (1024, 768)
"""What gradients are summed and AdamW is timed on."""
ODD_ROWS, ODD_COUNTS = range(1003, 1503, 50), range(11, 61, 5)
"""Numbers of tokens and of documents that nothing else here has: products of these sizes were not seen before."""


@dataclass(frozen=True, slots=True)
class Rates:
    """machine says what they hold for. Per second:

    attention   precision -> FLOP of scaled_dot_product_attention, counting the causal half
    moved       bytes that elementwise operations bring into the cache; what they find there costs next to nothing
    exponents   elements of a softmax
    operations  of no work, one after another
    updated     parameters by AdamW
    summed      parameters whose gradients are added to those of earlier micro-batches

    Seconds, by precision:

    products    "flop" and "byte": a matrix product takes the time of its arithmetic and of what it reads and writes;
                a small one, or one of few rows, mostly the latter
    unseen      "gemm" and "batched": what a product takes more if none of its size was seen before
    together    what steps of one micro-batch tell beyond all these (calibrate.py): "parts", a factor of the sum of
                them, and "parameter", what it takes besides for each, as weights and gradients are in no cache
    """

    machine: str
    products: Mapping[str, Mapping[str, float]]
    attention: Mapping[str, float]
    moved: float
    exponents: float
    operations: float
    updated: float
    summed: float
    unseen: Mapping[str, Mapping[str, float]]
    together: Mapping[str, Mapping[str, float]]

    def product_seconds(self, precision: str, flop: float, moved: float) -> float:
        """What matrix products of so much arithmetic take, that read and write so many bytes.

        >>> Rates("", {"fp32": {"flop": 1e-9, "byte": 1e-8}}, {}, 1, 1, 1, 1, 1, {}, {}).product_seconds(
        ...     "fp32", 2e9, 1e8
        ... )
        3.0
        """
        known = self.products[precision]
        return flop * known["flop"] + moved * known["byte"]


def machine(device: torch.device) -> str:
    """What rates depend on: the device, the threads and torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu_name()
    return f"{device.type} {name}, {torch.get_num_threads()} threads, torch {version('torch')}"


def path(device: torch.device) -> Path:
    """Where they are kept."""
    return cache.root() / f"rates-{device.type}.json"


def saved(device: torch.device) -> Rates | None:
    """What was measured earlier on this very machine, or nothing."""
    try:
        found = Rates(**json.loads(path(device).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.machine == machine(device) else None


def keep(rates: Rates, device: torch.device) -> Path:
    """DiskError where the cache folder cannot be written to."""
    place = path(device)
    files.make_folder(place.parent)
    files.write_json(place, asdict(rates))
    return place


def measure(device: torch.device, seconds: float = 0.1) -> Rates:
    """Takes about ten times `seconds`, and more on slow machines: everything is done three times at least.

    Memory is kept as in training (`hardware.keep_freed_memory`), from now on: where each result is written to fresh
    pages, elementwise operations on an AMD EPYC come to a quarter of what they do there.
    """
    hardware.keep_freed_memory()
    return Rates(
        machine=machine(device),
        products={name: _products(dtype, device, seconds) for name, dtype in DTYPES.items()},
        attention={name: _attention(dtype, device, seconds) for name, dtype in DTYPES.items()},
        moved=_moved(device, seconds),
        exponents=_exponents(device, seconds),
        operations=_operations(device, seconds),
        updated=_updated(device, seconds),
        summed=_summed(device, seconds),
        unseen={name: _unseen(dtype, device) for name, dtype in DTYPES.items()},
        together={name: {"parts": 1.0, "parameter": 0.0} for name in DTYPES},
    )


def _products(dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, float]:
    few, many = (_three_layouts(rows, dtype, device, seconds / 2) for rows in ROWS[device.type])
    return _split(few, many)


@dataclass(frozen=True, slots=True)
class _Products:
    """Some products: their arithmetic, what they read and write, and the seconds that they take."""

    flop: float
    bytes: float
    seconds: float


def _split(few: _Products, many: _Products) -> dict[str, float]:
    """The seconds per FLOP and per byte by which both take their time; where there are none, of one of the two alone.

    >>> _split(_Products(2.0, 2.0, 3.0), _Products(8.0, 4.0, 8.0))
    {'flop': 0.5, 'byte': 1.0}
    >>> _split(_Products(2.0, 2.0, 1.0), _Products(8.0, 4.0, 8.0))
    {'flop': 1.0, 'byte': 0.0}
    >>> _split(_Products(2.0, 2.0, 4.0), _Products(8.0, 4.0, 8.0))
    {'flop': 0.0, 'byte': 2.0}
    """
    area = few.flop * many.bytes - few.bytes * many.flop
    per_flop = (few.seconds * many.bytes - few.bytes * many.seconds) / area
    per_byte = (few.flop * many.seconds - few.seconds * many.flop) / area
    if per_byte <= 0.0:
        return {"flop": many.seconds / many.flop, "byte": 0.0}
    if per_flop <= 0.0:
        return {"flop": 0.0, "byte": few.seconds / few.bytes}
    return {"flop": per_flop, "byte": per_byte}


def _three_layouts(rows: int, dtype: torch.dtype, device: torch.device, seconds: float) -> _Products:
    """x W^T, dy W and dy^T x together."""
    width = WIDTH[device.type]
    sets = cycle(_sets((rows, width), (rows, width), (width, width), dtype=dtype, device=device))

    def products() -> None:
        x, dy, weight = next(sets)
        x @ weight.T
        dy @ weight
        dy.T @ x

    moved = 3.0 * (2 * rows * width + width**2) * dtype.itemsize
    return _Products(6.0 * rows * width**2, moved, _seconds(products, device, seconds))


def _unseen(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    x = torch.randn(ODD_ROWS.stop, 512, device=device).to(dtype)
    many = torch.randn(ODD_COUNTS.stop, 224, 64, device=device).to(dtype)
    weight = torch.randn(512, 512, device=device).to(dtype)

    def two_products(rows: int) -> None:
        x[:rows] @ weight.T
        x[:rows].T @ x[:rows]

    def batched(count: int) -> None:
        torch.bmm(many[:count], many[:count].transpose(1, 2))

    return {
        "gemm": _longer_at_first(two_products, ODD_ROWS, device) / 2,
        "batched": _longer_at_first(batched, ODD_COUNTS, device),
    }


def _longer_at_first(run: Callable[[int], None], sizes: range, device: torch.device) -> float:
    """Seconds that the first call with a size takes more than those after it: the median of the sizes, 0 at least."""
    longer = []
    for size in sizes:
        first, *later = (_timed(partial(run, size), device) for _ in range(3))
        longer.append(first - min(later))
    return max(0.0, median(longer))


def _sets(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[list[torch.Tensor]]:
    """Tensors of these shapes again and again, BESIDE_CACHE bytes in all: as in training, no product finds its own in
    the cache."""
    size = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    return [
        [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        for _ in range(max(1, BESIDE_CACHE // size))
    ]


def _attention(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Forward and backward: 2 products and 5."""
    heads, length, size = 8, 512, 64
    query, key, value = (
        torch.randn(1, heads, length, size, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    gradient = torch.ones_like(query)

    def both() -> None:
        functional.scaled_dot_product_attention(query, key, value, is_causal=True).backward(gradient)

    return 7.0 * heads * length * length * size / _seconds(both, device, seconds)


def _moved(device: torch.device, seconds: float) -> float:
    elements = ELEMENTS[device.type]
    sets = cycle(_sets((elements,), (elements,), dtype=torch.bfloat16, device=device))

    def elementwise() -> None:
        x, gate = next(sets)
        y = x.float()
        y * y
        functional.silu(gate) * x

    moved = elements * (2 + 4 + 4 + 2 + 2 + 2)
    return moved / _seconds(elementwise, device, seconds)


def _exponents(device: torch.device, seconds: float) -> float:
    x = torch.randn(ROWS[device.type][-1] // 4, 512, device=device)
    return x.numel() / _seconds(lambda: x.softmax(-1), device, seconds)


def _operations(device: torch.device, seconds: float) -> float:
    x = torch.zeros(1, device=device)
    return 1.0 / _seconds(lambda: x + x, device, seconds / 2)


def _updated(device: torch.device, seconds: float) -> float:
    from deft.optim.adamw import AdamW
    from deft.training.masters import clip_scale

    masters, give_gradients = _masters(device)
    adamw = AdamW(masters)

    def update() -> None:
        give_gradients()
        adamw.step(1e-6, clip_scale(masters.squared_norm().sqrt(), 1.0))

    return MATRICES * math.prod(MATRIX) / _seconds(update, device, seconds)


def _summed(device: torch.device, seconds: float) -> float:
    masters, give_gradients = _masters(device)

    def add() -> None:
        give_gradients()
        masters.collect()

    return MATRICES * math.prod(MATRIX) / _seconds(add, device, seconds)


def _masters(device: torch.device) -> tuple[Masters, Callable[[], None]]:
    """The masters of some matrices, and what gives each a gradient."""
    from deft.training.masters import Masters

    weights = {str(i): torch.nn.Parameter(torch.randn(*MATRIX, device=device)) for i in range(MATRICES)}
    masters = Masters(weights.items(), torch.bfloat16)
    gradients = [torch.ones_like(weight) for weight in weights.values()]

    def give_gradients() -> None:
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient

    return masters, give_gradients


def _seconds(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median time of calls, after one that warms up: what else the machine does will slow training as well."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(_timed(run, device))
    return median(times)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
