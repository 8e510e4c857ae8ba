"""Every `auto` that depends on the machine, resolved once from the configuration and the hardware, never by timing."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from deft.errors import InputError, MemoryShort, UserCodeError

CPU_TOKENS, GPU_TOKENS = 4096, 16384
"""A micro-batch's tokens where nothing is said."""

TRIED = 4096
"""Sizes of products that are known to have been tried (`few_sizes`)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how a run computes. dtype is that of the compute; master weights are fp32 in effect."""

    device: torch.device
    dtype: torch.dtype
    microbatch_tokens: int

    @property
    def dtype_name(self) -> str:
        """As a model's config.json writes it."""
        return str(self.dtype).removeprefix("torch.")


def resolve(name: str, precision: str, microbatch_tokens: int | str) -> Machine:
    """Settings, `auto` among them -> the machine. bf16 is chosen where the device multiplies in it, fp32 elsewhere.

    Raises InputError for a device that is not there.
    """
    chosen = device(name)
    if precision == "auto":
        precision = "bf16" if has_bf16(chosen) else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if isinstance(microbatch_tokens, str):
        microbatch_tokens = GPU_TOKENS if chosen.type == "cuda" else CPU_TOKENS
    return Machine(chosen, dtype, microbatch_tokens)


def kept_kernels(sizes: int, parameters: int) -> int:
    """So many kernels of products are worth their memory: 256, and 64 of models of 256 M parameters or more; more where
    a micro-batch has so many `sizes` that one layer's would be gone when the next one's turn comes.

    Each takes 0.6 to 0.8 MiB and 2 to 17 ms to make (Intel Xeon with AMX, torch 2.13). 28 steps of a 40 M model need
    about 180, with `few_sizes`. Steps of a 0.5 B model take seconds, and where a kernel lies, a tensor of the head's
    size has no room any more: after ten steps the process has 15.2 GiB with 256 kernels and 10.4 with 64, steps that
    are the faster by 7 %.

    >>> kept_kernels(40, 40_000_000), kept_kernels(40, 500_000_000), kept_kernels(400, 500_000_000)
    (256, 64, 600)
    """
    return max(256 if parameters < 2**28 else 64, sizes * 3 // 2)


def bound_kernel_caches(kernels: int) -> None:
    """On CPUs torch and oneDNN each keep the kernels of the last so many sizes of products, not of the last 1,024.

    It says nothing to a process that has multiplied in bf16 before.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(kernels))


def keeps_kernels(tensor: Tensor) -> bool:
    """Whether each size of products of such tensors has a kernel that stays: on CPUs in 16 bits."""
    return tensor.device.type == "cpu" and tensor.dtype.itemsize == 2


def few_sizes(rows: int) -> int:
    """So many rows or a few more, such that the products of all micro-batches are of few sizes.

    Each new size costs 2.7 ms, and its kernel stays, in the midst of tensors that come and go: memory that is free
    falls to pieces. Products that are tried out before a micro-batch have their kernels in one place. Without both, the
    first eight steps of a 40 M model take 1.40 s on average, the last 14 of 28 take 1.21 s, and the process ends with
    2,890 MiB; with both 1.33 s, 1.05 s and 1,560 MiB (Intel Xeon with AMX, torch 2.13; benchmarks/time_split.py 40m
    --workload gsm8k --tokens 3100 --steps 28 --rate-once).

    >>> few_sizes(0), few_sizes(30), few_sizes(1000), few_sizes(2500)
    (0, 32, 1008, 2560)
    """
    step = 16 if rows <= 1024 else 64
    return -(-rows // step) * step


def keep_freed_memory() -> None:
    """Memory of tensors that are gone stays with the process for those to come, where the C library is GNU's.

    It would give all of it back to the system after a step, and get it again page by page: a training step of a 40 M
    model takes 2.27 s with this and 2.43 s without (two cores of an AMD EPYC, torch 2.13). Pieces of up to
    1 GiB are kept, for gradients of large vocabularies: a step of 512 tokens of a 0.5 B model takes 4.6 s, with a limit
    of 64 MiB 5.4 s, and no model tried takes more memory for it. To be called when the weights are loaded, which takes
    large pieces for a moment.
    """
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
        mallopt(trim_threshold, -1)
        if not mallopt(mmap_threshold, 2**30):  # glibc before 2.35 takes 32 MiB at most, and would now stay at 128 KiB
            mallopt(mmap_threshold, 2**25)


def has_bf16(chosen: torch.device) -> bool:
    """Whether a device has instructions for products in bf16.

    With AVX-512 BF16 (AMD EPYC, torch 2.13) a training step takes 0.52 of its time in fp32 for a model of 40 M
    parameters, 0.57 for 15 M and 0.73 for 1 M. Elsewhere bf16 is emulated.
    """
    if chosen.type == "cuda":
        return torch.cuda.is_bf16_supported()
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if chosen.type == "cpu" else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def device(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA, then MPS, then the CPU. InputError where it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        named = torch.device(name)
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} is not on this machine; auto, cpu, cuda or mps") from error
    return named


def cpu_name() -> str:
    """The processor's model where the system tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """What speed and memory depend on: the device, the threads and torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{device.type} {name}, {torch.get_num_threads()} threads, torch {version('torch')}"


def sent(tensor: Tensor, to: torch.device) -> Tensor:
    """A tensor in host memory, on a device; on CUDA nobody waits for the copy, nor for what was queued before it."""
    is_cuda = to.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    return tensor.pin_memory().to(to, non_blocking=True) if is_cuda else tensor.to(to)


@contextmanager
def within_memory(what: Callable[[], str]) -> Iterator[None]:
    """Raises MemoryShort where the body runs out of memory, the device's or the machine's, in a user's function too.

    what  says what does not fit, and what would
    """
    try:
        yield
    except (MemoryError, RuntimeError, UserCodeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShort(f"out of memory: {what()}") from error


def memory_bytes(device: torch.device) -> int:
    """The memory that is built in, as far as this process may use it; free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        return min(built_in, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return built_in


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python found the device's or the machine's memory full; on the CPU torch has no type for it."""
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        return is_out_of_memory(error.__cause__)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
