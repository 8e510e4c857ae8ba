"""Real rows on a really pretrained model: the losses fall, the exports load, and say what `deft generate` says.

    python benchmarks/corpus_runs.py [--folder KEEP] [--only NAME]

Trains stories260K of the corpus on four of its files by the command line, then compares greedy answers of the exported
folder in plain transformers with those of `deft generate`. Prints a table, writes benchmarks/results/corpus_runs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "corpus_runs.json"
NEW_TOKENS = 48


@dataclass(frozen=True)
class Case:
    """A file of the corpus, how often it is seen, and what the trained model is asked."""

    file: str
    epochs: int
    prompts: tuple[str, ...]


CASES = (
    Case("tinystories_1000.json", 1, ("Once upon a time", "One day, a little girl named Lily")),
    Case("fastchat_dummy_conversation.json", 3, ("Who are you?", "Have a nice day!")),
    Case("tinker_conversations.jsonl", 10, ("What is the capital of France?", "Explain photosynthesis.")),
    Case("gsm8k_train.jsonl", 1, ("Natalia sold clips to 48 of her friends. How many is half of that?",)),
)


@dataclass(frozen=True)
class Found:
    """Mean losses of the first and last tenth of the steps, and whether all greedy answers are the same."""

    file: str
    steps: int
    seconds: float
    loss_first: float
    loss_last: float
    answers: int
    equal_answers: int


def run(case: Case, folder: Path) -> Found:
    """Train by the command line and compare the answers."""
    began = time.perf_counter()
    settings = {
        "model": CORPUS / "models" / "stories260K",
        "data.train": CORPUS / "data" / case.file,
        "output": folder,
        "epochs": case.epochs,
        "optimizer.lr": 1e-3,
    }
    deft("train", *(f"{key}={value}" for key, value in settings.items()))
    seconds = time.perf_counter() - began
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(losses) // 10)
    equal = [plain_answer(folder / "final", prompt) == deft_answer(folder / "final", prompt) for prompt in case.prompts]
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return Found(case.file, len(losses), round(seconds, 1), first, last, len(equal), sum(equal))


def deft(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "deft", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"deft {arguments[0]} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def deft_answer(folder: Path, prompt: str) -> str:
    return deft("generate", str(folder), prompt, "--set", f"max_new_tokens={NEW_TOKENS}").rstrip("\n")


def plain_answer(folder: Path, prompt: str) -> str:
    """What anybody gets from the folder with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template:
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        tokens = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    shown, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens["input_ids"][0], ids))
    return whole[len(shown) :].rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--only", help="files whose name holds this")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="deft-corpus-"))
    found = [run(case, folder / case.file) for case in CASES if not arguments.only or arguments.only in case.file]
    for each in found:
        print(
            f"{each.file:34} {each.steps:4} steps {each.seconds:6.1f} s   loss {each.loss_first:.3f} -> "
            f"{each.loss_last:.3f}   greedy answers equal {each.equal_answers}/{each.answers}"
        )
    if not arguments.only:
        RESULTS.parent.mkdir(exist_ok=True)
        versions = {name: version(name) for name in ("torch", "transformers", "deft-sft")}
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        report = {"machine": machine, "versions": versions, "runs": [asdict(each) for each in found]}
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    is_good = all(each.loss_last < each.loss_first and each.equal_answers == each.answers for each in found)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
