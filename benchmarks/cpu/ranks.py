"""Memory per rank of a model that ranks share, and how often weights are gathered in a step.

    python benchmarks/cpu/ranks.py [--model 135m] [--ranks 1 2 4] [--precision bf16] [--steps 3]

A run of its own for each number of ranks, started by torchrun, with one copy of the model over all of them. Held: this
rank's weights, low bits and moments, to the byte. At rest: what the process has more than after its imports, once the
model is loaded; loading, at most: the same at its peak until then, and with steps of several rounds. Each number is of
the rank that has most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exchange
import torch
from common import workloads
from common.machine import peak_bytes, resident_bytes
from common.shapes import SHAPES
from rich.console import Console
from transformers import AutoModelForCausalLM

from deft.distributed.world import World, joined
from deft.run import build, config
from deft.run.prepare import prepare
from deft.run.reading import Session
from deft.training.loop import train

SETTINGS = {"batch__examples": 4, "epochs": 1, "microbatch_tokens": 512, "lanes": 4, "device": "cpu"}
SINGLE = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""One thread; and freed pieces of 1 MiB go back to the system, where glibc keeps them in pieces between others."""
MIB = 2**20


def measured(world: World, folder: Path, precision: str, steps: int) -> dict[str, Any]:
    baseline, files = resident_bytes(), {"model": str(folder / "model"), "data": str(folder / "train.jsonl")}
    asked = {
        **files,
        **SETTINGS,
        "precision": precision,
        "steps": steps,
        "shard": world.size,
        "output": str(folder / "out"),
    }
    made = config.make(config.nested(asked))
    prepared = prepare(made, Session(world=world, console=Console(quiet=True)))
    world.start(torch.device("cpu"))
    state = build.load(prepared.config, prepared.checked, prepared.fit, world, owns_process=False)
    live = {**state.masters.state(), **state.optimizer.state()}
    rest, loading, began = resident_bytes(), peak_bytes(), time.perf_counter()
    gathers = []
    for _ in train(state, prepared.fit.planned, prepared.checked.objective, clip=1.0, lr=lambda step: 1e-5):
        gathers.append(state.shards.layout.gathers if state.shards else 0)
    return {
        "held": sum(each.nbytes for each in live.values()) / MIB,
        "at rest": (rest - baseline) / MIB,
        "loading": (loading - baseline) / MIB,
        "at most": (peak_bytes() - baseline) / MIB,
        "gathers a step": gathers[-1] - gathers[-2] if len(gathers) > 1 else gathers[-1],
        "rounds a step": -(-len(prepared.fit.planned.step(0).micro_batches) // world.size),
        "seconds a step": (time.perf_counter() - began) / steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        with joined() as world:
            found = measured(world, arguments.folder, arguments.precision, arguments.steps)
            (arguments.folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder, shape = Path(name), SHAPES[arguments.model]
        exchange.write(
            folder,
            shape,
            workloads.rows("generated", 4 * arguments.steps, shape.vocabulary, None),
            {"examples_per_step": 4},
        )
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision]
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).save_pretrained(folder / "model")
        os.environ["DEFT_CACHE"] = str(folder / "cache")
        for ranks in arguments.ranks:
            print(json.dumps({"ranks": ranks, **_most(folder, ranks, sys.argv[1:])}), flush=True)
    return 0


def _most(folder: Path, ranks: int, options: list[str]) -> dict[str, float]:
    """Of each number the largest of all ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    subprocess.run([*command, *options, "--folder", str(folder)], check=True, env=os.environ | SINGLE)
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {key: round(max(each[key] for each in found), 2) for key in found[0]}


if __name__ == "__main__":
    sys.exit(main())
