"""deft's arm: a run on given rows, as `deft train` starts it.

    python benchmarks/cpu/deft_side.py FOLDER PRECISION OUT [--gate] [--settings FILE] [--peft-forward]

FOLDER as for `peer_side.py`, and `train.jsonl`: the same rows as words that the model's tokenizer turns into the same
ids. OUT gets deft's run folder `run/`, whose metrics.jsonl has a line per optimizer step, and `memory.json`.

With --gate, instead, the loss and the gradients of all rows in one micro-batch, by the causal_lm that a run would use;
and with PRECISION hf_fp64, hf_fp32 or hf_bf16 those of the plain Hugging Face model on padded rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.machine import peak_bytes
from transformers import AutoModelForCausalLM

from deft.model import adapters
from deft.run import config
from deft.run.reading import Session
from deft.run.train import train as run


def train(folder: Path, precision: str, out: Path, settings: dict[str, Any]) -> None:
    baseline = peak_bytes()
    asked = {
        "model": str(folder / "model"),
        "data__train": str(folder / "train.jsonl"),
        "output": str(out / "run"),
        "epochs": 1,
        "steps": settings["steps"],
        "batch__examples": settings["examples_per_step"],
        "max_length": settings["max_length"],
        "optimizer__lr": settings["lr"],
        "optimizer__betas": settings["betas"],
        "optimizer__eps": settings["eps"],
        "optimizer__clip": settings["clip"],
        "schedule__name": "constant",
        "schedule__warmup": 0,
        "precision": precision,
        "device": "cpu",
        **settings["deft"],
    }
    run(config.make(config.nested(asked)), Session(owns_process=True))  # as the command line does
    # What a step needed, not the export that follows.
    steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = {"baseline_bytes": baseline, "peak_bytes": max(step["peak_bytes"] for step in steps)}
    (out / "memory.json").write_text(json.dumps(memory))


def gate(folder: Path, precision: str, out: Path, rows: list[dict[str, list[int]]]) -> None:
    from peer_side import save_gate

    name = precision.removeprefix("hf_")
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[name]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    mean = (plain_loss if precision.startswith("hf_") else deft_loss)(model.to(dtype), rows)
    mean.backward()
    save_gate(out, model, float(mean))


def plain_loss(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """The definition: padded rows, a mask, whole logits, cross-entropy (in fp32 at least)."""
    from peer_side import padded

    batch = padded(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    labels = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), labels)


def deft_loss(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    import numpy as np

    from deft.model import selftest
    from deft.plan.loader import build
    from deft.training import chunked
    from deft.training.step import mean_share

    causal_lm = selftest.choose(model)
    if causal_lm.note:
        raise RuntimeError(causal_lm.note)
    documents = [(np.array(row["input_ids"]), (np.array(row["labels"]) >= 0).astype(np.float32)) for row in rows]
    batch = build(documents)
    return mean_share(causal_lm, batch, len(batch.targets), chunked.NLL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    plain = ("hf_fp64", "hf_fp32", "hf_bf16")
    parser.add_argument("precision", choices=("auto", "fp32", "bf16", *plain))
    parser.add_argument("out", type=Path)
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--settings", type=Path, help="in place of FOLDER's own")
    parser.add_argument("--peft-forward", action="store_true", help="adapters are computed by peft's layers")
    given = parser.parse_args()
    settings = json.loads((given.settings or given.folder / "settings.json").read_text(encoding="utf-8"))
    if given.peft_forward:
        adapters.is_plain = lambda module: False
    torch.set_num_threads(settings["threads"])
    if not given.gate:
        train(given.folder, given.precision, given.out, settings)
        return
    lines = (given.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    gate(given.folder, given.precision, given.out, [json.loads(line) for line in lines])


if __name__ == "__main__":
    main()
