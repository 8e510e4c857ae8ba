"""deft and its peers side by side on this machine's cores: tokens per second, memory, time to the first step.

    DEFT_PEERS_PYTHON=.../python python benchmarks/cpu/run.py [--quick] [--only 40m:gsm8k] [--threads 2] [--blocks 5]

Each arm is a fresh process on the same cores, and trains the same weights on the same rows: the same set of sequences
in each optimizer step as far as the peer can (TRL's packing and grouping choose their own), the same AdamW, clip and
loss, sum of cross-entropy over sum of targets. Arms take turns, forwards and backwards; before and after each turn the
rate of this machine's matrix products is measured, and a turn in which that drifts is thrown away and done again.

First the gate: loss and gradients of one step. In fp32 they must be those of plain Hugging Face on padded rows within
1e-5; in bf16 no further from the fp64 ones than Hugging Face's own bf16. An arm that fails is void.

What is printed is written to benchmarks/results/cpu.json and, as a table, between the marks in README.md; another
machine's results go beside it (--results benchmarks/results/cpu-NAME.json), and the README has a table of each.
Without $DEFT_PEERS_PYTHON (an environment with torch, transformers and trl==1.16.0) only deft runs.
"""

from __future__ import annotations

import argparse
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

import exchange
import table
import torch
from common import machine, workloads
from common.shapes import SHAPES, Shape, flops
from common.stats import drift, paired_ratio, quartiles
from common.workloads import Row
from gate import Gate, judge

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"

DEFT_ARMS = {"deft": "auto", "deft_bf16": "bf16", "deft_fp32": "fp32"}
PEER_ARMS = ("trl_default", "trl_grouped", "trl_packed", "hf_padded", "loop_packed_fp32")
BF16_ARMS = ("trl_default", "trl_grouped", "trl_packed")
"""Peers that compute in bf16 (fp32 weights under autocast, as TRL does it)."""


@dataclass(frozen=True)
class Cell:
    """A model on a workload: what each arm is asked to do."""

    model: str
    workload: str
    examples_per_step: int = 16
    warmup: int = 2
    steps: int = 3
    blocks: int = 5
    arms: tuple[str, ...] = (*DEFT_ARMS, *PEER_ARMS)

    @property
    def name(self) -> str:
        return f"{self.model}:{self.workload}"


SHORT = ("deft", "trl_default", "trl_packed")
CELLS = (
    # Rows fill 58 % of the batches that these three steps would be padded to; of all of GSM8K 56 %.
    Cell("40m", "gsm8k", warmup=4),
    Cell("40m", "uniform", examples_per_step=8, warmup=1, steps=1),
    Cell("40m", "experts"),
    Cell("40m", "generated"),
    Cell("15m", "gsm8k"),
    Cell("15m", "uniform", examples_per_step=8, warmup=1, steps=1),
    Cell("135m", "gsm8k", warmup=1, steps=2, arms=("deft", *PEER_ARMS)),
    Cell("135m", "uniform", examples_per_step=8, warmup=1, steps=1, arms=("deft", *PEER_ARMS)),
    Cell("0.5b", "gsm8k", examples_per_step=8, warmup=1, steps=1, blocks=2, arms=SHORT),
)
QUICK = (
    Cell("15m", "generated", examples_per_step=8, warmup=1, steps=1, blocks=1, arms=SHORT),
    Cell("15m", "uniform", examples_per_step=8, warmup=1, steps=1, blocks=1, arms=SHORT),
)
SETTINGS = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "clip": 1.0, "max_length": 1024, "deft": {}}


@dataclass(frozen=True)
class Turn:
    """One arm in one block. Numbers are over the steps after the warm-up; bytes above those after the imports.

    gemm_flops  the machine's FLOP/s of products, the mean of before and after
    gemm_share  what the definition of these steps needs, of that
    """

    arm: str
    block: int
    tokens_per_second: float
    targets_per_second: float
    gemm_flops: float
    gemm_share: float
    peak_bytes: int
    first_step_seconds: float
    step_seconds: tuple[float, ...]


SUMMED_UP = ("tokens_per_second", "targets_per_second", "gemm_flops", "gemm_share", "first_step_seconds", "peak_bytes")
"""Of each arm's turns the median and the quartiles."""


@dataclass(frozen=True)
class Probe:
    """FLOP/s of the model's own matrix products."""

    bf16: float
    fp32: float


