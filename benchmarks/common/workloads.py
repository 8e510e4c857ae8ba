"""Rows of token ids for the benchmarks: from the corpus where it is there, or generated.

A row is (prompt ids, learnt ids); ids below 3 are special, the last learnt one is EOS. Seeded: the same rows each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

PAD, UNKNOWN, EOS, FIRST = 0, 1, 2, 3
LONGEST = 1024
CHOICES = 64
"""So many tokens can follow any two of generated text: its entropy is log(64) nats."""


@dataclass(frozen=True, slots=True)
class Row:
    prompt: tuple[int, ...]
    learnt: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.learnt]

    @property
    def labels(self) -> list[int]:
        """As Hugging Face has them: not shifted, -100 where nothing is learnt."""
        return [-100] * len(self.prompt) + list(self.learnt)

    @property
    def size(self) -> tuple[int, int]:
        """Inputs that are needed, and targets."""
        return len(self.prompt) + len(self.learnt) - 1, len(self.learnt)


def rows(name: str, count: int, vocabulary: int, corpus: Path | None) -> list[Row]:
    """`count` rows of a workload; one of the corpus begins again where it ends."""
    if name in FILES:
        if corpus is None:
            raise FileNotFoundError(f"workload {name} needs the corpus: set DEFT_CORPUS")
        return list(islice(cycle(_from_corpus(name, vocabulary, corpus)), count))
    return list(islice({"generated": _instruct, "uniform": _uniform}[name](vocabulary), count))


def is_there(name: str, corpus: Path | None) -> bool:
    return name not in FILES or (corpus is not None and (corpus / "data" / FILES[name]).is_file())


FILES = {"gsm8k": "gsm8k_train.jsonl", "experts": "user_oriented_instructions.jsonl"}
ABOUT = {
    "gsm8k": "W1: GSM8K question and answer",
    "experts": "W1: 252 tasks written by experts (self-instruct)",
    "generated": "W1: generated, log-normal lengths of mean 256, 60 % prompt",
    "uniform": "W3: 1,024 tokens each, all learnt",
}


def _instruct(vocabulary: int) -> Iterator[Row]:
    """Log-normal lengths, the mean 256 and none above 1,024; 60 % of each is prompt. In batches of 8, padding to the
    longest makes three positions of a token."""
    draw = np.random.default_rng(0)
    while True:
        length = int(np.clip(draw.lognormal(4.8, 1.5), 16, LONGEST))
        ids = _text(draw, length - 1, vocabulary)
        cut = round(0.6 * length)
        yield Row(tuple(ids[:cut]), (*ids[cut:], EOS))


def _uniform(vocabulary: int) -> Iterator[Row]:
    """The first token of a row is predicted by nothing: it is the prompt."""
    draw = np.random.default_rng(0)
    while True:
        ids = _text(draw, LONGEST - 1, vocabulary)
        yield Row((ids[0],), (*ids[1:], EOS))


def _text(draw: np.random.Generator, length: int, vocabulary: int) -> list[int]:
    """A chain in which the last two tokens leave `CHOICES` for the next."""
    ids = [FIRST, FIRST + 1]
    for choice in draw.integers(0, CHOICES, length).tolist():
        ids.append(FIRST + (ids[-1] * 31 + ids[-2] * 17 + choice * 97) % (vocabulary - FIRST))
    return ids[2:]


def _from_corpus(name: str, vocabulary: int, corpus: Path) -> list[Row]:
    from tokenizers import Tokenizer

    folder = "qwen2.5" if vocabulary > 100_000 else "mistral-v1"
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizers" / folder / "tokenizer.json"))
    lines = (corpus / "data" / FILES[name]).read_text(encoding="utf-8").splitlines()
    found = []
    for prompt, answer in (_pair(json.loads(line)) for line in lines):
        left, right = (_plain(tokenizer.encode(text, add_special_tokens=False).ids) for text in (prompt, answer))
        if right and len(left) + len(right) < LONGEST:
            found.append(Row(tuple(left), (*right, EOS)))
    return found


def _pair(row: dict) -> tuple[str, str]:
    if "question" in row:
        return row["question"] + "\n", row["answer"]
    instance = row["instances"][0]
    return f"{row['instruction']}\n{instance['input']}\n", instance["output"]


def _plain(ids: list[int]) -> list[int]:
    """Without the ids that are special here; which token stands there instead is all the same to a random model."""
    return [max(each, FIRST) for each in ids]
