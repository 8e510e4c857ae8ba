"""Trackers: each gets every record, and none ends a run."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import write_llama

from deft.run import config
from deft.run.reading import Session
from deft.run.train import train
from deft.tracking.console import ConsoleTracker
from deft.tracking.jsonl import Logs
from deft.tracking.tracker import TrackedRun, Trackers


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begin(self, run: TrackedRun) -> None:
        self.calls.append(run)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        self.calls.append((kind, dict(record)))

    def finish(self) -> None:
        self.calls.append("finish")


class Failing:
    """It can do nothing right."""

    raised: BaseException = ConnectionError("no\nroute")

    def begin(self, run: TrackedRun) -> None:
        raise self.raised

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        raise self.raised

    def finish(self) -> None:
        raise self.raised


RUN = TrackedRun(Path("run"), {"seed": 0}, steps=3)


def test_an_error_of_a_tracker_is_told_once_by_name_and_the_others_go_on() -> None:
    said: list[str] = []
    before, after = Told(), Told()
    with Trackers([before, Failing(), after], said.append).following(RUN) as tracks:
        tracks.write("step", {"step": 1})
        tracks.write("eval", {"step": 1, "loss": 2.0})
    expected = [RUN, ("step", {"step": 1}), ("eval", {"step": 1, "loss": 2.0}), "finish"]
    assert before.calls == after.calls == expected
    assert said == ["warning: the tracker Failing failed (ConnectionError: no route); training goes on"]


def test_trackers_are_finished_when_the_run_fails_and_its_error_stays() -> None:
    told = Told()
    with (
        pytest.raises(ZeroDivisionError),
        Trackers([Failing(), told], lambda text: None).following(RUN),
    ):
        raise ZeroDivisionError
    assert told.calls == [RUN, "finish"]


def test_ctrl_c_in_a_tracker_is_not_an_error_of_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "raised", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        Trackers([Failing()], print).write("step", {"step": 1})


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(ConsoleTracker, "_step", fail)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f" {n}."}) + "\n" for n in range(8)))
    given = {"model": str(write_llama(tmp_path / "model")), "data": str(rows), "output": str(tmp_path / "run")}
    said = io.StringIO()
    made = config.make({**given, "batch": {"examples": 4}, "epochs": 2})
    run = train(made, Session(console=Console(file=said, width=300)))
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == len(run.metrics) == 4
    assert said.getvalue().count("the tracker ConsoleTracker failed (ValueError: a bug)") == 1


def test_each_kind_of_record_has_its_file(tmp_path: Path) -> None:
    logs = Logs.of(tmp_path)
    for kind, record in (("step", {"step": 1}), ("eval", {"step": 1, "loss": 0.5}), ("sample", {"step": 1})):
        logs.write(kind, record)
    logs.flush()
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {"metrics.jsonl": {"step": 1}, "eval.jsonl": {"step": 1, "loss": 0.5}, "samples.jsonl": {"step": 1}}


def test_an_evaluation_and_its_first_samples_are_shown() -> None:
    said = io.StringIO()
    shown = ConsoleTracker(Console(file=said, width=100), began=0.0, loading=1.5)
    shown.begin(RUN)
    shown.write("eval", {"step": 3, "loss": 0.25})
    for step in (3, 4):
        for n in range(5):
            shown.write("sample", {"step": step, "prompt": f"p{n}", "output": "a"})
    shown.finish()
    samples = [f"  'p{n}' -> 'a'" for n in range(3)]
    assert said.getvalue().splitlines() == ["step 3: loss 0.2500", *samples, "step 4: ", *samples]
