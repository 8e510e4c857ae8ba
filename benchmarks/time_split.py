"""Where the time of a training step goes: the parts of deft's own step, beside the rate of this machine's products.

    python benchmarks/time_split.py [40m] [--workload generated] [--tokens 2048] [--steps 8] [--threads 2] [--cpu-time]
                                    [--rate-once] [--vocabulary 64000] [--precision bf16] [--out FILE]

Micro-batches of random weights' rows, one optimizer step each; the median of all but the first two counts. The rate of
products is measured before and after each step, since that of a busy machine changes within seconds. --cpu-time
counts the seconds that the process computed and not those that it waited for busy neighbours: for one thread only.
--rate-once measures the rate behind the last step alone: time and memory of each step, which the result has as well,
are then those of a run, whose first steps make the kernels.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from common import machine, workloads
from common.shapes import SHAPES, Shape, flops
from transformers import AutoConfig, AutoModelForCausalLM

from deft.core import hardware
from deft.core.types import MicroBatch
from deft.model import selftest
from deft.plan import loader
from deft.plan.packs import pack
from deft.training import chunked
from deft.training.masters import Masters, clip_scale
from deft.training.optim.adamw import AdamW
from deft.training.state import TrainState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("body_forward", "head", "body_backward", "optimizer")


def micro_batches(shape: Shape, name: str, tokens: int, count: int) -> list[tuple[MicroBatch, float]]:
    """So many full packs of the workload, each with the arithmetic that it needs."""
    corpus = os.environ.get("DEFT_CORPUS")
    rows = workloads.rows(name, 64 * count, shape.vocabulary, Path(corpus) if corpus else None)
    packs = [indices for indices in pack([row.size[0] for row in rows], tokens) if len(indices) > 1]
    packs = packs[:: max(1, len(packs) // count)][:count]  # the longest rows lie in the first ones
    batches = []
    for indices in packs:
        chosen = [rows[index] for index in indices]
        documents = [(np.array(row.ids), (np.array(row.labels) >= 0).astype(np.float32)) for row in chosen]
        batches.append((loader.build(documents), flops(shape, [row.size for row in chosen])))
    return batches


def step(state: TrainState, batch: MicroBatch, clock: Callable[[], float]) -> list[float]:
    """Seconds of each part of one optimizer step."""
    marks = [clock()]
    state.masters.collect()
    hidden, head = state.causal_lm.hidden_and_head(batch)
    marks.append(clock())
    loss = chunked.loss(hidden, head, batch.targets, batch.weights / len(batch.rows))
    marks.append(clock())
    loss.backward()
    marks.append(clock())
    state.optimizer.step(1e-4, clip_scale(state.masters.squared_norm().sqrt(), 1.0))
    marks.append(clock())
    return [after - before for before, after in pairwise(marks)]


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[options.precision]
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        machine.time.perf_counter = time.process_time
    torch.manual_seed(0)
    before = machine.peak_bytes()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config()), dtype=dtype)
    causal_lm = selftest.choose(model.eval())
    masters = Masters(model.named_parameters(), dtype)
    state = TrainState(causal_lm, masters, AdamW(masters))
    rates, done, resident = [] if options.rate_once else [machine.gemm_rate(shape, dtype)], [], []
    for batch, needed in micro_batches(shape, options.workload, options.tokens, options.steps):
        parts = step(state, batch, clock)
        peak = machine.peak_bytes()
        resident.append(machine.resident_bytes())
        done.append((parts, len(batch.tokens), len(batch.rows), needed))
        if not options.rate_once:
            rates.append(machine.gemm_rate(shape, dtype))
    rates = rates or [machine.gemm_rate(shape, dtype)] * (len(done) + 1)
    around = [mean(pair) for pair in pairwise(rates)]
    shares = [needed / sum(parts) / rate for (parts, _, _, needed), rate in zip(done, around, strict=True)]
    counted = done[2:] or done[-1:]
    return {
        "note": causal_lm.note,
        "gemm_gflops": [round(each / 1e9) for each in rates],
        "tokens_per_second": round(median(tokens / sum(parts) for parts, tokens, _, _ in counted)),
        "share_of_gemm": round(median(shares[2:] or shares[-1:]), 3),
        "shares": [round(share, 3) for share in shares],
        "seconds": {name: round(median(each[0][i] for each in counted), 4) for i, name in enumerate(PARTS)},
        "step_seconds": [round(sum(parts), 3) for parts, _, _, _ in done],
        "resident_mib": [round(size / 2**20) for size in resident],
        "step_tokens": [tokens for _, tokens, _, _ in done],
        "step_targets": [targets for _, _, targets, _ in done],
        "peak_mib": round(peak / 2**20),
        "peak_before_mib": round(before / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", nargs="?", default="40m", choices=SHAPES)
    parser.add_argument("--workload", default="generated", choices=workloads.ABOUT)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, which is a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--rate-once", action="store_true")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--out", type=Path, help="a JSON file, which gets one more measurement")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts waiting threads as well: only with --threads 1")
    hardware.settle_process(SHAPES[options.shape].parameters, 0)
    machine.pin(options.threads)
    torch.set_num_threads(options.threads)
    own = SHAPES[options.shape]
    shape = own if options.vocabulary is None else replace(own, vocabulary=options.vocabulary)
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    found = {
        "date": date.today().isoformat(),
        "asked": asked,
        **measure(shape, options),
        "machine": machine.described(options.threads),
        "versions": machine.versions("torch", "transformers"),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        options.out.write_text(json.dumps([*earlier, found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