class Failed(Exception):
    """An arm's process ended with an error; the text is the end of what it said."""


# --- one process -----------------------------------------------------------------------------------------------------


def start(command: Sequence[str], steps_file: Path, log: Path, threads: int) -> float:
    """Runs a command to its end; seconds from its start to the first line of `steps_file`. Raises Failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": python_path()}
    began, first = time.perf_counter(), float("nan")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if first != first and steps_file.is_file() and steps_file.stat().st_size:
                first = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise Failed(f"ended with {process.returncode}: {lines[-1] if lines else 'no word'}")
    return first


def python_path() -> str:
    return os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def command(arm: str, folder: Path, out: Path, peers: str | None) -> list[str]:
    if arm in DEFT_ARMS:
        return [sys.executable, str(HERE / "deft_side.py"), str(folder), DEFT_ARMS[arm], str(out)]
    assert peers is not None
    return [peers, str(HERE / "peer_side.py"), str(folder), arm, str(out)]


def probe(shape: Shape) -> Probe:
    return Probe(machine.gemm_rate(shape, torch.bfloat16), machine.gemm_rate(shape, torch.float32))


# --- a cell ----------------------------------------------------------------------------------------------------------


def measure(cell: Cell, arm: str, block: int, folder: Path, rows: Sequence[Row], options: Any) -> Turn:
    """One arm's turn; what the rate of products tells is filled in when that is known."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary)
        steps_file = out / ("run/metrics.jsonl" if arm in DEFT_ARMS else "steps.jsonl")
        first = start(command(arm, folder, out, options.peers_python), steps_file, out / "log", options.threads)
        steps = [json.loads(line) for line in steps_file.read_text(encoding="utf-8").splitlines()]
        memory = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    timed = steps[cell.warmup :]
    seconds = sum(step["seconds"] for step in timed)
    tokens, targets = (sum(step[name] for step in timed) for name in ("tokens", "target_tokens"))
    if arm in DEFT_ARMS:
        _check_rows(cell, rows, steps)
    return Turn(
        arm=arm,
        block=block,
        tokens_per_second=tokens / seconds,
        targets_per_second=targets / seconds,
        gemm_flops=float("nan"),
        gemm_share=float("nan"),
        peak_bytes=memory["peak_bytes"] - memory["baseline_bytes"],
        first_step_seconds=first,
        step_seconds=tuple(step["seconds"] for step in timed),
    )


def _check_rows(cell: Cell, rows: Sequence[Row], steps: Sequence[dict[str, Any]]) -> None:
    """deft must have trained on exactly the rows that its peers got, step by step."""
    size = cell.examples_per_step
    for index, step in enumerate(steps):
        members = rows[index * size : (index + 1) * size]
        expected = sum(len(row.ids) for row in members), sum(len(row.learnt) for row in members)
        if (step["tokens"], step["target_tokens"]) != expected:
            raise Failed(f"step {index + 1} has {step['tokens']} tokens, its rows {expected[0]}")


@dataclass
class Clock:
    """The rates of products around each turn.

    dropped  arms and drifts of the turns that were thrown away
    """

    probes: list[Probe]
    dropped: list[tuple[str, float]]


def steady_turn(
    cell: Cell, arm: str, block: int, folder: Path, rows: Sequence[Row], clock: Clock, options: Any
) -> Turn | None:
    """The first turn over which the machine kept its speed; None where no more retries are left."""
    shape, timed = SHAPES[cell.model], rows[cell.warmup * cell.examples_per_step :]
    needed = flops(shape, [row.size for row in timed]) / sum(len(row.ids) for row in timed)
    while True:
        turn = measure(cell, arm, block, folder, rows, options)
        clock.probes.append(probe(shape))
        before, after = (each.bf16 for each in clock.probes[-2:])
        rate, changed = (before + after) / 2, drift(before, after)
        turn = replace(turn, gemm_flops=rate, gemm_share=turn.tokens_per_second * needed / rate)
        is_steady = changed <= options.drift
        print(
            f"  block {block} {arm:18} {turn.tokens_per_second:8,.0f} real {turn.targets_per_second:8,.0f} target tok/s"
            f"  {turn.gemm_share:4.0%} of {rate / 1e9:,.0f} GFLOP/s  peak {turn.peak_bytes / 2**20:,.0f} MiB"
            f"  first step {turn.first_step_seconds:.1f} s"
            f"{'' if is_steady else f'  thrown away: the rate drifted by {changed:.0%}'}",
            flush=True,
        )
        if is_steady:
            return turn
        clock.dropped.append((arm, round(changed, 3)))
        if len(clock.dropped) > options.retries:
            return None


