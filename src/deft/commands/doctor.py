"""`deft doctor`: is this machine fit."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console

from deft.core import files, hardware, versions
from deft.core.errors import DiskError

WRITTEN_BYTES = 2**27
LEAST_DISK, LEAST_MEMORY = 2**31, 2**32


def run() -> None:
    """Prints what it finds: the machine, its disk, and what is wrong with them."""
    console = Console()
    device = hardware.device("auto")
    fit = _troubles(device) or ["This machine is fit.", "deft check --time says how long a run takes on it."]
    for line in [*_machine_lines(device), *_disk_lines(Path.cwd()), *fit]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _machine_lines(device: torch.device) -> list[str]:
    packages = ", ".join(f"{name} {number}" for name, number in versions.installed().items())
    memory = f"{hardware.memory_bytes(device) / 2**30:.1f} GiB"
    chosen = hardware.resolve("auto", "auto", "auto")
    precision = str(chosen.dtype).removeprefix("torch.")
    return [
        f"versions  {packages}",
        f"device    {hardware.describe(device)}; {memory}; precision auto is {precision}",
        f"cores     {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
    ]


def _disk_lines(folder: Path) -> list[str]:
    free = shutil.disk_usage(folder).free
    return [f"disk      {free / 2**30:,.1f} GiB free here, written and synced at {_disk_speed(folder) / 1e6:,.0f} MB/s"]


def _disk_speed(folder: Path) -> float:
    """Bytes per second, with fsync; nothing is left behind. 0 where the folder cannot be written to."""
    data = os.urandom(WRITTEN_BYTES)
    start = time.perf_counter()
    try:
        files.try_writing(folder, data)
    except DiskError:
        return 0.0
    return len(data) / (time.perf_counter() - start)


def _troubles(device: torch.device) -> list[str]:
    """What would keep a run of any size from ending well, each with what to do."""
    found = []
    if shutil.disk_usage(Path.cwd()).free < LEAST_DISK:
        found.append("trouble: less than 2 GiB of disk is free here; name another place with output=")
    if hardware.memory_bytes(device) < LEAST_MEMORY:
        found.append("trouble: less than 4 GiB of memory; only models below about 100 M parameters will fit")
    if not os.access(Path.cwd(), os.W_OK):
        found.append("trouble: this folder cannot be written to; name another place with output=")
    return found
