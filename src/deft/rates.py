"""How fast this machine multiplies and moves: measured by `deft doctor`, kept in the cache folder.

They serve predictions only. Which way something is computed is never decided by a timing.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from deft import cache, files, hardware

ROWS = {"cpu": 1024, "mps": 4096, "cuda": 8192}
WIDTHS = {"cpu": (128, 256, 512, 1024), "mps": (512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}
"""Matrix products are measured on so many rows, with square weights of these widths."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BESIDE_CACHE = 2**26
ODD_ROWS, ODD_COUNTS = range(1003, 1503, 50), range(11, 61, 5)
"""Numbers of tokens and of documents that nothing else here has: products of these sizes were not seen before."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second, but the last two. machine says what they hold for.

    gemm        precision -> width -> FLOP of products in the three layouts of training
    batched     precision -> FLOP of many small products, as in attention on short documents
    attention   precision -> FLOP of scaled_dot_product_attention, counting the causal half
    moved       bytes read and written by elementwise operations on a layer's activations
    exponents   elements of a softmax
    operations  of no work, one after another
    updated     parameters by AdamW
    unseen      precision -> kind of product (gemm or batched) -> seconds that one of a size not seen before takes more
    together    precision -> the time of a whole step, relative to that of its parts by these rates (calibrate.py)
    """

    machine: str
    gemm: Mapping[str, Mapping[str, float]]
    batched: Mapping[str, float]
    attention: Mapping[str, float]
    moved: float
    exponents: float
    operations: float
    updated: float
    unseen: Mapping[str, Mapping[str, float]]
    together: Mapping[str, float]

    def product(self, precision: str, width: float) -> float:
        """FLOP/s of matrix products with weights of this width, between the widths that were measured.

        >>> rates = Rates("", {"fp32": {"256": 1e9, "1024": 3e9}}, {}, {}, 1, 1, 1, 1, {}, {})
        >>> rates.product("fp32", 100) / 1e9, rates.product("fp32", 512) / 1e9
        (1.0, 2.0)
        """
        known = sorted((math.log(int(each)), rate) for each, rate in self.gemm[precision].items())
        widths, rates = zip(*known, strict=True)
        return float(np.interp(math.log(width), widths, rates))


def machine(device: torch.device) -> str:
    """What rates depend on: the device, the threads and torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
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
        gemm={name: _gemm(dtype, device, seconds) for name, dtype in DTYPES.items()},
        batched={name: _batched(dtype, device, seconds) for name, dtype in DTYPES.items()},
        attention={name: _attention(dtype, device, seconds) for name, dtype in DTYPES.items()},
        moved=_moved(device, seconds),
        exponents=_exponents(device, seconds),
        operations=_operations(device, seconds),
        updated=_updated(device, seconds),
        unseen={name: _unseen(dtype, device) for name, dtype in DTYPES.items()},
        together={},
    )


def _gemm(dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, float]:
    widths = WIDTHS[device.type]
    return {str(width): _three_layouts(width, dtype, device, seconds / len(widths)) for width in widths}


def _three_layouts(width: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of x W^T, dy W and dy^T x together."""
    rows = ROWS[device.type]
    sets = cycle(_sets((rows, width), (rows, width), (width, width), dtype=dtype, device=device))

    def products() -> None:
        x, dy, weight = next(sets)
        x @ weight.T
        dy @ weight
        dy.T @ x

    return 6.0 * rows * width**2 / _seconds(products, device, seconds)


def _batched(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of q k^T, p v and p^T v together."""
    count, length, size = 8, 384, 64
    sets = cycle(_sets(*[(count, length, size)] * 2, (count, length, length), dtype=dtype, device=device))

    def products() -> None:
        query, key, probs = next(sets)
        query @ key.transpose(1, 2)
        probs @ key
        probs.transpose(1, 2) @ key

    return 6.0 * count * length**2 * size / _seconds(products, device, seconds)


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
    x = torch.randn(ROWS[device.type], 1024, device=device).to(torch.bfloat16)
    gate = torch.randn_like(x)

    def elementwise() -> None:
        y = x.float()
        y * y
        functional.silu(gate) * x

    elements = x.numel()
    moved = elements * ((2 + 4) + (4 + 4 + 4) + (2 + 2) + (2 + 2 + 2))
    return moved / _seconds(elementwise, device, seconds)


def _exponents(device: torch.device, seconds: float) -> float:
    x = torch.randn(ROWS[device.type], 512, device=device)
    return x.numel() / _seconds(lambda: x.softmax(-1), device, seconds)


def _operations(device: torch.device, seconds: float) -> float:
    x = torch.zeros(1, device=device)
    return 1.0 / _seconds(lambda: x + x, device, seconds / 2)


def _updated(device: torch.device, seconds: float) -> float:
    from deft.optim.adamw import AdamW, clip_scale

    weight = torch.nn.Parameter(torch.randn(4096, 4096, device=device))
    adamw = AdamW([("weight", weight)], dtype=torch.bfloat16, lr=1e-6)

    def update() -> None:
        weight.grad = torch.ones_like(weight)
        adamw.step(1.0, clip_scale(adamw.norm(), 1.0))

    return weight.numel() / _seconds(update, device, seconds)


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
