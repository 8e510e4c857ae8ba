"""TRL's half of the parity proof: train its SFTTrainer on given tokens, labels and order; write what each step was.

    python benchmarks/parity_trl/trl_side.py FOLDER [--accumulation 4]

Runs in an environment that has TRL, and knows nothing of deft. FOLDER holds

    rows.jsonl      one line per example, in the order of consumption: {"input_ids": [...], "labels": [...]}; labels as
                    Hugging Face has them, not shifted, -100 where nothing is learnt; step n takes the lines from
                    n * examples_per_step on, so there are steps * examples_per_step lines, epochs unrolled
    settings.json   the fields of `Settings`

and gets

    trl.jsonl       one line per step, counted from 0: step, loss, grad_norm (before the clip), learning_rate (the one
                    that the step used), target_tokens, logged_loss (TRL's own figure, for comparison)
    trl_run.json    versions and wall time

Two things can make the comparison void, and both are checked while it runs: every micro-batch that reaches the loss is
compared with the rows that should be in it, and TRL's denominator with the count of targets in the whole step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

Row = dict[str, list[int]]

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """settings.json. No field has a quiet default that could differ from what the other side did, but the last two."""

    model: str
    examples_per_step: int
    steps: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    """0 does not clip."""
    schedule: str
    """constant, linear or cosine, as transformers defines them: the factor is step / warmup_steps in the warm-up, so
    that the first step of a warm-up moves nothing, and falls to 0 after the last step."""
    warmup_steps: int
    dtype: str
    seed: int
    threads: int = 2
    optim: str = "adamw_torch_fused"
    """TRL's default. `adamw_torch` is the unfused one."""

    @classmethod
    def read(cls, path: Path) -> Settings:
        """The settings, or ValueError naming every field that is missing, unknown or unsupported."""
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(cls)}
        required = known - {"threads", "optim"}
        if problems := sorted(required - values.keys()) + sorted(values.keys() - known):
            raise ValueError(f"{path.name}: missing or unknown fields: {', '.join(problems)}")
        if values["dtype"] != "fp32":
            raise ValueError(f"{path.name}: dtype must be fp32, not {values['dtype']}")
        if values["schedule"] not in ("constant", "linear", "cosine"):
            raise ValueError(f"{path.name}: unknown schedule {values['schedule']}")
        return cls(**values)


def read_rows(path: Path, expected: int) -> list[Row]:
    """The rows in order; ValueError unless there are `expected` of them, each with as many labels as ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(rows) != expected:
        raise ValueError(f"{path.name} has {len(rows)} rows, the settings ask for {expected}")
    for line, row in enumerate(rows, start=1):
        if len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"{path.name}:{line}: {len(row['input_ids'])} ids but {len(row['labels'])} labels")
    return rows


def targets_in(rows: list[Row]) -> int:
    """How many tokens are learnt. Nothing predicts a row's first token, so its label does not count."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


class RecordingTrainer(SFTTrainer):
    """SFTTrainer, unchanged in what it computes; keeps each step's figures unrounded and proves its input."""

    def __init__(self, *args: Any, rows: list[Row], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: list[dict[str, float]] = []
        self._rows = rows
        self._seen = 0
        self._loss = 0.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's step of one micro-batch; its return value is that micro-batch's share of the step's loss."""
        self._check_micro_batch(inputs)
        self._check_denominator(num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss += loss.item()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called once a step (logging_steps=1), after the optimizer moved."""
        if "grad_norm" in logs:
            self.records.append(self._record(logs))
            self._loss = 0.0
        super().log(logs, start_time)

    def _record(self, logs: Mapping[str, float]) -> dict[str, float]:
        return {
            "step": len(self.records),
            "loss": self._loss,
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "target_tokens": targets_in(self._step_rows(len(self.records))),
            "logged_loss": float(logs["loss"]),
        }

    def _check_micro_batch(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Without its padding the micro-batch must be exactly the next rows."""
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
            row, length = self._rows[self._seen], int(mask.sum())
            same = ids[:length].tolist() == row["input_ids"] and labels[:length].tolist() == row["labels"]
            if not same or bool((labels[length:] != IGNORED).any()):
                raise RuntimeError(f"TRL trains on something else than row {self._seen + 1}")
            self._seen += 1

    def _check_denominator(self, num_items_in_batch: torch.Tensor | None) -> None:
        expected = targets_in(self._step_rows(len(self.records)))
        if num_items_in_batch is None or int(num_items_in_batch) != expected:
            raise RuntimeError(f"TRL divides by {num_items_in_batch}, the step has {expected} targets")

    def _step_rows(self, step: int) -> list[Row]:
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return self._rows[step * size : (step + 1) * size]


def sft_config(settings: Settings, accumulation: int, output: str) -> SFTConfig:
    """The settings in TRL's words, and everything off that would change the tokens, their order or the precision."""
    constant = "constant_with_warmup" if settings.warmup_steps else "constant"
    return SFTConfig(
        output_dir=output,
        # the rows as they are, in their order
        max_length=None,
        packing=False,
        padding_free=False,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.examples_per_step // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=settings.steps,
        # fp32 on the CPU; TRL's own defaults are bf16 and gradient checkpointing
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        # the update
        loss_type="nll",
        optim=settings.optim,
        learning_rate=settings.lr,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=constant if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps,
        seed=settings.seed,
        # every step is reported, and nothing else happens
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(settings: Settings, rows: list[Row], accumulation: int) -> list[dict[str, float]]:
    """One run of TRL's trainer; a record per step."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        trainer = RecordingTrainer(
            model=model,
            args=sft_config(settings, accumulation, output),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(settings.model),
            rows=rows,
        )
        trainer.train()
    if len(trainer.records) != settings.steps:
        raise RuntimeError(f"TRL made {len(trainer.records)} steps instead of {settings.steps}")
    return trainer.records


def main() -> None:
    """Read the folder, train, write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step (default 1)")
    arguments = parser.parse_args()
    settings = Settings.read(arguments.folder / "settings.json")
    if settings.examples_per_step % arguments.accumulation:
        parser.error(f"{settings.examples_per_step} examples do not divide into {arguments.accumulation} micro-batches")
    rows = read_rows(arguments.folder / "rows.jsonl", settings.steps * settings.examples_per_step)
    torch.set_num_threads(settings.threads)

    start = time.perf_counter()
    records = train(settings, rows, arguments.accumulation)
    run = {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate", "datasets")},
        "accumulation": arguments.accumulation,
        "seconds": round(time.perf_counter() - start, 2),
    }
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (arguments.folder / "trl.jsonl").write_text(lines, encoding="utf-8")
    (arguments.folder / "trl_run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
