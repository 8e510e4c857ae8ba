"""What a benchmark ran on, and how fast its matrix products are there."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.shapes import Shape

PROBE_ROWS = 2048
PROBE_SECONDS = 0.12
"""Each product is repeated for so long; the best half of its times counts."""


def described(threads: int) -> dict[str, Any]:
    """The processor and its memory, without names of hosts or paths."""
    return {
        "cpu": _cpu_name(),
        "cores_of_machine": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.system(),
        "amx": "amx_bf16" in _flags(),
        "bf16_instructions": _flags() & {"avx512_bf16", "amx_bf16", "bf16"} != set(),
    }


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_name() -> str:
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _flags() -> set[str]:
    lines = [line for line in _cpuinfo() if line.startswith(("flags", "Features"))]
    return set(lines[0].partition(":")[2].split()) if lines else set()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def pin(threads: int) -> list[int]:
    """Keeps this process and all it starts to the first `threads` cores that it may use; which those are."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return cores


def peak_bytes() -> int:
    """The most resident memory of this process so far."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """The resident memory of this process now."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def gemm_rate(shape: Shape, dtype: torch.dtype, device: str = "cpu", rows: int = PROBE_ROWS) -> float:
    """FLOP/s of the products that training this model is made of, each weighted by its part.

    The shapes of one layer and of the head (a quarter of the rows at a time), in the three layouts: x W^T, dy W,
    dy^T x.
    """
    width, kv_width = shape.heads * shape.per_head, shape.kv_heads * shape.per_head
    layer = {
        (width, shape.hidden): 1,
        (kv_width, shape.hidden): 2,
        (shape.hidden, width): 1,
        (shape.mlp, shape.hidden): 2,
        (shape.hidden, shape.mlp): 1,
    }
    work = seconds = 0.0
    for (out, into), count in layer.items():
        spent = sum(_seconds(rows, out, into, dtype, device))
        work += 6.0 * rows * out * into * count * shape.layers
        seconds += spent * count * shape.layers
    head_rows = rows // 4
    work += 6.0 * head_rows * shape.head * (rows / head_rows)
    seconds += sum(_seconds(head_rows, shape.vocabulary, shape.hidden, dtype, device)) * (rows / head_rows)
    return work / seconds


def _seconds(rows: int, out: int, into: int, dtype: torch.dtype, device: str) -> list[float]:
    """Seconds of one product in each of the three layouts."""
    x = torch.randn(rows, into, device=device).to(dtype)
    weight = torch.randn(out, into, device=device).to(dtype)
    dy = torch.randn(rows, out, device=device).to(dtype)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    return [
        _timed(lambda: torch.mm(x, weight.T, out=y), device),
        _timed(lambda: torch.mm(dy, weight, out=dx), device),
        _timed(lambda: torch.mm(dy.T, x, out=dw), device),
    ]


def _timed(product: Any, device: str) -> float:
    product()
    times: list[float] = []
    while sum(times) < PROBE_SECONDS or len(times) < 3:
        _wait(device)
        start = time.perf_counter()
        product()
        _wait(device)
        times.append(time.perf_counter() - start)
    best = sorted(times)[: max(1, len(times) // 2)]
    return sum(best) / len(best)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