def run_cell(cell: Cell, folder: Path, options: Any) -> dict[str, Any]:
    shape = SHAPES[cell.model]
    count = (cell.warmup + cell.steps) * cell.examples_per_step
    given = workloads.rows(cell.workload, count, shape.vocabulary, CORPUS)
    steps = cell.warmup + cell.steps
    settings = {**SETTINGS, "steps": steps, "examples_per_step": cell.examples_per_step, "threads": options.threads}
    rows = exchange.write(folder, shape, given, settings)
    wanted = [arm for arm in cell.arms if arm in DEFT_ARMS or options.peers_python]
    if options.arms:
        wanted = [arm for arm in wanted if arm in options.arms]
    gates = {} if options.no_gate else gate_all(cell, wanted, folder / "gate", rows, options)
    arms = [arm for arm in wanted if arm not in gates or gates[arm].passed]
    failures = {arm: f"void: {gates[arm].why}" for arm in wanted if arm not in arms}
    turns: list[Turn] = []
    clock = Clock([probe(shape)], [])
    for block in range(cell.blocks):
        for arm in arms if block % 2 == 0 else arms[::-1]:
            try:
                turn = steady_turn(cell, arm, block, folder, rows, clock, options)
            except Failed as error:
                failures[arm] = str(error)
                continue
            turns += [turn] if turn else []
    summaries = _summaries(turns)
    return {
        "model": shape.described(),
        "workload": workloads.ABOUT[cell.workload],
        "cell": asdict(cell),
        "settings": {**settings, "threads": options.threads},
        "mean_tokens": sum(len(row.ids) for row in rows) / len(rows),
        "target_share": sum(len(row.learnt) for row in rows) / sum(len(row.ids) for row in rows),
        "gate": {arm: asdict(found) for arm, found in gates.items()},
        "failures": failures,
        "gemm_gflops": {
            "bf16": median(p.bf16 / 1e9 for p in clock.probes),
            "fp32": median(p.fp32 / 1e9 for p in clock.probes),
        },
        "blocks_kept": min((summary["blocks"] for summary in summaries.values()), default=0),
        "drift_allowed": options.drift,
        "turns_dropped_for_drift": clock.dropped,
        "arms": summaries,
        "turns": [asdict(turn) for turn in turns],
        "machine": machine.described(options.threads),
        "versions": {"deft": machine.versions("deft-sft", "torch", "transformers"), "peers": options.peers_versions},
        "date": date.today().isoformat(),
    }


def gate_all(cell: Cell, arms: Sequence[str], folder: Path, rows: Sequence[Row], options: Any) -> dict[str, Gate]:
    """Loss and gradients of each arm on the first rows that fit in 2,048 tokens."""
    shape = SHAPES[cell.model]
    few: list[Row] = []
    for row in rows:
        if sum(len(each.ids) for each in [*few, row]) > 2048:
            break
        few.append(row)
    settings = {**SETTINGS, "steps": 1, "examples_per_step": len(few), "threads": options.threads}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        (folder / "model").symlink_to(folder.parent / "model")
    exchange.write(folder, shape, few, settings)
    # Eight bytes a parameter for weights and gradients each: the largest model is judged against fp32.
    oracle = "hf_fp64" if shape.parameters < 300e6 else "hf_fp32"

    def gradients(name: str, *arguments: str) -> Path:
        out = folder / name
        out.mkdir(exist_ok=True)
        if not (out / "loss.json").is_file():
            start([*arguments, str(out)], out / "loss.json", out / "log", options.threads)
        return out

    ours = [sys.executable, str(HERE / "deft_side.py"), "--gate", str(folder)]
    references = {name: gradients(name, *ours, name) for name in {oracle, "hf_fp32", "hf_bf16"}}
    found = {}
    for arm in arms:
        if arm in DEFT_ARMS:
            sides = [[*ours, "fp32"], [*ours, "bf16"]]
            fp32, bf16 = (gradients(f"deft_{side[-1]}", *side) for side in sides)
        else:
            theirs = [options.peers_python, str(HERE / "peer_side.py"), str(folder), arm]
            try:
                fp32 = gradients(f"{arm}-fp32", *theirs[:2], "--gate", "fp32", *theirs[2:])
                is_bf16 = arm in BF16_ARMS
                bf16 = gradients(f"{arm}-bf16", *theirs[:2], "--gate", "bf16", *theirs[2:]) if is_bf16 else None
            except Failed as error:
                found[arm] = Gate(False, str(error))
                continue
        found[arm] = judge(fp32, bf16, references["hf_fp32"], references["hf_bf16"], references[oracle])
        print(f"  gate {arm:18} {found[arm]}", flush=True)
    return found


