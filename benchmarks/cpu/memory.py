"""Peak memory of one optimizer step of 8 rows: deft, TRL's defaults, and both again with the vocabulary doubled.

    DEFT_PEERS_PYTHON=.../python python benchmarks/cpu/memory.py [--model 40m] [--threads 2]

Bytes are above those that a process has after its imports. "beside the state": above weights, gradients and what the
optimizer keeps, which grow with the vocabulary in any implementation. Writes benchmarks/results/memory.json.
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
ROWS = 8
STATE_BYTES = {"deft_bf16": 2 + 2 + 4 + 4 + 2, "deft_fp32": 4 + 4 + 4 + 4, "trl_default": 4 + 4 + 4 + 4}
"""Per parameter: weight, low bits, moments, gradient."""


def peak(arm: str, shape: Shape, folder: Path, peers: str | None, threads: int) -> int:
    """Bytes of two optimizer steps of the same rows each."""
    name = "gsm8k" if workloads.is_there("gsm8k", CORPUS) else "generated"
    rows = workloads.rows(name, ROWS, SHAPES["40m"].vocabulary, CORPUS) * 2
    settings = {**SETTINGS, "steps": 2, "examples_per_step": ROWS, "threads": threads}
    exchange.write(folder, shape, rows, settings)
    out = folder / arm
    out.mkdir()
    steps = out / ("run/metrics.jsonl" if arm in DEFT_ARMS else "steps.jsonl")
    start(command(arm, folder, out, peers), steps, out / "log", threads)
    memory = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    return memory["peak_bytes"] - memory["baseline_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="40m", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", default=os.environ.get("DEFT_PEERS_PYTHON"), help="$DEFT_PEERS_PYTHON")
    options = parser.parse_args()
    machine.pin(options.threads)
    once = SHAPES[options.model]
    found: dict[str, dict[str, float]] = {}
    for shape in (once, replace(once, vocabulary=2 * once.vocabulary)):
        with tempfile.TemporaryDirectory(prefix="deft-memory-") as folder:
            for arm in STATE_BYTES:
                if arm in DEFT_ARMS or options.peers_python:
                    size = peak(arm, shape, Path(folder), options.peers_python, options.threads)
                    beside = size - STATE_BYTES[arm] * shape.parameters
                    found.setdefault(arm, {})[f"peak_mib_{shape.vocabulary}"] = size / 2**20
                    found[arm][f"beside_state_mib_{shape.vocabulary}"] = beside / 2**20
                    print(
                        f"{arm:12} vocabulary {shape.vocabulary:7,}  peak {size / 2**20:7,.0f} MiB, "
                        f"{beside / 2**20:7,.0f} beside the state",
                        flush=True,
                    )
    if "trl_default" in found:
        name = f"peak_mib_{once.vocabulary}"
        for arm in ("deft_bf16", "deft_fp32"):
            print(f"{arm}: {found[arm][name] / found['trl_default'][name]:.2f} of TRL's default (goal 0.35)")
    report = {"model": once.described(), "rows": ROWS, "arms": found, "machine": machine.described(options.threads)}
    report["versions"] = {"deft": machine.versions("deft-sft", "torch"), "peers": peers_versions(options.peers_python)}
    RESULTS.write_text(json.dumps({**report, "date": date.today().isoformat()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
