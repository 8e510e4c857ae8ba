"""What deft hands over: its folder is the policy and the reference model of TRL's DPOTrainer, with nothing in between.

    pip install trl
    python examples/dpo_after_sft.py runs/my-run/final

Loads the folder twice by plain transformers, takes two DPO steps on the CPU on a handful of preferences, prints the
losses and rewards. Before the first update policy and reference are the same function, so the first loss is ln 2 and
the first rewards are 0; anything else means that the folder does not load to the same function twice (weights missing
from the file and made up at random, attention dropout left on). Exits with 1 if the first loss is not ln 2 or if
anything is not finite.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

TOLERANCE = 1e-3
SHOWN = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")

PREFERENCES = (
    ("What is the capital of France?", "Paris.", "I would rather talk about something else."),
    ("Write one sentence about the sea.", "The sea was calm, and a small boat came home.", "sea sea sea sea"),
    ("Tom has 3 apples and eats one. How many are left?", "Two apples are left.", "Tom has five apples now."),
    ("Say something kind.", "You did your best today, and that is enough.", "No."),
)
"""(question, better answer, worse answer)"""


def preferences(chat: bool) -> Dataset:
    """The preferences in TRL's form: messages where the tokenizer has a chat template, else plain strings."""
    if not chat:
        return Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in PREFERENCES])
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in PREFERENCES
        ]
    )


def load(folder: str) -> PreTrainedModel:
    """The exported model, in fp32, as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dpo(folder: str, tokenizer: PreTrainedTokenizerBase, steps: int, lr: float) -> list[dict[str, Any]]:
    """`steps` DPO steps from the folder as policy against the folder as reference; TRL's log line of each."""
    with tempfile.TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model=load(folder),
            ref_model=load(folder),
            args=DPOConfig(
                output_dir=output,
                max_steps=steps,
                learning_rate=lr,
                lr_scheduler_type="constant",
                per_device_train_batch_size=len(PREFERENCES),
                logging_steps=1,
                logging_nan_inf_filter=False,  # on, it logs a loss of 0 where it is NaN
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=preferences(chat=tokenizer.chat_template is not None),
            processing_class=tokenizer,
        )
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def problems(lines: list[dict[str, Any]], steps: int) -> list[str]:
    """Why the hand-over failed; empty if it did not."""
    if len(lines) != steps:
        return [f"{len(lines)} steps were logged instead of {steps}"]
    found = [
        f"step {step}: {name} is {line[name]}"
        for step, line in enumerate(lines, start=1)
        for name in (*SHOWN, "grad_norm")
        if not math.isfinite(line[name])
    ]
    if not abs(lines[0]["loss"] - math.log(2)) <= TOLERANCE:
        found.append(f"the first loss is {lines[0]['loss']:.6f}, not ln 2 = {math.log(2):.6f}")
    return found


def main() -> int:
    """Run and print; 0 if the folder is a sound policy and reference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="an exported model: the final/ of a deft run")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    lines = dpo(arguments.folder, tokenizer, arguments.steps, arguments.lr)
    print("preferences as", "plain strings" if tokenizer.chat_template is None else "chats in the model's template")
    for step, line in enumerate(lines, start=1):
        print(f"step {step}  " + "  ".join(f"{name} {line[name]:.6f}" for name in SHOWN))
    for problem in (found := problems(lines, arguments.steps)):
        print("FAILED:", problem, file=sys.stderr)
    if not found:
        print(f"ok: the first loss is ln 2 = {math.log(2):.6f} within {TOLERANCE}, everything is finite")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
