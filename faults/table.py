"""faults.json, and the README's table made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults.harness import Outcome, about_the_machine, ids, outcome_of

RECORD = Path(__file__).parent / "faults.json"
README = Path(__file__).parents[1] / "README.md"
MARKS = re.compile(r"(<!-- faults -->\n).*?(<!-- /faults -->)", re.DOTALL)


def record(outcomes: Sequence[Outcome], path: Path = RECORD) -> None:
    """Puts outcomes into faults.json, in place of earlier ones of the same id and scale; all others stay."""
    known, about = _known(path), about_the_machine()
    for outcome in outcomes:
        known["faults"].setdefault(outcome.id, {})[outcome.scale] = asdict(outcome) | {"measured": about}
    known["faults"] = {fault: known["faults"][fault] for fault in ids() if fault in known["faults"]}
    _write(path, known)


def record_peers(found: dict[str, Any], path: Path = RECORD) -> None:
    """Puts what became of transformers' Trainer into faults.json."""
    about = about_the_machine() | {"versions": found["versions"]}
    peers = {fault: entry | {"measured": about} for fault, entry in found["faults"].items()}
    _write(path, _known(path) | {"peers": peers})


def _known(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"faults": {}, "peers": {}}


def _write(path: Path, known: dict[str, Any]) -> None:
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")


def write_table(readme: Path = README, path: Path = RECORD) -> None:
    """Writes the table between the README's marks."""
    text = readme.read_text(encoding="utf-8")
    table = rows(json.loads(path.read_text()))
    readme.write_text(MARKS.sub(lambda found: found[1] + table + "\n" + found[2], text), encoding="utf-8")


def rows(known: dict[str, Any]) -> str:
    """The table in Markdown. A peer's cell stays empty where nothing was measured."""
    return "\n".join([*_about(known), *_cells(known)])


def _about(known: dict[str, Any]) -> list[str]:
    """When, on what, and what the columns count."""
    newest = max((_largest(scales)["measured"] for scales in known["faults"].values()), key=lambda about: about["date"])
    lines = [
        f"Points survived of those thrown. {newest['date']}, {newest['machine']}, torch {newest['versions']['torch']}."
    ]
    if known["peers"]:
        versions = next(iter(known["peers"].values()))["measured"]["versions"]
        lines += [
            f"HF Trainer: transformers {versions['transformers']} with its defaults, resumed by `get_last_checkpoint`,",
            "fewer points of the same kind (`faults/peers/trainer.py`).",
        ]
    return [*lines, ""]


def _largest(scales: dict[str, Any]) -> dict[str, Any]:
    """Of a fault's outcomes the one with the most points."""
    return max(scales.values(), key=lambda entry: entry["result"]["points"])


def _cells(known: dict[str, Any]) -> list[str]:
    lines = ["| fault | deft | control | HF Trainer | what you see |", "|---|---|---|---|---|"]
    for fault, scales in known["faults"].items():
        outcome = outcome_of({key: value for key, value in _largest(scales).items() if key != "measured"})
        peer = known["peers"].get(fault)
        cells = [
            f"{fault.upper()} {outcome.title}",
            f"{outcome.result.passed}/{outcome.result.points}",
            "GREEN" if outcome.control.is_green else "red",
            f"{peer['passed']}/{peer['points']}" if peer else "",
            f"`{_one_line(outcome.result.sees)}`" if outcome.result.sees else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