def _summaries(kept: Sequence[Turn]) -> dict[str, dict[str, Any]]:
    """Each arm over the blocks; how many times faster deft is, block by block."""
    ours = {turn.block: turn for turn in kept if turn.arm == "deft"}
    found = {}
    for arm in (*DEFT_ARMS, *PEER_ARMS):
        turns = [turn for turn in kept if turn.arm == arm]
        if not turns:
            continue
        summary: dict[str, Any] = {"blocks": len(turns)}
        for name in SUMMED_UP:
            numbers = [getattr(turn, name) for turn in turns]
            summary[name] = {"median": median(numbers), "quartiles": quartiles(numbers)}
        pairs = [(ours[turn.block], turn) for turn in turns if turn.block in ours]
        if pairs:
            speed = [(a.targets_per_second, b.targets_per_second) for a, b in pairs]
            middle, low, high = paired_ratio(*zip(*speed, strict=True))
            summary["deft_times_faster"] = {"median": middle, "interval_95": [low, high]}
            summary["deft_memory_ratio"] = median(a.peak_bytes / b.peak_bytes for a, b in pairs)
        found[arm] = summary
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="three minutes: the smallest model, one block of any drift"
    )
    parser.add_argument("--only", action="append", help="MODEL:WORKLOAD, or a part of it; may be given again")
    parser.add_argument("--arms", nargs="+", choices=(*DEFT_ARMS, *PEER_ARMS))
    parser.add_argument("--blocks", type=int, help="instead of each cell's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drift", type=float, default=0.05, help="a turn that drifts by more is thrown away")
    parser.add_argument("--retries", type=int, default=10, help="so many turns of a cell may be done again")
    parser.add_argument("--no-gate", action="store_true", help="for work on the benchmark itself: nothing is written")
    parser.add_argument("--peers-python", default=os.environ.get("DEFT_PEERS_PYTHON"), help="$DEFT_PEERS_PYTHON")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/cpu.json; with --quick nothing")
    options = parser.parse_args()
    if options.quick:
        options.retries, options.drift = 0, float("inf")
    return options


def peers_versions(python: str | None) -> dict[str, str]:
    if not python:
        return {}
    names = ("torch", "transformers", "trl", "accelerate", "datasets")
    code = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names!r}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    options = arguments()
    machine.pin(options.threads)
    torch.set_num_threads(options.threads)
    options.peers_versions = peers_versions(options.peers_python)
    if not options.peers_python:
        print("no peers: name the python that has TRL in $DEFT_PEERS_PYTHON or with --peers-python")
    cells = [cell for cell in (QUICK if options.quick else CELLS) if _is_wanted(cell, options.only)]
    results = options.results or (None if options.quick or options.no_gate else RESULTS)
    failed = False
    for cell in cells:
        if not workloads.is_there(cell.workload, CORPUS):
            print(f"{cell.name}: left out, as the corpus is not here (set DEFT_CORPUS)")
            continue
        cell = replace(cell, blocks=options.blocks or cell.blocks)
        print(f"{cell.name}  {workloads.ABOUT[cell.workload]}", flush=True)
        with tempfile.TemporaryDirectory(prefix="deft-bench-") as temporary:
            found = run_cell(cell, Path(temporary), options)
        print(table.of_cell(cell.name, found), flush=True)
        failed |= bool(found["failures"]) or "deft" not in found["arms"]
        if results:
            table.keep(results, cell.name, found)
            if results.resolve().parent == RESULTS.parent:
                table.into_readme(ROOT / "README.md", *sorted(RESULTS.parent.glob("cpu*.json")))
    return 1 if failed else 0


def _is_wanted(cell: Cell, only: Sequence[str] | None) -> bool:
    return not only or any(part in cell.name for part in only)


if __name__ == "__main__":
    sys.exit(main())
