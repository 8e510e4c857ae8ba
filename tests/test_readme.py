"""What the README says can be typed: its targets, verbs, keys and code exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import write_llama

from deft.commands.cli import app
from deft.data import shapes
from deft.run import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    inline = re.findall(r"`(deft [^`]+|make [^`]+)`", README)
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    return [line.split() for line in [*lines, *inline] if line.strip()]


def test_it_begins_with_the_two_commands() -> None:
    assert [words[:2] for words in commands()[:2]] == [["make", "demo"], ["make", "test"]]


def test_every_target_and_verb_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
    checked = 0
    for words in commands():
        known = {"make": targets, "deft": verbs}.get(words[0])
        if known is not None:
            assert words[1] in known, words
            checked += 1
    assert checked >= 6


def test_every_key_exists() -> None:
    keys = set(config.keys())
    named = [
        key
        for words in commands()
        if words[:2] == ["deft", "train"]
        for key in re.findall(r"([\w.]+)=", " ".join(words))
    ]
    assert len(named) >= 4
    assert set(named) <= keys
    for example in blocks("yaml"):
        config.make({"model": "a model", "data": "rows.jsonl"} | yaml.safe_load(example))


def test_its_python_is_python_and_its_shapes_are_all_there_are() -> None:
    for block in blocks("python"):
        ast.parse(block)
    rows = re.findall(r"^\| (\w+)(?: \(trlx\))? \|", README, re.MULTILINE)
    assert sorted(set(rows) & set(shapes.names())) == shapes.names()


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "model")
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(8)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = (block for block in blocks("python") if "deft.train" in block)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example.replace("Qwen/Qwen2.5-0.5B", "./model"), found)
    assert (tmp_path / "runs" / "gsm8k" / "final" / "config.json").is_file()
    assert len(found["batch"]) == 64
    assert found["loss"].item() > 0


def test_the_files_it_names_are_there() -> None:
    named = re.findall(r"`((?:src|tests|benchmarks|examples)/[\w./]+)`", README)
    assert len(named) >= 5
    assert all((ROOT / path).exists() for path in named)
