"""B4: inputs that are not what they were when the run began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_models import write_llama
from tiny_tokenizers import CHATML

from faults import runs
from faults.harness import Result, Scale, tally
from faults.scenes import edit_json, scene

TITLE = "changed rows, template, tokenizer, model, seed: refused old -> new; learning rate, batch, length: applied"
FIGURE = 12


@dataclass(frozen=True)
class Change:
    """What is changed in the scene or the settings, and what deft has to say. Refused changes exit with 2."""

    name: str
    says: str
    refuses: bool = True
    edit: Callable[[Path], None] = lambda folder: None
    settings: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Path, Path], str] = lambda reference, run: ""


def run(scale: Scale) -> Result:
    return _thrown(CHANGES[:: scale.of(4, 1, 1)])


def control() -> Result:
    """Nobody compares."""

    def forget() -> None:
        import deft.run.resume

        deft.run.resume.EarlierStarts.changes = lambda *given: []

    return _thrown(CHANGES[:2], forget)


def _thrown(changes: tuple[Change, ...], before: Callable[[], None] = lambda: None) -> Result:
    sees = ""
    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        runs.killed(folder, "run", step=4)
        shutil.copytree(folder / "model", folder / "model-before")
        shutil.copy(folder / "train.jsonl", folder / "train-before.jsonl")
        points = []
        for number, change in enumerate(changes):
            shutil.copytree(folder / "run", folder / f"run-{number}")
            points.append(_start(folder, f"run-{number}", change, reference, before))
            sees = sees or _line(folder / f"run-{number}.log", change.says)
            shutil.rmtree(folder / "model")
            shutil.copytree(folder / "model-before", folder / "model")
            shutil.copy(folder / "train-before.jsonl", folder / "train.jsonl")
    return tally(points, sees)


def _start(folder: Path, output: str, change: Change, reference: Path, before: Callable[[], None]) -> str:
    change.edit(folder)
    child = runs.start(folder, output, before, **change.settings)
    code = child.wait()
    if code != (2 if change.refuses else 0) or change.says not in child.output or "Traceback" in child.output:
        return f"{change.name}: exit code {code}: {child.output[-400:]}"
    wrong = change.check(reference, folder / output)
    return f"{change.name}: {wrong}" if wrong else ""


def _line(log: Path, says: str) -> str:
    line = next((line for line in log.read_text().splitlines() if says in line), "")
    return line[line.index(says) :] if line else ""


def _edit(change: Callable[[list[str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = (folder / "train.jsonl").read_text().splitlines()
        change(lines)
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")

    return edit


def _swap(lines: list[str]) -> None:
    lines[4], lines[9] = lines[9], lines[4]


def _reworded(lines: list[str]) -> None:
    lines[16] = lines[16].replace("It is", "That is")


def _added() -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]})


def _other_model(folder: Path) -> None:
    import torch

    shutil.rmtree(folder / "model")
    seed, torch.manual_seed = torch.manual_seed, lambda number: seed(number + 1)
    try:
        write_llama(folder / "model", chat_template=CHATML)
    finally:
        torch.manual_seed = seed
    edit_json(folder / "model" / "config.json", max_position_embeddings=512)


def _other_template(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text(CHATML + "{# another #}")


def _other_tokenizer(folder: Path) -> None:
    edit_json(folder / "model" / "tokenizer.json", normalizer={"type": "NFC"})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _rate_doubles(reference: Path, run: Path) -> str:
    mine, theirs = _lines(reference), _lines(run)
    is_right = all(
        b["learning_rate"] == (a if step < 4 else {**a, "learning_rate": 2 * a["learning_rate"]})["learning_rate"]
        for step, (a, b) in enumerate(zip(mine, theirs, strict=True))
    )
    return "" if is_right else f"learning rates {[line['learning_rate'] for line in theirs]}"


def _each_row_once(reference: Path, run: Path) -> str:
    def sums(path: Path) -> dict[int, int]:
        found: dict[int, int] = {}
        for line in _lines(path):
            found[line["epoch"]] = found.get(line["epoch"], 0) + line["tokens"]
        return found

    steps = len(_lines(run))
    if sums(reference) != sums(run) or steps <= len(_lines(reference)):
        return f"tokens by epoch {sums(run)} instead of {sums(reference)} in {steps} steps"
    return ""


def _longer(reference: Path, run: Path) -> str:
    return "" if _lines(run)[-1]["epoch"] == 4 else "no longer than before"


CHANGES = (
    Change("row edited", "train.jsonl: changed since step 4: line 17", edit=_edit(_reworded)),
    Change("rows reordered", "train.jsonl: changed since step 4: other order from line", edit=_edit(_swap)),
    Change(
        "row removed", "train.jsonl: changed since step 4: line 17 removed", edit=_edit(lambda lines: lines.pop(16))
    ),
    Change(
        "row added",
        "train.jsonl: changed since step 4: line 49 added",
        edit=_edit(lambda lines: lines.append(_added())),
    ),
    Change("template", "template: its files changed since step 4", edit=_other_template),
    Change("tokenizer", "tokenizer: its files changed since step 4", edit=_other_tokenizer),
    Change("model", "model: its files changed since step 4", edit=_other_model),
    Change("seed", "seed: 0 -> 1", settings={"seed": 1}),
    Change("max length", "max_length: 512 -> 20 makes other rows", settings={"max_length": 20}),
    Change(
        "learning rate",
        "since step 4: optimizer.lr 0.001 -> 0.002 applies",
        refuses=False,
        settings={"optimizer__lr": 2e-3},
        check=_rate_doubles,
    ),
    Change(
        "batch",
        "since step 4: batch.examples 11 -> 5 applies from the next step on",
        refuses=False,
        settings={"batch__examples": 5},
        check=_each_row_once,
    ),
    Change("epochs", "since step 4: epochs 3 -> 5 applies", refuses=False, settings={"epochs": 5}, check=_longer),
)
