"""What a save costs: seconds, and the share of training time where every 100 steps are saved, in a thread and not.

    python benchmarks/saving.py [--steps 3] [--threads 2]

A Llama of 135 M parameters (the shape of SmolLM2-135M), random weights, steps of 8 rows of 200 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from common.machine import described, versions
from transformers import LlamaConfig, LlamaForCausalLM

from deft.core.types import Encoded, Origin
from deft.model import selftest
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.training import checkpoint, chunked, randomness
from deft.training.checkpoint import Checkpoint, Keep
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.saving import Saver
from deft.training.state import TrainState
from deft.training.step import optimizer_step

RESULT = Path(__file__).parent / "results" / "saving.json"
EVERY, ROWS, TOKENS = 100, 8, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps that are timed, with a save beside them and without"
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measured = {name: measure(dtype, given.steps, given.saves) for name, dtype in DTYPES.items()}
    packages = versions("torch", "transformers", "safetensors", "deft-sft")
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": described(given.threads),
        "versions": packages,
        "every": EVERY,
        "step": {"rows": ROWS, "tokens": ROWS * TOKENS},
        **measured,
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    json.dump(found, sys.stdout, indent=2)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure(dtype: torch.dtype, steps: int, saves: int) -> dict[str, Any]:
    state, planned = build(dtype)
    timed_step(state, planned)
    folder = Path(tempfile.mkdtemp(prefix="saving-"))
    try:
        return _measure(state, planned, folder, steps, saves)
    finally:
        shutil.rmtree(folder)


def _measure(state: TrainState, planned: Loader, folder: Path, steps: int, saves: int) -> dict[str, Any]:
    copies, writes, checks, beside = [], [], [], []
    for _ in range(saves):
        began = time.perf_counter()
        copied = snapshot(state)
        copies.append(time.perf_counter() - began)
        place = checkpoint.write(folder / "waiting", copied)
        writes.append(time.perf_counter() - began - copies[-1])
        began = time.perf_counter()
        checkpoint.read(folder / "waiting", state.step)
        checks.append(time.perf_counter() - began)
        shutil.rmtree(place)
    plain = [timed_step(state, planned) for _ in range(steps)]
    with Saver(folder / "thread", EVERY, Keep(1), print) as saver:
        for _ in range(saves):
            began = time.perf_counter()
            saver.begin(snapshot(state), lambda: None)
            blocked = time.perf_counter() - began
            during = []
            while not (saver._running and saver._running[1].done()):
                during.append(timed_step(state, planned))
            beside.append(blocked + sum(during) - len(during) * statistics.median(plain))
        saver.finish()
    step = statistics.median(plain)
    waiting = [copy + write for copy, write in zip(copies, writes, strict=True)]
    return {
        "megabytes": round(copied.bytes / 1e6, 1),
        "seconds": {
            "step": spread(plain),
            "copy": spread(copies),
            "write": spread(writes),
            "verify": spread(checks),
            "cost in a thread": spread(beside),
            "cost where training waits": spread(waiting),
        },
        "share of training time": {
            "in a thread": round(statistics.median(beside) / (EVERY * step), 5),
            "where training waits": round(statistics.median(waiting) / (EVERY * step), 5),
        },
    }


def build(dtype: torch.dtype) -> tuple[TrainState, Loader]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    causal_lm = selftest.choose(model)
    masters = Masters(model.named_parameters(), dtype)
    draw = np.random.default_rng(0)
    weights = np.ones(TOKENS, np.float32)
    weights[: TOKENS // 3] = 0
    examples = [
        (Encoded(Origin("random", n), draw.integers(0, 49152, TOKENS).astype(np.int32), weights),) for n in range(ROWS)
    ]
    batching = Batching(examples=ROWS)
    planned = loader.make(examples, batching, epochs=1, seed=0, microbatch_tokens=4096)
    return TrainState(causal_lm, masters, AdamW(masters)), planned


def timed_step(state: TrainState, planned: Loader) -> float:
    work = planned.step(0)
    began = time.perf_counter()
    optimizer_step(state, work, chunked.NLL, clip=1.0, lr=1e-5)
    return time.perf_counter() - began


def snapshot(state: TrainState) -> Checkpoint:
    rows = {"digest": torch.zeros(0, dtype=torch.int64)}
    parts: dict[str, Any] = {name: {} for name in ("cursor", "schedule", "inputs")}
    return Checkpoint(
        state.step,
        {**state.tensors(), "rows": rows},
        {**parts, "random-00000": randomness.as_json(randomness.snapshot())},
    )


def spread(numbers: list[float]) -> dict[str, float]:
    ordered = sorted(numbers)
    return {
        "least": round(ordered[0], 3),
        "median": round(statistics.median(ordered), 3),
        "most": round(ordered[-1], 3),
    }


if __name__ == "__main__":
    main()
