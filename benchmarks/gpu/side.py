"""One arm on the GPU (or, for a dry run, on the CPU): random weights made on the device, generated rows, no files read.

    python benchmarks/gpu/side.py ARM OUT.json --model 0.5b --workload generated --examples 256 --tokens 16384 32768

deft's arms try each number of micro-batch tokens; the others have their own batches. OUT.json gets, for each try, the
seconds, tokens and targets of every timed step, the peak of the device's memory, and the time to the first step.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import workloads
from common.shapes import SHAPES, Shape
from common.workloads import Row
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

DEFT_ARMS = {"deft": False, "deft_compiled": True}
PEER_ARMS = ("hf_default", "hf_bf16", "trl_default", "trl_packed")
WARMUP = 3
"""Steps until compilation and the allocator have settled."""


def new_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    arguments = shape.config()
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def steps_of(rows: Sequence[Row], examples: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), examples):
        yield rows[start : start + examples]


# --- deft ------------------------------------------------------------------------------------------------------------


def deft(given: argparse.Namespace, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A try for each number of micro-batch tokens, until one does not fit: the plan, the loop and the compilation of
    a user's run."""
    from deft.model import selftest
    from deft.training import chunked, compiling
    from deft.training.loop import train
    from deft.training.masters import Masters
    from deft.training.optim.adamw import AdamW
    from deft.training.state import TrainState

    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    causal_lm = selftest.choose(new_model(SHAPES[given.model], dtype, given.device).eval())
    if causal_lm.note:
        raise SystemExit(causal_lm.note)
    masters = Masters(causal_lm.model.named_parameters(), dtype)
    optimizer = AdamW(masters)
    tries, first = [], None
    for tokens in given.tokens:
        state, planned = TrainState(causal_lm, masters, optimizer), plan_of(rows, given.examples, tokens)
        found: dict[str, Any] = {"tokens": tokens, "steps": []}
        reset_peak(given.device)
        try:
            if DEFT_ARMS[given.arm]:
                torch._dynamo.reset()
                backend = "inductor" if given.device == "cuda" else "aot_eager"
                compiling.compile_for(state, compiling.buckets(planned), chunked.NLL, print, backend)
                if state.causal_lm.compiled is None:
                    raise SystemExit("layers are not compiled")
            began = time.perf_counter()
            for record in train(state, planned, chunked.NLL, clip=1.0, lr=lambda step: 1e-5):
                wait(given.device)
                first, now = first or time.time() - given.began, time.perf_counter()
                numbers = {name: getattr(record, name) for name in ("tokens", "target_tokens", "padded_tokens")}
                found["steps"].append({"seconds": now - began, **numbers})
                began = time.perf_counter()
        except torch.OutOfMemoryError:
            tries.append({**found, "steps": [], "why": "out of memory"})
            break
        tries.append({**found, **memory(given.device), "first_step_seconds": first})
    return tries


def plan_of(rows: Sequence[Row], examples: int, tokens: int) -> Any:
    """The rows in steps of so many, as deft plans them."""
    from deft.core.types import Encoded, Origin
    from deft.plan import loader
    from deft.plan.order import Batching

    encoded = [
        (Encoded(Origin("rows", n), np.array(row.ids, np.int32), (np.array(row.labels) >= 0).astype(np.float32)),)
        for n, row in enumerate(rows)
    ]
    return loader.make(encoded, Batching(examples=examples), epochs=1, seed=0, microbatch_tokens=tokens)


# --- peers -----------------------------------------------------------------------------------------------------------


def peer(given: argparse.Namespace, rows: Sequence[Row]) -> list[dict[str, Any]]:
    import peer_side

    values = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    settings = {"steps": given.steps + WARMUP, "examples_per_step": given.examples, "lr": 1e-5, "clip": 1.0}
    settings |= {"betas": [0.9, 0.95], "eps": 1e-8}
    is_cpu = given.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        steps = peer_side.Steps(out)
        arguments = peer_side.common_arguments(settings, out, 8) | {"use_cpu": is_cpu}
        dtype = torch.bfloat16 if given.arm in ("hf_bf16", "trl_packed") and not is_cpu else torch.float32
        model = new_model(SHAPES[given.model], dtype, given.device)
        reset_peak(given.device)
        more: dict[str, Any] = {"model": model, "callbacks": [peer_side.Ends(steps, None)]}
        if given.arm.startswith("hf"):
            extra = {"bf16": not is_cpu, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
            if given.arm == "hf_bf16":
                extra["train_sampling_strategy"] = "group_by_length"
            more |= {"args": TrainingArguments(**arguments, **extra), "train_dataset": values}
            trainer = peer_side.counting(Trainer)(data_collator=peer_side.padded, **more)
        else:
            trainer = trl_trainer(given, rows, values, arguments, more, peer_side)
        trainer.steps = steps
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return [{"steps": [], "why": "out of memory"}]
        lines = (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
    return [{"steps": found, **memory(given.device), "first_step_seconds": steps.first - given.began}]


def trl_trainer(
    given: argparse.Namespace, rows: Sequence[Row], values: list[Any], arguments: dict[str, Any], more: Any, side: Any
) -> Any:
    from datasets import Dataset
    from exchange import word_tokenizer
    from trl import SFTConfig, SFTTrainer

    extra = {"train_sampling_strategy": "sequential", **side.TRL_ARMS[given.arm]}
    if given.arm == "trl_packed":
        tokens = sum(len(row.ids) for row in rows) / len(rows) * given.examples
        extra["gradient_accumulation_steps"] = max(1, round(tokens / side.PACK_TOKENS))
    args = SFTConfig(**{**arguments, **extra})
    more = {**more, "args": args, "train_dataset": Dataset.from_list(values)}
    return side.counting(SFTTrainer)(processing_class=word_tokenizer(SHAPES[given.model]), **more)


# --- the device ------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: str) -> dict[str, int]:
    if device != "cuda":
        from common.machine import peak_bytes

        return {"peak_bytes": peak_bytes()}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arm", choices=(*DEFT_ARMS, *PEER_ARMS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--workload", choices=("generated", "uniform"), required=True)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--steps", type=int, default=5, help="after the warm-up")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--began", type=float, required=True, help="time.time() when the process was started")
    given = parser.parse_args()
    count = (given.steps + WARMUP) * given.examples
    rows = workloads.rows(given.workload, count, SHAPES[given.model].vocabulary, None)
    tries = (deft if given.arm in DEFT_ARMS else peer)(given, rows)
    for each in tries:
        each["steps"] = each["steps"][WARMUP:]
    given.out.write_text(json.dumps(tries), encoding="utf-8")


if __name__ == "__main__":
    main()
