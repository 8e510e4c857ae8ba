"""What a whole optimizer step costs with each loss, and with NEFTune's noise, beside the negative log-likelihood.

    python benchmarks/cpu/objectives.py [--rounds 8] [--rows generated uniform]

The 40 M shape with random weights, steps of about 2,000 tokens. Arms take turns on the same step in one process;
seconds are those that the process computed, on all cores (as in cpu_clock.py), so that a busy machine tells little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import workloads
from common.machine import described, versions
from common.shapes import SHAPES
from common.stats import paired_ratio
from transformers import AutoConfig, AutoModelForCausalLM

from deft.core import hardware, registry
from deft.core.types import Encoded, Origin, StepBatch
from deft.model import selftest
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import loss, objectives
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.state import TrainState
from deft.training.step import optimizer_step

RESULT = Path(__file__).parents[1] / "results" / "objectives.json"
BOUNDS = {"kl": 1.6}
USUAL_BOUND = 1.15
SHAPE = SHAPES["40m"]
ALPHA = 5.0
ROWS = {"generated": 8, "uniform": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    state = build()
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for rows in given.rows:
        known[rows] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": described(given.threads),
            "versions": versions("torch", "transformers"),
            "rounds": given.rounds,
            "arms": measure(state, step(rows), given.rounds),
        }
        RESULT.write_text(json.dumps(known, indent=2) + "\n")
    above = [(rows, arm) for rows in given.rows for arm, each in known[rows]["arms"].items() if not each["holds"]]
    print("above its bound:", above or "none")
    return 1 if above else 0


def build() -> TrainState:
    torch.manual_seed(0)
    machine = hardware.resolve("cpu", "auto", "auto")
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE.config())).to(machine.dtype)
    causal_lm = selftest.choose(model)
    masters = Masters(model.named_parameters(), machine.dtype)
    causal_lm.keep_start()
    return TrainState(causal_lm, masters, AdamW(masters))


def step(name: str) -> StepBatch:
    """Eight rows of which two fifths are learnt, or two of 1,024 tokens, all learnt."""
    rows = workloads.rows(name, ROWS[name], SHAPE.vocabulary, None)
    examples = [
        (Encoded(Origin(name, line), np.array(row.ids, np.int32), (np.array(row.labels) >= 0).astype(np.float32)),)
        for line, row in enumerate(rows, 1)
    ]
    return loader.make(examples, Batching(examples=8), epochs=1, seed=0, microbatch_tokens=4096).step(0)


def measure(state: TrainState, step_batch: StepBatch, rounds: int) -> dict[str, dict[str, Any]]:
    """By arm: the median of its seconds, their ratio to nll's with its interval, and whether that is within bounds."""
    seconds: dict[str, list[float]] = {arm: [] for arm in ("nll", *registry.names(loss), "neftune")}
    for arm in seconds:
        timed(state, step_batch, arm)  # the first products of a shape take longer
    for turn in range(rounds):
        arms = [*seconds]
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            seconds[arm].append(timed(state, step_batch, arm))
    found = {}
    for arm, taken in seconds.items():
        ratio, low, high = paired_ratio(taken, seconds["nll"])
        bound = BOUNDS.get(arm, USUAL_BOUND)
        found[arm] = {"seconds": median(taken), "ratio": ratio, "low": low, "high": high, "holds": ratio <= bound}
        print(f"{arm:18} {median(taken):6.2f} s  {ratio:.3f} ({low:.3f} to {high:.3f}), at most {bound}", flush=True)
    return found


def timed(state: TrainState, step_batch: StepBatch, arm: str) -> float:
    """Seconds of one step; weights stay as they are, so that every step is the same."""
    objective = objectives.load("nll" if arm == "neftune" else arm)
    state.causal_lm.noise = ALPHA if arm == "neftune" else 0.0
    began = time.process_time()
    optimizer_step(state, step_batch, objective, lr=0.0, clip=1.0)
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
