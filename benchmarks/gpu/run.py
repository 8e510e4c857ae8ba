"""The GPU suite: tests marked gpu, matrix products, deft with and without compiled layers, whichever peers are there.

    python benchmarks/gpu/run.py --piece all          everything, a piece after the other, each in ten minutes
    python benchmarks/gpu/run.py --piece 0.5b:generated 8b:uniform
    python benchmarks/gpu/run.py --dry-run            every piece in miniature on the CPU: does the suite itself run?

Needs torch, transformers and numpy; pytest, accelerate and trl where they are. Nothing is read from the network or from
outside the repository: models are random, rows are generated. Each arm is a fresh process; arms take turns until the
piece's time is over. The rate of matrix products is measured before and after each turn, with the model's own shapes.
Writes benchmarks/results/gpu.json, a piece at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import machine, workloads
from common.shapes import SHAPES, flops
from common.stats import quartiles

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PIECE_SECONDS = 570
ARMS = ("deft", "deft_compiled", "hf_default", "hf_bf16", "trl_default", "trl_packed")


@dataclass(frozen=True)
class Piece:
    """A model on a workload; the numbers of micro-batch tokens that deft tries."""

    model: str
    workload: str
    examples: int
    tokens: tuple[int, ...]
    steps: int = 5
    arms: tuple[str, ...] = ARMS

    @property
    def name(self) -> str:
        return f"{self.model}:{self.workload}"


PIECES = (
    Piece("0.5b", "generated", 256, (8192, 16_384, 32_768, 65_536)),
    Piece("0.5b", "uniform", 64, (8192, 16_384, 32_768, 65_536)),
    Piece("3b", "generated", 64, (8192, 16_384)),
    Piece("3b", "uniform", 16, (8192, 16_384)),
    Piece("8b", "generated", 16, (4096, 8192)),
    Piece("8b", "uniform", 8, (4096, 8192)),
)
DRY = tuple(replace(piece, model="tiny", examples=4, tokens=(2048, 4096), steps=1) for piece in PIECES[:2])


def run_piece(piece: Piece, device: str, seconds: float) -> dict[str, Any]:
    """Turns of all arms until the time is over, or each has had three; an arm that fails has no second turn."""
    deadline, shape = time.perf_counter() + seconds, SHAPES[piece.model]
    rows = workloads.rows(piece.workload, 1024, shape.vocabulary, None)
    needed = flops(shape, [row.size for row in rows]) / sum(len(row.ids) for row in rows)
    rates = [machine.gemm_rate(shape, torch.bfloat16, device)]
    turns: dict[str, list[dict[str, Any]]] = {}
    failures: dict[str, str] = {arm: why for arm in piece.arms if (why := absent(arm))}
    longest: dict[str, float] = {}
    for turn in range(3 if device == "cuda" else 1):
        for arm in piece.arms if turn % 2 == 0 else piece.arms[::-1]:
            left = deadline - time.perf_counter()
            if arm in failures or left < longest.get(arm, 60.0):
                continue
            began = time.perf_counter()
            try:
                found = best(run_arm(piece, arm, device, left))
            except RuntimeError as error:
                failures[arm] = str(error)
                continue
            longest[arm] = time.perf_counter() - began
            rates.append(machine.gemm_rate(shape, torch.bfloat16, device))
            rate = (rates[-2] + rates[-1]) / 2
            turns.setdefault(arm, []).append({**found, "gemm_share": found["tokens_per_second"] * needed / rate})
            print(line(piece.name, arm, turns[arm][-1], rate), flush=True)
    for arm in piece.arms:
        if arm not in turns and arm not in failures:
            failures[arm] = "no time was left"
    for arm, why in failures.items():
        print(f"{piece.name:16} {arm:14} {why}", flush=True)
    return {
        "piece": asdict(piece),
        "model": shape.described(),
        "workload": workloads.ABOUT[piece.workload],
        "gemm_tflops": [round(rate / 1e12, 1) for rate in rates],
        "arms": {arm: summary(found) for arm, found in turns.items()},
        "failures": failures,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": machine.versions("deft-sft", "torch", "transformers", "accelerate", "trl", "triton"),
        "date": date.today().isoformat(),
    }


def absent(arm: str) -> str:
    """Which package an arm lacks here, if it does."""
    needs = {"hf": ("accelerate",), "trl": ("trl", "accelerate", "datasets")}.get(arm.partition("_")[0], ())
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else ""


def run_arm(piece: Piece, arm: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """RuntimeError with the end of what it said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(HERE / "side.py"), arm, str(out), "--device", device, "--model", piece.model]
        command += ["--workload", piece.workload, "--examples", str(piece.examples), "--steps", str(piece.steps)]
        command += ["--began", repr(time.time())]
        command += ["--tokens", *map(str, piece.tokens)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError("the piece's time was over") from None
        if done.returncode:
            said = [text for text in (done.stdout + done.stderr).splitlines() if text.strip()]
            raise RuntimeError(f"ended with {done.returncode}: {said[-1] if said else 'no word'}")
        return json.loads(out.read_text(encoding="utf-8"))


def best(tries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of an arm's tries, in numbers, with the speeds of the others."""
    speeds = {}
    for each in tries:
        seconds = sum(step["seconds"] for step in each["steps"])
        if seconds:
            speeds[each.get("tokens", 0)] = sum(step["tokens"] for step in each["steps"]) / seconds, each
    if not speeds:
        raise RuntimeError(tries[0].get("why", "no step was timed"))
    tokens, (speed, chosen) = max(speeds.items(), key=lambda item: item[1][0])
    targets = sum(step["target_tokens"] for step in chosen["steps"])
    return {
        "tokens_per_second": speed,
        "targets_per_second": targets / sum(step["seconds"] for step in chosen["steps"]),
        "peak_bytes": chosen["peak_bytes"],
        "first_step_seconds": chosen["first_step_seconds"],
        "microbatch_tokens": tokens,
        "tokens_per_second_by_microbatch": {str(size): round(each[0], 1) for size, each in speeds.items()},
    }


def summary(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens_per_second", "targets_per_second", "gemm_share", "peak_bytes", "first_step_seconds")
    numbers = {name: [turn[name] for turn in turns] for name in names}
    spread = {name: {"median": median(each), "quartiles": quartiles(each)} for name, each in numbers.items()}
    return {"turns": len(turns), **spread, "details": list(turns)}


def line(piece: str, arm: str, found: dict[str, Any], rate: float) -> str:
    return (
        f"{piece:16} {arm:14} {found['tokens_per_second']:9,.0f} real {found['targets_per_second']:9,.0f} target tok/s"
        f"  {found['gemm_share']:5.1%} of {rate / 1e12:.3g} TFLOP/s  peak {found['peak_bytes'] / 2**30:.1f} GiB"
        f"  first step {found['first_step_seconds']:.0f} s"
    )


def run_tests() -> int:
    if importlib.util.find_spec("pytest") is None:
        print("tests            pytest is not installed")
        return 0
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    code = subprocess.run(command, cwd=ROOT, env=environment, timeout=PIECE_SECONDS, check=False).returncode
    return 0 if code == 5 else code  # 5: no test is marked so


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ("all", "tests", *(piece.name for piece in PIECES))
    parser.add_argument("--piece", nargs="+", choices=names, default=["all"])
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU; nothing is written")
    parser.add_argument("--seconds", type=float, default=PIECE_SECONDS, help="of a piece, at most")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --dry-run runs the suite in miniature")
    device = "cpu" if options.dry_run else "cuda"
    is_all = "all" in options.piece
    code = run_tests() if not options.dry_run and (is_all or "tests" in options.piece) else 0
    for piece in DRY if options.dry_run else PIECES:
        if not (is_all or piece.name in options.piece):
            continue
        found = run_piece(piece, device, options.seconds)
        code = code or int("deft" in found["failures"])
        if not options.dry_run:
            cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            RESULTS.write_text(json.dumps({**cells, piece.name: found}, indent=1) + "\n", encoding="utf-8")
    print("adapters: left out, deft has none yet" if not has_adapters() else "adapters: not in this suite yet")
    return code


def has_adapters() -> bool:
    return any((ROOT / "src" / "deft" / "model").glob("adapt*.py"))


if __name__ == "__main__":
    sys.exit(main())
