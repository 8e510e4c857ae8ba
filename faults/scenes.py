"""What faults are thrown at: a tiny model, data, a configuration of a few hundred milliseconds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tiny_models import write_llama
from tiny_tokenizers import CHATML

from faults.forking import deft

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


def ended(folder: Path, *words: str, before: Callable[[], object] = lambda: None, seconds: float = 120.0) -> Ended:
    """What `deft WORDS` came to. `before` runs first in its process."""
    log = folder / f"log-{next(_logs)}"
    child = deft(*words, log=log, before=before)
    code = child.wait(seconds)
    return Ended(code, child.output, child.computed)


@dataclass(frozen=True)
class Ended:
    """A command that is over, and the seconds that it computed."""

    code: int
    output: str
    computed: float

    @property
    def message(self) -> str:
        """What deft said last, from its `deft: ` on."""
        return self.output[self.output.rindex("deft: ") :].strip() if "deft: " in self.output else ""

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.output


_logs = count()
