"""`deft demo`: the main job on built-in data. A base model learns to read about people, then learns to answer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deft.commands.demo import base
from deft.commands.demo import data as demo_data
from deft.commands.demo.data import DemoData, Question
from deft.core import files
from deft.encoding.render.template import plain
from deft.evaluation.generate import complete
from deft.run import config
from deft.run import folder as run_folder
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config

SHOWN = 6

VOCAB_SIZE = 1024
"""At most: the text has fewer pieces. Every name is one token, which this small a model needs to know people apart."""

BASE = {"epochs": 2, "batch__examples": 32, "optimizer__lr": 4e-3, "max_length": 256, "precision": "fp32"}
"""Settings that turn random weights and `DemoData.texts` into a base model that knows the facts and cannot answer."""

CHAT = {"epochs": 4, "batch__examples": 16, "optimizer__lr": 5e-4, "max_length": 256, "precision": "fp32"}
"""Settings that turn that base and `DemoData.dialogues` into a model that answers. A higher rate overfits."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says to questions, and the share of answers that are right."""

    texts: tuple[str, ...]
    accuracy: float


def run(output: str) -> None:
    """Trains the base on plain text, fine-tunes it on dialogues, and asks both the held-out questions.

    Writes data/, untrained/, base/ (a run), chat/ (a run) and demo.json under `output`.
    """
    session = Session(owns_process=True)
    folder = run_folder.output_folder(output)
    run_folder.make_folder(folder)
    began = time.perf_counter()
    made = demo_data.build()
    _write_data(folder / "data", made)
    base.write_base(folder / "untrained", base.build_tokenizer(made.texts, VOCAB_SIZE))

    session.say(f"1. Reading: {len(made.texts)} plain texts about {len(made.facts)} people, every token learnt.")
    reader = _train(folder, "untrained", "texts.jsonl", "base", BASE, session)
    before = _ask(reader, made.heldout)
    session.say(f"\n2. Answering: {len(made.dialogues)} dialogues; {demo_data.HELD_OUT} people occur in none of them.")
    answerer = _train(folder, "base/final", "dialogues.jsonl", "chat", CHAT, session)
    after, taught = _ask(answerer, made.heldout), _ask(answerer, made.taught)

    _show(session.console, made, before, after)
    found = {
        "heldout_questions": len(made.heldout),
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "accuracy_on_taught_people": taught.accuracy,
        "seconds": round(time.perf_counter() - began, 1),
    }
    files.write_json(folder / "demo.json", found)
    session.say(
        f"Questions about people whom no dialogue mentions: {before.accuracy:.1%} right before, "
        f"{after.accuracy:.1%} after ({found['seconds']:.0f} s in all).\n"
        "The dialogues taught it to answer; the facts it had read before.\n"
        f"Report: {answerer.folder / 'report.html'}\nTalk to it: deft chat {answerer.folder / 'final'}"
    )


def _write_data(folder: Path, made: DemoData) -> None:
    """The rows as files, so that a reader can look at them and train on them by hand."""
    files.make_folder(folder)
    for name, rows in (("texts", [{"text": text} for text in made.texts]), ("dialogues", made.dialogues)):
        files.write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _train(folder: Path, model: str, data: str, output: str, settings: Mapping[str, Any], session: Session) -> Run:
    values = {"model": str(folder / model), "data": str(folder / "data" / data), "output": str(folder / output)}
    return run_config(config.make(config.nested({**settings, **values})), session)


def _ask(run: Run, questions: Sequence[Question]) -> Answers:
    """Greedy answers, through the plain template for both models: the base has none of its own."""
    tokenizer = run.tokenizer
    shown = [
        tokenizer.apply_chat_template(
            q.messages, chat_template=plain(False), tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    texts = [text.strip() for text in complete(run.model, tokenizer, shown, generate={"max_new_tokens": 24})]
    right = [demo_data.score(text, question.answer) for text, question in zip(texts, questions, strict=True)]
    return Answers(tuple(texts), sum(right) / len(right))


def _show(console: Console, made: DemoData, before: Answers, after: Answers) -> None:
    table = Table(title="Held-out questions")
    for column in ("question", "before", "after", "truth"):
        table.add_column(column)
    step = max(1, len(made.heldout) // SHOWN)
    for index in range(0, step * SHOWN, step):
        question = made.heldout[index]
        texts = (question.messages[-1]["content"], before.texts[index], after.texts[index], question.answer)
        table.add_row(*(" ".join(text.split())[:60] for text in texts))
    console.print(table)
