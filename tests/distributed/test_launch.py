"""`deft launch`: the exit codes of ranks, and a rank that is killed once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resumed_runs import differences, folder, settings
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from deft.commands import launch
from deft.core.errors import InputError
from deft.run import config
from deft.run.train import train

__all__ = ["folder"]

LOSS = """
import os, signal

def killed_once(logits, targets, weights):
    from torch.nn.functional import cross_entropy

    if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        killed_once.calls += 1
        if killed_once.calls == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    return (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()

killed_once.calls = 0
"""


def failed(code: int, local_rank: int, timestamp: int) -> ProcessFailure:
    found = ProcessFailure(local_rank=local_rank, pid=1, exitcode=code, error_file="")
    found.timestamp = timestamp
    return found


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, 0),
        (ChildFailedError("deft", {0: failed(6, 0, 9), 1: failed(5, 1, 8)}), 5),
        (ChildFailedError("deft", {0: failed(75, 0, 9)}), 75),
        (ChildFailedError("deft", {1: failed(-9, 1, 9)}), 6),
        (SignalException("", 15), 75),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_ended_first(
    outcome: Exception | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(given: Any) -> None:
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(launch.torchrun, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.run(["--ranks", "2", "train", "run.yaml"]) == code


@pytest.mark.parametrize(("nodes", "expected"), [("1", None), ("2", "1"), ("1:4", "1")])
def test_several_machines_keep_no_store(nodes: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is started again would not find it."""
    monkeypatch.setattr(launch.torchrun, "run", lambda given: None)
    monkeypatch.setattr(launch.os, "environ", dict[str, str]())
    launch.run(["--nnodes", nodes, "--ranks", "2", "train", "run.yaml"])
    assert launch.os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == expected
    assert "OMP_NUM_THREADS" in launch.os.environ


def test_only_what_several_ranks_do_is_launched() -> None:
    with pytest.raises(InputError, match="'check' is no command of several ranks"):
        launch.parsed(["--ranks", "2", "check", "run.yaml"])


def test_a_run_goes_on_after_a_restart_to_the_same_bytes(folder: Path) -> None:
    """torchrun itself, two ranks, one of which is killed; a user's own loss."""
    (folder / "losses.py").write_text(LOSS)
    sys.path.insert(0, str(folder))
    more = {"dropout": "off", "lanes": 2, "checkpoint__every": 1}
    asked = {**settings(folder, "several", **more), "loss": {"name": "losses:killed_once"}}
    try:
        train(config.make({**asked, "output": str(folder / "alone")}))
    finally:
        sys.path.remove(str(folder))
    (folder / "run.yaml").write_text(config.as_yaml(config.make(asked)))
    command = [sys.executable, "-m", "deft", "launch", "--ranks", "2", "--max-restarts", "1", "train", "run.yaml"]
    paths = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 was lost at step" in done.stderr
    assert "resumed step" in done.stdout
    assert differences(folder, "several", "alone") == []
