"""Peak memory of an optimizer step: deft and TRL's defaults, and both again with the vocabulary doubled.

    DEFT_PEERS_PYTHON=.../python python benchmarks/cpu/memory.py [--model 40m] [--threads 2]

8 rows, and for deft 32 as well. Bytes are above those that a process has after its imports. "beside the state": above
weights, gradients and what the optimizer keeps, which grow with the vocabulary in any implementation. "per added
parameter": how much the doubled vocabulary adds to the peak. It is not the same for 8 and 32 rows: logits of a block
grow up to 128 MiB (`training/chunked.py`), and bf16 has fp32 sums of gradients (4 bytes) where a step is more than one
micro-batch. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exchange
from common import machine, workloads
from common.shapes import SHAPES, Shape
from run import CORPUS, DEFT_ARMS, ROOT, SETTINGS, command, peers_versions, start

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
ROWS, MORE_ROWS = 8, 32
STATE_BYTES = {"deft_bf16": 2 + 2 + 4 + 4 + 2, "deft_fp32": 4 + 4 + 4 + 4, "trl_default": 4 + 4 + 4 + 4}
"""Per parameter: weight, low bits, moments, gradient."""


def peak(arm: str, shape: Shape, count: int, folder: Path, peers: str | None, threads: int) -> int:
    """Bytes of two optimizer steps of the same `count` rows each."""
    name = "gsm8k" if workloads.is_there("gsm8k", CORPUS) else "generated"
    rows = workloads.rows(name, count, SHAPES["40m"].vocabulary, CORPUS) * 2
    settings = {**SETTINGS, "steps": 2, "examples_per_step": count, "threads": threads}
    exchange.write(folder, shape, rows, settings)
    out = folder / f"{arm}-{count}"
    out.mkdir()
    steps = out / ("run/metrics.jsonl" if arm in DEFT_ARMS else "steps.jsonl")
    start(command(arm, folder, out, peers), steps, out / "log", threads)
    memory = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    return memory["peak_bytes"] - memory["baseline_bytes"]


def beside_state(arm: str, size: int, shape: Shape) -> int:
    return size - STATE_BYTES[arm] * shape.parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="40m", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", default=os.environ.get("DEFT_PEERS_PYTHON"), help="$DEFT_PEERS_PYTHON")
    options = parser.parse_args()
    machine.pin(options.threads)
    once = SHAPES[options.model]
    twice = replace(once, vocabulary=2 * once.vocabulary)
    cells = [(arm, ROWS) for arm in STATE_BYTES if arm in DEFT_ARMS or options.peers_python]
    cells += [(arm, MORE_ROWS) for arm in STATE_BYTES if arm in DEFT_ARMS]
    peaks: dict[tuple[str, int, int], int] = {}
    for shape in (once, twice):
        with tempfile.TemporaryDirectory(prefix="deft-memory-") as folder:
            for arm, count in cells:
                size = peak(arm, shape, count, Path(folder), options.peers_python, options.threads)
                peaks[arm, count, shape.vocabulary] = size
                print(
                    f"{arm:12} {count:3} rows, vocabulary {shape.vocabulary:7,}  peak {size / 2**20:7,.0f} MiB, "
                    f"{beside_state(arm, size, shape) / 2**20:7,.0f} beside the state",
                    flush=True,
                )
    found = {}
    for arm, count in cells:
        sizes = [peaks[arm, count, shape.vocabulary] for shape in (once, twice)]
        found[f"{arm} {count} rows"] = {
            "peak_mib": [size / 2**20 for size in sizes],
            "beside_state_mib": [
                beside_state(arm, size, shape) / 2**20 for size, shape in zip(sizes, (once, twice), strict=True)
            ],
            "bytes_per_added_parameter": (sizes[1] - sizes[0]) / (twice.parameters - once.parameters),
        }
        print(
            f"{arm:12} {count:3} rows  {found[f'{arm} {count} rows']['bytes_per_added_parameter']:.1f} bytes per added "
            f"parameter, {STATE_BYTES[arm]} of them state"
        )
    if ("trl_default", ROWS, once.vocabulary) in peaks:
        for arm in DEFT_ARMS:
            if arm in STATE_BYTES:
                ratio = peaks[arm, ROWS, once.vocabulary] / peaks["trl_default", ROWS, once.vocabulary]
                print(f"{arm}: {ratio:.2f} of TRL's default (goal 0.35)")
    report = {
        "model": once.described(),
        "vocabularies": [once.vocabulary, twice.vocabulary],
        "arms": found,
        "machine": machine.described(options.threads),
    }
    report["versions"] = {"deft": machine.versions("deft-sft", "torch"), "peers": peers_versions(options.peers_python)}
    RESULTS.write_text(json.dumps({**report, "date": date.today().isoformat()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
