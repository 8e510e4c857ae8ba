"""Small runs that are ended and taken up again: their settings, their folder, and what two of them differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_llama
from tiny_tokenizers import CHATML

from deft.run import config

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} + {'1' * (number % 7)}?"},
            {"role": "assistant", "content": f"It is {'so ' * (number % 5)}{number + 2}."},
        ]
    }
    for number in range(26)
]


def settings(folder: Path, output: str, **more: Any) -> dict[str, Any]:
    """Steps of 6, so 5 steps an epoch and the last of it short; several micro-batches a step; dropout on."""
    usual = {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "output": str(folder / output),
        "epochs": 2,
        "batch__examples": 6,
        "microbatch_tokens": 128,
        "optimizer__lr": 1e-2,
        "dropout": "config",
        "evaluate__every": 3,
        "evaluate__prompts": ["What is 1 + 1?"],
        "evaluate__generate": {"max_new_tokens": 4},
        "data__eval": 0.1,
        "checkpoint__every": 2,
        "device": "cpu",
    }
    return config.nested({**usual, **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path / "model", chat_template=CHATML)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in each.items() if key not in ("seconds", "peak_bytes")} for each in records]


def differences(folder: Path, one: str, other: str) -> list[str]:
    """What is not the same, to the bit, in two finished runs."""
    logs = [
        log
        for log in ("metrics", "eval", "samples")
        if any(lines(folder / name / f"{log}.jsonl") != lines(folder / one / f"{log}.jsonl") for name in (one, other))
    ]
    mine, theirs = (load_file(folder / name / "final" / "model.safetensors") for name in (one, other))
    weights = [key for key in mine if not torch.equal(mine[key].view(torch.uint8), theirs[key].view(torch.uint8))]
    return logs + weights
