"""One arm of a peer: train on given rows, write a line per optimizer step. Knows nothing of deft.

    python benchmarks/cpu/peer_side.py FOLDER ARM OUT [--gate fp32|bf16]

Runs in an environment that has transformers and, for its arms, TRL. FOLDER holds `model/` (config, weights, tokenizer),
`rows.jsonl` ({"input_ids", "labels"} in the order of consumption) and `settings.json`. OUT gets `steps.jsonl`, and
`memory.json`: resident bytes after the imports, and the most up to each step.

With --gate one step is made over all rows, without an update, and OUT gets `gradients.safetensors` and `loss.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.machine import peak_bytes
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

Row = dict[str, list[int]]
IGNORED = -100
PACK_TOKENS = 2048
HEAD_CHUNKS = 8
"""torchtune's number of output chunks."""

TRL_ARMS: dict[str, dict[str, Any]] = {
    "trl_default": {},
    "trl_lora": {},
    "trl_grouped": {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False},
    "trl_packed": {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": PACK_TOKENS,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "bf16": True,
    },
}
"""What each changes in TRL's defaults."""


class Steps:
    """Writes what each optimizer step was, as it ends."""

    def __init__(self, out: Path) -> None:
        self.file = (out / "steps.jsonl").open("w", encoding="utf-8", buffering=1)
        self.memory, self.out = {"baseline_bytes": peak_bytes()}, out
        self.tokens = self.targets = 0
        self.loss = self.first = 0.0
        self.began = time.perf_counter()
        self.step = 0

    def saw(self, tokens: int, targets: int, loss: float) -> None:
        self.tokens, self.targets, self.loss = self.tokens + tokens, self.targets + targets, self.loss + loss

    def ended(self) -> None:
        now = time.perf_counter()
        self.first = self.first or time.time()
        self.step += 1
        record = {"step": self.step, "seconds": now - self.began, "tokens": self.tokens, "loss": self.loss}
        self.file.write(json.dumps({**record, "target_tokens": self.targets}) + "\n")
        self.memory["peak_bytes"] = peak_bytes()
        (self.out / "memory.json").write_text(json.dumps(self.memory))
        self.tokens = self.targets = 0
        self.loss = 0.0
        self.began = time.perf_counter()


def seen(inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Real tokens and targets of a micro-batch, read from its mask and labels."""
    mask = inputs.get("attention_mask")
    tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return tokens, int((inputs["labels"][..., 1:] != IGNORED).sum())


def counting(base: type[Trainer]) -> type[Trainer]:
    """The trainer, unchanged in what it computes; it tells `steps` what it was given."""

    class Counting(base):
        steps: Steps

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            sizes = seen(inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.steps.saw(*sizes, float(loss))
            return loss

    return Counting


class Ends(TrainerCallback):
    def __init__(self, steps: Steps, gate: Path | None) -> None:
        self.steps, self.gate = steps, gate

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self.steps.began = time.perf_counter()

    def on_pre_optimizer_step(self, *arguments: Any, model: Any, **more: Any) -> None:
        if self.gate:
            save_gate(self.gate, model, self.steps.loss)

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.steps.ended()


def save_gate(out: Path, model: torch.nn.Module, loss: float) -> None:
    gradients = {name: p.grad.float().contiguous() for name, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, out / "gradients.safetensors")
    (out / "loss.json").write_text(json.dumps(loss))


def common_arguments(settings: Mapping[str, Any], out: Path, examples_at_once: int) -> dict[str, Any]:
    """What all trainers share: the update, one step after another, nothing saved or reported."""
    return {
        "output_dir": str(out / "trainer"),
        "use_cpu": True,
        "max_steps": settings["steps"],
        "gradient_accumulation_steps": max(1, settings["examples_per_step"] // examples_at_once),
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "adam_epsilon": settings["eps"],
        "weight_decay": 0.0,
        "max_grad_norm": settings["clip"],
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def trl(arm: str, folder: Path, out: Path, settings: dict[str, Any], rows: list[Row], gate: str | None) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = Steps(out)
    at_once = 8
    arguments = {"train_sampling_strategy": "sequential", **TRL_ARMS[arm]}
    if arm == "trl_packed":
        tokens = sum(len(row["input_ids"]) for row in rows) * settings["examples_per_step"] / len(rows)
        arguments["gradient_accumulation_steps"] = max(1, round(tokens / PACK_TOKENS))
    if gate:
        at_once = len(rows)
        arguments |= {"bf16": gate == "bf16", "gradient_accumulation_steps": 1}
        if arm != "trl_packed":
            arguments["per_device_train_batch_size"] = at_once
    if settings["examples_per_step"] < at_once:
        arguments["per_device_train_batch_size"] = at_once = settings["examples_per_step"]
    if not settings.get("bf16", True):
        arguments["bf16"] = False
    trainer = counting(SFTTrainer)(
        **trl_model(arm, folder, settings),
        args=SFTConfig(**(common_arguments(settings, out, at_once) | arguments)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Ends(steps, out if gate else None)],
    )
    if gate and arm == "trl_packed" and len(trainer.train_dataset) != 1:
        raise RuntimeError(f"the gate's rows make {len(trainer.train_dataset)} packs instead of one")
    trainer.steps = steps
    trainer.train()


def trl_model(arm: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The model is named, not given, so that TRL loads it in the precision that it loads models in."""
    if arm != "trl_lora":
        return {"model": str(folder / "model")}
    from peft import LoraConfig, PeftModel

    if "start" in settings:
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        return {"model": PeftModel.from_pretrained(base, settings["start"], is_trainable=True)}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings["lora"])
    return {"model": str(folder / "model"), "peft_config": config}


