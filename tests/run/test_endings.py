"""Whatever ends the loop, the steps that are done are saved first, and the next start goes on to the same bits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import differences, folder, settings
from rich.console import Console

from deft.core.errors import MemoryShort, UserCodeError
from deft.evaluation.samples import MetricFn
from deft.run import config
from deft.run import train as run
from deft.run.reading import Session
from deft.tracking.tracker import Trackers
from deft.training import checkpoint, resuming, step
from deft.training.optim.adamw import AdamW

__all__ = ["folder"]


class Unknown(BaseException):
    """Nothing that deft knows."""


def well(outputs: list[str], **_: Any) -> dict[str, list[float]]:
    """It draws a random number, of those that dropout is drawn from."""
    torch.rand(1)
    return {"length": [float(len(output)) for output in outputs]}


def train(folder: Path, output: str, metric_fn: MetricFn = well, **more: Any) -> str:
    """Runs until it is done or something ends it; what was said."""
    made = config.make(settings(folder, output, **{"checkpoint__every": 100, **more}))
    said = io.StringIO()
    try:
        run.train(made, Session(metric_fn=metric_fn, console=Console(file=said, width=300)))
    finally:
        print(said.getvalue())
    return said.getvalue()


def saved(folder: Path) -> list[int]:
    return checkpoint.steps(folder / "cut" / "checkpoints")


@pytest.fixture
def whole(folder: Path) -> Path:
    """The folder, with a run that nothing ended."""
    train(folder, "whole")
    return folder


def at_call(number: int, raised: BaseException, plain: Any = lambda *given, **named: None) -> Any:
    """A function that does what `plain` does, and raises at the end of a call of it."""
    calls = iter(range(1, sys.maxsize))

    def called(*given: Any, **named: Any) -> Any:
        result = plain(*given, **named)
        if next(calls) == number:
            raise raised
        return result

    return called


def at_step(number: int, raised: BaseException) -> Any:
    """`Trackers.write`, which raises once the record of a step is written."""
    plain = Trackers.write

    def write(tracks: Trackers, kind: str, record: Mapping[str, Any]) -> None:
        plain(tracks, kind, record)
        if (kind, record["step"]) == ("step", number):
            raise raised

    return write


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ZeroDivisionError("mine"), UserCodeError),
        (SystemExit(0), UserCodeError),
        (MemoryError(), MemoryShort),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Unknown(), Unknown),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_what_ends_an_evaluation_loses_no_step(
    raised: BaseException, seen: type[BaseException], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(seen):
        train(whole, "cut", at_call(2, raised, well))
    assert saved(whole) == [3]
    assert "saved step 3, run it again to go on" in capsys.readouterr().out
    assert "resumed step 3 of 10" in train(whole, "cut")
    assert differences(whole, "whole", "cut") == []


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), KeyboardInterrupt()], ids=["a bug of ours", "Ctrl-C"])
@pytest.mark.parametrize("where", ["in a step", "between two steps"])
def test_what_ends_the_loop_elsewhere_loses_no_step(
    where: str, raised: BaseException, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if where == "in a step":
            patch.setattr(step, "_read", at_call(5, raised, step._read))
        else:
            patch.setattr(Trackers, "write", at_step(4, raised))
        with pytest.raises(type(raised)):
            train(whole, "cut")
    assert saved(whole) == [4]
    train(whole, "cut")
    assert differences(whole, "whole", "cut") == []


def test_an_evaluation_that_was_due_when_the_run_ended_is_made_up_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trackers, "write", at_step(3, RuntimeError("a bug")))
        with pytest.raises(RuntimeError):
            train(whole, "cut")
    assert saved(whole) == [3]
    train(whole, "cut")
    assert differences(whole, "whole", "cut") == []


def test_an_update_that_was_broken_off_is_not_saved(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights have had it and others not: the run goes on from the save before."""
    plain, updates = AdamW._update, []
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "_update", lambda *given: (plain(*given), updates.append(1)))
        train(whole, "one", steps=1)
        patch.setattr(AdamW, "_update", at_call(3 * len(updates) + 2, KeyboardInterrupt(), plain))
        with pytest.raises(KeyboardInterrupt):
            train(whole, "cut", checkpoint__every=2)
    assert saved(whole) == [2]
    train(whole, "cut", checkpoint__every=2)
    assert differences(whole, "whole", "cut") == []


def test_where_saving_fails_too_both_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resuming, "take", at_call(1, RuntimeError("the device is lost")))
    with pytest.raises(UserCodeError, match="metric_fn raised ZeroDivisionError: mine"):
        train(folder, "cut", at_call(2, ZeroDivisionError("mine"), well))
    assert "step 3 could not be saved (RuntimeError: the device is lost)" in capsys.readouterr().out


OWN = """import os
from pathlib import Path

def plain(logits, targets, weights):
    return -(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0] * weights).sum()

def failing(logits, targets, weights):
    log = Path(os.environ["METRICS"])
    if log.exists() and len(log.read_text().splitlines()) >= 2:
        raise ValueError("as it is the third step")
    return plain(logits, targets, weights)
"""


def test_a_users_own_loss_trains_as_deft_s_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_own_loss.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    train(folder, "nll", precision="fp32")
    train(folder, "own", precision="fp32", loss__name="my_own_loss:plain")
    ours, theirs = (run.jsonl.read(folder / name / "metrics.jsonl") for name in ("nll", "own"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-4)


def test_the_command_names_a_user_s_function_and_says_how_to_go_on(folder: Path) -> None:
    (folder / "my_own_loss.py").write_text(OWN)
    given = [f"model={folder / 'model'}", f"data={folder / 'train.jsonl'}", f"output={folder / 'cut'}"]
    environment = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "deft", "train", *given, "batch.examples=6", "loss.name=my_own_loss:failing"],
        env={**os.environ, **environment, "METRICS": str(folder / "cut" / "metrics.jsonl")},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 2, done.stderr
    first, *rest = done.stderr[done.stderr.index("deft: ") :].splitlines()
    assert first == "deft: my_own_loss:failing raised ValueError: as it is the third step"
    assert f'File "{folder / "my_own_loss.py"}", line 10, in failing' in rest[0]
    assert len([line for line in rest if line.startswith("  File")]) == 1, "no line of deft's own"
    assert "saved step 2, run it again to go on" in done.stdout
    assert not [*folder.glob("**/deft-crash-*")]
    assert saved(folder) == [2]
