"""F1: kinds of bad training file, through `deft check` from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bad_inputs import CASES, Case

from deft.data import shapes
from faults.harness import Result, Scale, tally
from faults.scenes import Ended, arguments, ended, scene

TITLE = "kinds of bad input: each named by file and line with its fix, or read and reported"
FIGURE = 80
SHOWN = "role misspelt"


def run(scale: Scale) -> Result:
    return _thrown(CASES[:: scale.of(8, 1, 1)])


def control() -> Result:
    """Refused rows are dropped and not told of."""

    def forget() -> None:
        each = shapes.Reader.each
        shapes.Reader.each = lambda self, rows: (found for found in each(self, rows) if not found.refused)

    return _thrown(CASES[:6], forget)


def _thrown(cases: tuple[Case, ...], before: Callable[[], None] = lambda: None) -> Result:
    with scene() as folder:
        found = [_check(case, folder, before) for case in cases]
    sees = [line for case, (_, output) in zip(cases, found, strict=True) for line in _shown(case, output)]
    return tally((failure for failure, _ in found), sees[0] if sees else "")


def _shown(case: Case, output: str) -> list[str]:
    lines = output.splitlines() if case.name == SHOWN else []
    return [line[line.index("train.jsonl:") :] for line in lines if "train.jsonl:4" in line]


def _check(case: Case, folder: Path, before: Callable[[], None]) -> tuple[str, str]:
    """What was wrong with the answer, "" if nothing; and what was printed."""
    data, found = folder / case.file, folder / "found.json"
    data.write_bytes(case.content)
    found.unlink(missing_ok=True)
    done = ended(folder, "check", *arguments(folder, data__train=data), "--json", str(found), before=before)
    if done.has_traceback:
        return f"{case.name}: a traceback", done.output
    failure = _refused(case, data, done) if case.kind == "error" else _reported(case, done.code, found)
    return failure, done.output


def _refused(case: Case, data: Path, done: Ended) -> str:
    words, where = " ".join(done.output.split()), f"{data}:{case.line}: " if case.line else f"{data}: "
    is_named = done.code == 2 and where in words and " ".join(case.says.split()) in words
    return "" if is_named else f"{case.name}: exit code {done.code}: {done.output[-300:]}"


def _reported(case: Case, code: int, found: Path) -> str:
    if code != 0:
        return f"{case.name}: exit code {code}"
    (source,) = json.loads(found.read_text())["sources"]
    fates = {fate for fate, count in source["fates"].items() if count and fate != "trained"}
    told = fates | set(source["symptoms"]) - {"encoded_apart"}
    return "" if told == ({case.report} if case.report else set()) else f"{case.name}: reported {sorted(told)}"