def hugging_face(folder: Path, out: Path, settings: dict[str, Any], rows: list[Row], gate: str | None) -> None:
    """transformers' Trainer with its defaults: fp32, batches of 8 padded to the longest."""
    steps = Steps(out)
    at_once = len(rows) if gate else 8
    arguments = common_arguments(settings, out, at_once) | {
        "per_device_train_batch_size": at_once,
        "train_sampling_strategy": "sequential",
        "bf16": gate == "bf16",
    }
    trainer = counting(Trainer)(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=padded,
        callbacks=[Ends(steps, out if gate else None)],
    )
    trainer.steps = steps
    trainer.train()


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    ones = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    labels = filled("labels", IGNORED)
    return {"input_ids": filled("input_ids", 0), "labels": labels, "attention_mask": torch.tensor(ones)}


def loop_packed(folder: Path, out: Path, settings: dict[str, Any], rows: list[Row], gate: str | None) -> None:
    """A plain loop as torchtune's recipe runs on a CPU: packs of 2,048, SDPA under a block mask, logits of the targets
    in chunks, fused AdamW, all in fp32."""
    steps = Steps(out)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    betas = tuple(settings["betas"])
    adamw = torch.optim.AdamW(model.parameters(), lr=settings["lr"], betas=betas, weight_decay=0.0, fused=True)
    per_step = len(rows) if gate else settings["examples_per_step"]
    steps.began = time.perf_counter()
    for start in range(0, settings["steps"] * per_step, per_step):
        members = rows[start : start + per_step]
        targets = sum(label != IGNORED for row in members for label in row["labels"][1:])
        for pack in packs(members):
            loss = pack_loss(model, pack) / targets
            loss.backward()
            steps.saw(sum(len(row["input_ids"]) for row in pack), sum(seen_targets(row) for row in pack), loss.item())
        if gate:
            save_gate(out, model, steps.loss)
            return
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        adamw.step()
        adamw.zero_grad()
        steps.ended()


def packs(rows: list[Row]) -> Iterator[list[Row]]:
    """Greedily in their order, as torchtune packs."""
    pack: list[Row] = []
    for row in rows:
        if sum(len(each["input_ids"]) for each in [*pack, row]) > PACK_TOKENS:
            yield pack
            pack = []
        pack.append(row)
    yield pack


def pack_loss(model: Any, pack: list[Row]) -> torch.Tensor:
    """The summed negative log-likelihood of a pack's targets."""
    lengths = torch.tensor([len(row["input_ids"]) for row in pack])
    document = torch.arange(len(pack)).repeat_interleave(lengths)
    visible = (document[:, None] == document[None]).tril()
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    ids = torch.tensor([token for row in pack for token in row["input_ids"]])
    labels = torch.tensor([label for row in pack for label in [*row["labels"][1:], IGNORED]])
    hidden = model.model(input_ids=ids[None], attention_mask=visible[None, None], position_ids=positions[None])
    rows = hidden.last_hidden_state[0][labels != IGNORED]
    chunks = zip(rows.chunk(HEAD_CHUNKS), labels[labels != IGNORED].chunk(HEAD_CHUNKS), strict=True)
    losses = [functional.cross_entropy(model.lm_head(part).float(), own, reduction="sum") for part, own in chunks]
    return torch.stack(losses).sum()


def seen_targets(row: Row) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("arm", choices=[*TRL_ARMS, "hf_padded", "loop_packed_fp32"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gate", choices=("fp32", "bf16"))
    given = parser.parse_args()
    settings = json.loads((given.folder / "settings.json").read_text(encoding="utf-8"))
    lines = (given.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    torch.set_num_threads(settings["threads"])
    if given.gate:
        settings |= {"steps": 1, "clip": 0.0, "examples_per_step": len(rows)}
    if given.arm in TRL_ARMS:
        trl(given.arm, given.folder, given.out, settings, rows, given.gate)
    elif given.arm == "hf_padded":
        hugging_face(given.folder, given.out, settings, rows, given.gate)
    else:
        loop_packed(given.folder, given.out, settings, rows, given.gate)


if __name__ == "__main__":
    main()
