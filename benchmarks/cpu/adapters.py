"""LoRA in deft beside deft's own full fine-tuning, peft's forward in deft, and TRL with peft; losses beside TRL's.

    DEFT_PEERS_PYTHON=.../python python benchmarks/cpu/adapters.py [--model 135m] [--blocks 3] [--threads 1]

The peers' environment has torch, transformers, trl==1.16.0 and peft. Rows of GSM8K, rank 16 on all linear layers, alpha
32. Arms take turns, forwards and backwards, each a fresh process that counts seconds of its processor, not of the wall.
TRL trains with its defaults: bf16 autocast, batches of 8 padded rows, checkpointing. For the losses both start from one
adapter whose two products are not zero, and compute 20 steps in fp32. Checkpoints of one adapter step and of one full
step are weighed. What is printed is written to benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exchange
import peft
import torch
from common import machine, workloads
from common.shapes import SHAPES
from run import CORPUS, HERE, SETTINGS, peers_versions, start
from transformers import AutoModelForCausalLM

RESULT = HERE.parent / "results" / "adapters.json"
LORA = {"r": 16, "lora_alpha": 32}
ADAPTER = {"adapter__name": "lora", "adapter__r": LORA["r"], "adapter__alpha": LORA["lora_alpha"]}
ARMS = ("full", "lora", "peft_forward", "trl")
OTHERS = {"full": 1.4, "peft_forward": 1.5, "trl": 4.0}
"""How many times faster LoRA should at least be."""
LOSS_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=8, help="of one step; half of them where losses are compared")
    parser.add_argument("--peers-python", default=os.environ.get("DEFT_PEERS_PYTHON"))
    options = parser.parse_args()
    if not options.peers_python:
        parser.error("name the python that has TRL and peft in $DEFT_PEERS_PYTHON")
    machine.pin(options.threads)
    with tempfile.TemporaryDirectory(prefix="deft-bench-") as temporary:
        found = {
            "model": SHAPES[options.model].described(),
            "lora": LORA,
            "speed": speed(Path(temporary) / "speed", options),
            "losses": losses(Path(temporary) / "losses", options),
            "machine": machine.described(options.threads),
            "versions": machine.versions("deft-sft", "torch", "transformers", "peft"),
            "peers": peers_versions(options.peers_python),
            "date": date.today().isoformat(),
        }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the processor for the second step, peak bytes above the imports, bytes of a checkpoint, by arm."""
    write(folder, options.model, 2, options.examples, options.threads, {})
    turns: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for block in range(options.blocks):
        for arm in ARMS if block % 2 == 0 else ARMS[::-1]:
            turns[arm].append(turn(arm, folder, options))
            print(
                f"block {block} {arm:13}", *(f"{key} {value:,.1f}" for key, value in turns[arm][-1].items()), flush=True
            )
    least = {arm: min(each["seconds"] for each in turns[arm]) for arm in ARMS}
    bytes_of = {arm: median(each["peak_mib"] for each in turns[arm]) for arm in ARMS}
    for arm, wanted in OTHERS.items():
        paired = sorted(a["seconds"] / b["seconds"] for a, b in zip(turns[arm], turns["lora"], strict=True))
        print(
            f"lora is {least[arm] / least['lora']:.2f}x as fast as {arm}"
            f" ({paired[0]:.2f} to {paired[-1]:.2f}), wanted {wanted}"
        )
    of_others = {arm: bytes_of["lora"] / bytes_of[arm] for arm in OTHERS}
    print("peak memory of lora:", *(f"{share:.2f} of {arm}" for arm, share in of_others.items()))
    share = turns["lora"][0]["checkpoint_mib"] / turns["full"][0]["checkpoint_mib"]
    print(f"a checkpoint of lora is {share:.2%} of a full one")
    return {"turns": turns, "least_seconds": least, "checkpoint_share": share}


def turn(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary)
        steps = run_arm(arm, folder, out, options)
        memory = json.loads((out / "memory.json").read_text(encoding="utf-8"))
        kept = sum(each.stat().st_size for each in out.glob("run/checkpoints/*/**/*") if each.is_file())
    return {
        "seconds": steps[-1]["seconds"],
        "peak_mib": (memory["peak_bytes"] - memory["baseline_bytes"]) / 2**20,
        "checkpoint_mib": kept / 2**20,
    }


def losses(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Mean loss of each of 20 steps in fp32 from one adapter, at a rate that moves it."""
    more = {"lr": 2e-4, "bf16": False, "start": str(folder / "adapter")}
    write(folder, options.model, LOSS_STEPS, options.examples // 2, options.threads, more)
    write_adapter(folder)
    found = {}
    for arm in ("lora", "trl"):
        out = folder / arm
        out.mkdir()
        found[arm] = [step["loss"] for step in run_arm(arm, folder, out, options)]
    apart = max(abs(a - b) for a, b in zip(found["lora"], found["trl"], strict=True))
    first, last = found["lora"][0], found["lora"][-1]
    print(f"losses of {LOSS_STEPS} steps, from {first:.4f} to {last:.4f}: at most {apart:.1e} apart")
    return found


def write(folder: Path, model: str, steps: int, examples: int, threads: int, more: Mapping[str, Any]) -> None:
    shape = SHAPES[model]
    rows = workloads.rows("gsm8k", steps * examples, shape.vocabulary, CORPUS)
    settings = {**SETTINGS, "steps": steps, "examples_per_step": examples, "threads": threads, "lora": LORA, **more}
    exchange.write(folder, shape, rows, settings)


def write_adapter(folder: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights="orthogonal", **LORA)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")


def run_arm(arm: str, folder: Path, out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of an arm's steps; they count seconds of the processor."""
    clock = str(HERE / "cpu_clock.py")
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if arm == "trl":
        command, steps = (
            [options.peers_python, clock, str(HERE / "peer_side.py"), str(folder), "trl_lora", str(out)],
            "steps.jsonl",
        )
    else:
        start_from = {"adapter__start": settings["start"]} if "start" in settings else {}
        settings["deft"] = {} if arm == "full" else {**ADAPTER, **start_from}
        (out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        precision = "auto" if settings.get("bf16", True) else "fp32"
        command = [
            sys.executable,
            clock,
            str(HERE / "deft_side.py"),
            str(folder),
            precision,
            str(out),
            "--settings",
            str(out / "settings.json"),
        ]
        command += ["--peft-forward"] if arm == "peft_forward" else []
        steps = "run/metrics.jsonl"
    start(command, out / steps, out / "log", options.threads)
    return [json.loads(line) for line in (out / steps).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
