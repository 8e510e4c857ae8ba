"""Eight short runs by two versions of the code, compared: metrics, evaluations, samples and weights, bit for bit.

    python tests/golden_runs.py --base COMMIT

The runs of both versions are made on this machine, since bf16 products differ between processors. Exits 1 where a run
differs. What may differ by time alone (`seconds`, `peak_bytes`, the model card's versions) is not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import write_llama
from tiny_tokenizers import byte_level
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

HERE = Path(__file__).parents[1]
BASE = "06b8859"
"""The commit before the rooms were rebuilt."""

UNCOMPARED = ("seconds", "peak_bytes")
WRITTEN = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}CALL {{ call['function'] | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _chat(number: int) -> dict[str, Any]:
    answers = [_assistant(f"It is {'so ' * (number % 5)}{number + 2}."), _assistant("You are welcome.")]
    return {"messages": [_user(f"What is {number} + {'1' * (number % 7)}?"), answers[0], _user("Thanks!"), answers[1]]}


def _tools(number: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number}}}
    result = {"role": "tool", "name": "add", "content": str(number + 2)}
    messages = [_user(f"Add 2 to {number}"), _assistant("", tool_calls=[call]), result, _assistant(f"{number + 2}!")]
    return {"messages": messages, "tools": [TOOL]}


ROWS = {
    "text": [{"text": f"The cat number {n} sat on the mat{' and slept' * (n % 6)} all day long.\n"} for n in range(40)],
    "dialogue": [[f"What is {n} + 2?", f" It is {n + 2}.", "\nSure?", " Yes" * (1 + n % 4)] for n in range(40)],
    "chat": [_chat(n) for n in range(40)],
    "tools": [_tools(n) for n in range(40)],
}
RUNS: Mapping[str, tuple[str, str, list[str]]] = {
    "text-fp32": ("llama", "text", ["precision=fp32"]),
    "text-bf16": ("llama", "text", ["precision=bf16", "microbatch_tokens=64", "max_length=48"]),
    "dialogue-fp32": ("llama", "dialogue", ["precision=fp32", "microbatch_tokens=96"]),
    "dialogue-bf16": ("neox", "dialogue", ["precision=bf16", "dropout=config"]),
    "chat-fp32": ("llama", "chat", ["precision=fp32", "dropout=config", "data.eval=0.1", "evaluate.every=4"]),
    "chat-bf16": ("llama", "chat", ["precision=bf16", "max_length=128", "optimizer.weight_decay=0.1"]),
    "tools-fp32": ("neox", "tools", ["precision=fp32", "microbatch_tokens=512", "loss.normalize=examples"]),
    "tools-bf16": ("llama", "tools", ["precision=bf16", "loss.normalize=examples", "batch.tokens=800"]),
}
"""Name -> architecture, rows, settings."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="the commit to compare with (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        base = here / "base"
        _git("worktree", "add", "--detach", "--quiet", str(base), arguments.base)
        try:
            _write_inputs(here)
            differences = [line for name in arguments.only for line in _compare(here, base, name)]
        finally:
            _git("worktree", "remove", "--force", str(base))
    print("\n".join(differences) or f"{len(arguments.only)} runs: equal to the bit")
    return 1 if differences else 0


def _compare(here: Path, base: Path, name: str) -> list[str]:
    """Runs `name` with both versions; a line for each file that differs."""
    outputs = [_train(here, source, name, here / f"{name}-{key}") for key, source in (("old", base), ("new", HERE))]
    old, new = (dict(_results(output)) for output in outputs)
    found = [f"{name}: {key} differs" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    print(f"{name}: {len(old)} results, {len(found)} differ", flush=True)
    return found


def _train(here: Path, source: Path, name: str, output: Path) -> Path:
    architecture, rows, settings = RUNS[name]
    usual = {
        "model": here / architecture,
        "data.train": here / f"{rows}.jsonl",
        "output": output,
        "epochs": 2,
        "batch.examples": 6,
        "optimizer.lr": 0.005,
        "device": "cpu",
        "evaluate.prompts": '["What is 1 + 2?"]',
        "evaluate.generate": "{max_new_tokens: 4}",
    }
    named = {setting.partition("=")[0] for setting in settings}
    given = [f"{key}={value}" for key, value in usual.items() if key not in named]
    if "batch.tokens" in named:
        given.remove("batch.examples=6")
    environment = os.environ | {
        "PYTHONPATH": str(source / "src"),
        "OMP_NUM_THREADS": "1",
        "DEFT_CACHE": str(here / f"cache-{output.name}"),
    }
    command = [sys.executable, "-m", "deft", "train", *given, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} with {source}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return output


def _results(output: Path) -> Iterator[tuple[str, Any]]:
    """The lines without clock and memory, and a digest of each file of final/ but the card and the list of digests."""
    for name in WRITTEN:
        lines = (output / name).read_text().splitlines() if (output / name).exists() else []
        for number, line in enumerate(map(json.loads, lines), 1):
            yield f"{name}:{number}", {key: value for key, value in line.items() if key not in UNCOMPARED}
    for path in sorted((output / "final").iterdir()):
        if path.name not in ("README.md", "manifest.json"):
            yield f"final/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()


def _write_inputs(here: Path) -> None:
    for name, rows in ROWS.items():
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_llama(here / "llama", chat_template=TEMPLATE, positions=512)
    tokenizer = byte_level(puts_bos=True)
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTNeoXForCausalLM(config).save_pretrained(here / "neox")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(here / "neox")


def _git(*words: str) -> None:
    subprocess.run(["git", "-C", str(HERE), *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
