"""`deft doctor`: is this machine fit, and how fast is it. Its rates are kept for the predictions of `deft check`."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from deft import calibrate, files, hardware, manifest, rates
from deft.errors import DiskError
from deft.rates import Rates

WRITTEN_BYTES = 2**27
WIDTHS = (128, 512, 2048)
LEAST_DISK, LEAST_MEMORY = 2**31, 2**32


def run(console: Console | None = None) -> Rates:
    """Prints what it finds and keeps the rates. DiskError where the cache folder cannot be written to."""
    console = console or Console()
    device = hardware.device("auto")
    lines = [*_machine_lines(device), *_disk_lines(Path.cwd())]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    found = calibrate.measure(device, seconds=0.3)
    for line in [*_rate_lines(found), f"tokenizer {_tokenizer_speed():,.1f} MB/s of text, on one core"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    place = rates.keep(found, device)
    console.print(f"kept in {place}, for the predictions of deft check", highlight=False, soft_wrap=True, markup=False)
    for line in _troubles(device) or ["This machine is fit."]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return found


def _machine_lines(device: torch.device) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions().items())
    memory = f"{hardware.memory_bytes(device) / 2**30:.1f} GiB"
    chosen = hardware.resolve("auto", "auto", "auto")
    precision = str(chosen.dtype).removeprefix("torch.")
    return [
        f"versions  {versions}",
        f"device    {rates.machine(device)}; {memory}; precision auto is {precision}",
        f"cores     {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
    ]


def _disk_lines(folder: Path) -> list[str]:
    free = shutil.disk_usage(folder).free
    return [f"disk      {free / 2**30:,.1f} GiB free here, written and synced at {_disk_speed(folder) / 1e6:,.0f} MB/s"]


def _rate_lines(found: Rates) -> list[str]:
    lines = []
    for precision, attention in found.attention.items():
        by_width = ", ".join(f"{_product_rate(found, precision, width) / 1e9:,.0f} ({width})" for width in WIDTHS)
        lines.append(f"{precision}      matrix products {by_width} GFLOP/s by width; attention {attention / 1e9:,.0f}")
    moved, updated = found.moved / 1e9, found.updated / 1e6
    return [*lines, f"memory    {moved:,.1f} GB/s in elementwise operations; AdamW {updated:,.0f} M parameters/s"]


def _product_rate(found: Rates, precision: str, width: int) -> float:
    """FLOP/s of a product of two square matrices."""
    flop = 2.0 * width**3
    return flop / found.product_seconds(precision, flop, 3 * width**2 * rates.DTYPES[precision].itemsize)


def _disk_speed(folder: Path) -> float:
    """Bytes per second, with fsync; nothing is left behind. 0 where the folder cannot be written to."""
    data = os.urandom(WRITTEN_BYTES)
    start = time.perf_counter()
    try:
        files.try_writing(folder, data)
    except DiskError:
        return 0.0
    return len(data) / (time.perf_counter() - start)


def _tokenizer_speed() -> float:
    """Megabytes per second of a byte-level BPE of this package's own text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    start = time.perf_counter()
    tokenizer.encode(text)
    return len(text) / 1e6 / (time.perf_counter() - start)


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
