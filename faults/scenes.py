"""What faults are thrown at: a tiny model, data, a configuration of a few hundred milliseconds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_models import write_llama
from tiny_tokenizers import CHATML

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} + 2?"},
            {"role": "assistant", "content": f"It is {number + 2}."},
        ]
    }
    for number in range(48)
]


@contextmanager
def scene(rows: Sequence[Any] = CHATS) -> Iterator[Path]:
    """A folder with `model` (31 thousand parameters, ChatML, 512 positions) and `train.jsonl`; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        os.environ["DEFT_CACHE"] = str(folder / "cache")
        write_llama(folder / "model", chat_template=CHATML)
        edit_json(folder / "model" / "config.json", max_position_embeddings=512)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def arguments(folder: Path, **settings: Any) -> list[str]:
    """`key=value` for a run of 12 steps in `folder`; `settings` (__ is a dot) replace the usual ones or join them."""
    usual = {
        "model": folder / "model",
        "data__train": folder / "train.jsonl",
        "output": folder / "run",
        "epochs": 3,
        "batch__examples": 12,
        "optimizer__lr": 1e-3,
        "device": "cpu",
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in {**usual, **settings}.items()]


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(output: str) -> str:
    """The line that deft ended with."""
    return next((line for line in reversed(output.splitlines()) if line.startswith("deft: ")), "")
