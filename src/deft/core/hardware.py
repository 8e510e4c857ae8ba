"""The machine: device, dtype, memory, and what products and copies on it ask for. Nothing is decided by timing."""

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

from deft.core.errors import InputError, MemoryShort, UserCodeError

CPU_TOKENS, GPU_TOKENS = 4096, 16384
"""A micro-batch's tokens where nothing is said."""

LINEAR_PRODUCTS = 48
"""At most about: sizes of products in linear layers and head of one micro-batch, forward and backward."""


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


def round_up_rows(rows: int) -> int:
    """The next number of rows that products are made with: a multiple of 16, above 1,024 of 64.

    On CPUs oneDNN makes and keeps one kernel for each size of product in bf16; rounding keeps the sizes few.

    >>> round_up_rows(0), round_up_rows(30), round_up_rows(1000), round_up_rows(2500)
    (0, 32, 1008, 2560)
    """
    step = 16 if rows <= 1024 else 64
    return -(-rows // step) * step


def settle_process(parameters: int, products: int) -> None:
    """Settings of the whole process, which stay after the run: for the command line alone.

    To be called when the weights are loaded, which takes large pieces of memory for a moment, and before the first
    product in bf16, which fixes the sizes of the caches of kernels: one a size, for torch and for oneDNN, unless the
    user sets them. With fewer than a micro-batch uses, each layer makes them again; with many, the memory of a large
    model's process is so fragmented that it grows by half.

    parameters  of the model
    products    how many sizes of matrix products the attention of one micro-batch has
    """
    kernels = max(256 if parameters < 2**28 else 64, (LINEAR_PRODUCTS + products) * 3 // 2)
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(kernels))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Freed memory of up to 1 GiB a piece stays with the process, where the C library is GNU's.

    glibc would return it to the system after each step, and get it again page by page.
    """
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
        mallopt(trim_threshold, -1)
        if not mallopt(mmap_threshold, 2**30):  # glibc before 2.35 takes 32 MiB at most, and would now stay at 128 KiB
            mallopt(mmap_threshold, 2**25)


def has_bf16(chosen: torch.device) -> bool:
    """Whether a device has instructions for products in bf16.

    Elsewhere bf16 is emulated.
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


def computing(device: torch.device) -> dict[str, str]:
    """What the last bits of sums depend on beside versions: the order in which they are taken.

    >>> sorted(computing(torch.device("cpu")))
    ['processor', 'threads']
    """
    if device.type != "cpu":
        return {"processor": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    return {"processor": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory, on a device; on CUDA the copy is asynchronous, from pinned memory."""
    is_cuda = device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    return tensor.pin_memory().to(device, non_blocking=True) if is_cuda else tensor.to(device)


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
    """The memory that is built in, free or not, that this process may use; ranks on CPUs of one machine share it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return found // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python found the device's or the machine's memory full; on the CPU torch has no type for it."""
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        return is_out_of_memory(error.__cause__)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
