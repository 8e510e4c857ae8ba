"""Whole runs on several ranks: the bytes of one rank, gone on with by any number, and ended by whatever ends one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401  here, so that no rank has to
import pytest
from ranks import run, said
from resumed_runs import differences, folder, lines, settings
from rich.console import Console
from safetensors.torch import load_file, save_file

from deft.core import hardware
from deft.core.signals import handled
from deft.distributed import watch
from deft.run import config, forecast
from deft.run.reading import Session
from deft.run.train import train
from deft.training import badstep, step
from deft.training.state import TrainState

__all__ = ["folder"]


Fault = Callable[[int, int], Any]
ROW = r"\S+train\.jsonl:\d+( and \d+ more)?"


def job(folder: Path, output: str, fault: Fault = lambda rank, step: None, **more: Any) -> Callable[[int], Any]:
    """A run on the rank that calls it; `fault` is called with rank and step before each micro-batch."""
    usual = {"lanes": 2, "dropout": "off"}
    asked = config.make(settings(folder, output, **{**usual, **more}))

    def of_rank(rank: int) -> None:
        plain = step._backward

        def watched(state: TrainState, *given: Any) -> Any:
            return plain(state, *given) * (fault(rank, state.step + 1) or 1.0)

        step._backward = watched
        with handled() as signals:
            train(asked, Session(signals=signals, console=Console(width=200, color_system=None)))

    return of_rank


def whole(folder: Path, output: str, ranks: int, **more: Any) -> None:
    codes = run(folder / f"{output}-said", ranks, job(folder, output, **more))
    assert codes == [0] * ranks, [said(folder / f"{output}-said", rank) for rank in range(ranks)]


def stopping_after(number: int) -> Fault:
    """A signal to the last rank in a step."""

    def at_step(rank: int, step: int) -> None:
        if step == number and rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return at_step


@pytest.mark.parametrize("more", [{"precision": "fp32"}, {"adapter": {"name": "lora", "r": 4}}])
def test_two_ranks_then_one_then_two_again_have_the_bytes_of_one(folder: Path, more: dict[str, Any]) -> None:
    """Ended by signals to a rank that writes nothing, gone on with by another number; logs and weights, to the bit."""
    whole(folder, "alone", 1, **more)
    for ranks, until in ((2, 3), (1, 6), (2, 0)):
        place = folder / f"said-{until}"
        codes = run(place, ranks, job(folder, "several", stopping_after(until), **more))
        assert codes == [75 if until else 0] * ranks, [said(place, rank) for rank in range(ranks)]
        if until:
            assert f"saved step {until if ranks > 1 else until - 1}, run the same command again" in said(place)
        if ranks > 1:
            assert said(place, 1) == ""
    assert differences(folder, "several", "alone") == []


def test_the_least_memory_of_all_ranks_decides_once_and_is_not_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 may use less than rank 0, and the one rank that goes on far more: micro-batches stay as they were."""
    wide = 2**20
    made = forecast.Trace(0, 0, 0, 0, 0)
    monkeypatch.setattr(forecast, "trace", lambda _, batch, *rest: replace(made, peak_bytes=wide * len(batch.tokens)))
    memory = {"0": 2**40, "1": forecast.PROCESS + 100 * wide}
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: memory[os.environ.get("RANK", "0")])
    more: dict[str, Any] = {"epochs": 1, "lanes": 1, "microbatch_tokens": "auto"}
    assert run(folder / "said", 2, job(folder, "several", stopping_after(3), **more)) == [75, 75], said(folder / "said")
    whole(folder, "several", 1, **more)
    decided = config.load(str(folder / "several" / "config.yaml")).microbatch_tokens
    assert isinstance(decided, int)
    assert decided <= 128
    whole(folder, "alone", 1, epochs=1, lanes=1, microbatch_tokens=decided)
    assert differences(folder, "several", "alone") == []


def test_more_lanes_than_micro_batches_and_dropout(folder: Path) -> None:
    """Where a step has one micro-batch two ranks have two; what is dropped out is the same for three."""
    for name, ranks in (("two", 2), ("three", 3)):
        whole(folder, name, ranks, lanes="auto" if ranks == 2 else 2, dropout="config", microbatch_tokens=4096)
    assert differences(folder, "two", "three") == []


def test_a_signal_in_a_long_step_does_not_wait_for_its_end(folder: Path) -> None:
    """All ranks stop before the last of its four rounds, and it is done again, to the same bits."""
    more: dict[str, Any] = {"batch__examples": 8, "microbatch_tokens": 48}
    whole(folder, "alone", 1, **more)
    assert run(folder / "said", 2, job(folder, "several", stopping_after(2), **more)) == [75, 75]
    assert "saved step 1, run the same command again" in said(folder / "said")
    whole(folder, "several", 2, **more)
    assert differences(folder, "several", "alone") == []


def raising(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        raise ValueError("no luck")


def killed(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)


def first_killed(rank: int, step: int) -> None:
    if (rank, step) == (0, 3):
        os.kill(os.getpid(), signal.SIGKILL)


def halted(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGSTOP)


def hanging(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        watch.HANG, watch.TIMES = 2.0, 0
        time.sleep(1000.0)


@pytest.mark.parametrize(
    ("fault", "codes", "speaker", "what"),
    [
        (
            raising,
            [6, 70],
            0,
            rf"rank 1 failed first at step 3, {ROW}: ValueError: no luck",
        ),
        (
            killed,
            [6, -9],
            0,
            rf"rank 1 was lost at step 3, {ROW}: killed or stopped, or its machine is gone",
        ),
        (
            halted,
            [6, -9],
            0,
            rf"rank 1 was lost at step 3, {ROW}: killed or stopped, or its machine is gone",
        ),
        (hanging, [6, 6], 0, rf"rank 1 hangs at step 3, {ROW}: nothing is done for"),
        (first_killed, [-9, 6], 1, rf"rank 0 was lost at step 3, {ROW}"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(
    folder: Path, fault: Any, codes: list[int], speaker: int, what: str
) -> None:
    def at_last(rank: int, step: int) -> None:
        if step == 3:
            (folder / f"at-{rank}").write_text(str(time.monotonic()))
        fault(rank, step)

    both = [folder / "said" / f"rank-{rank}.txt" for rank in (0, 1)]
    assert run(folder / "said", 2, job(folder, "run", at_last)) == codes, [each.read_text() for each in both]
    assert time.monotonic() - float((folder / f"at-{1 - speaker}").read_text()) < 15
    assert re.search(what, said(folder / "said", speaker))
    if fault is hanging:  # where it was
        assert "in hanging" in (folder / "run" / "logs" / "rank-1.txt").read_text()
    if fault is not first_killed:
        assert (folder / "run" / "checkpoints" / "step-000002").is_dir()
        assert [record["step"] for record in lines(folder / "run" / "metrics.jsonl")] == [1, 2]


def test_what_is_wrong_with_the_input_is_said_once(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"messages": "none"}) + "\n")
    assert run(folder / "said", 2, job(folder, "run")) == [2, 6]
    assert "train.jsonl:1" in said(folder / "said")
    assert said(folder / "said", 1) == ""


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("optimizer.lr", "optimizer.lr: rank 1 has 0.02, and rank 0 0.01"),
        ("shard", "shard: rank 1 has 2, and rank 0 1"),
        ("train.jsonl", "the rows: rank 1 has"),
        ("model", "the model: rank 1 has"),
    ],
)
def test_ranks_that_are_asked_for_other_runs_are_refused(folder: Path, other: str, what: str) -> None:
    """By their run files, or by other files of the same names, as each machine may have its own."""
    elsewhere = folder / "elsewhere"
    shutil.copytree(folder / "model", elsewhere / "model")
    text = (folder / "train.jsonl").read_text()
    (elsewhere / "train.jsonl").write_text(text.replace("What", "Whet") if other == "train.jsonl" else text)
    if other == "model":
        weights = load_file(folder / "model" / "model.safetensors")
        save_file({name: each * 1.01 for name, each in weights.items()}, elsewhere / "model" / "model.safetensors")
    usual: dict[str, Any] = {"model": "model", "data": "train.jsonl", "shard": 1}
    changed = {"optimizer.lr": {"optimizer__lr": 2e-2}, "shard": {"shard": 2}}.get(other, {})
    asked = [job(folder, "run", **usual), job(folder, "run", **{**usual, **changed})]

    def of_rank(rank: int) -> None:
        os.chdir(elsewhere if rank else folder)
        asked[rank](rank)

    assert run(folder / "said", 2, of_rank) == [6, 2], said(folder / "said")
    assert what in said(folder / "said")
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_a_finished_run_is_found_by_all(folder: Path) -> None:
    whole(folder, "run", 2, epochs=1)
    whole(folder, "run", 2, epochs=1)
    assert "finished at step 5" in said(folder / "run-said")


@pytest.mark.parametrize("shard", [1, 2])
def test_a_script_trains_twice(folder: Path, shard: int) -> None:
    """Nothing that ranks tell each other in the first run is taken for an answer in the second."""
    asked = [job(folder, name, epochs=epochs, shard=shard) for name, epochs in (("one", 1), ("two", 2))]

    def of_rank(rank: int) -> None:
        for each in asked:
            each(rank)

    assert run(folder / "said", 2, of_rank) == [0, 0], said(folder / "said")
    whole(folder, "alone", 1)
    assert differences(folder, "two", "alone") == []


def test_a_bad_step_is_skipped_by_all(folder: Path) -> None:
    def spoil(rank: int, number: int) -> float:
        return float("nan") if (rank, number) == (1, 2) else 1.0

    more: dict[str, Any] = {"epochs": 1, "skip_bad_steps": 1}
    assert run(folder / "said", 2, job(folder, "run", spoil, **more)) == [0, 0], said(folder / "said")
    assert "skipped (1 of 1 at most)" in said(folder / "said")
    assert run(folder / "said", 2, job(folder, "stopped", spoil, epochs=1)) == [5, 5]
    assert "loss is not finite at step 2, rank 1, row" in said(folder / "said")
    found = badstep.read(folder / "stopped" / "bad-step-2")[0]
    rows = ", ".join(map(str, dict.fromkeys(found.origins[1])))
    assert f"{rows}; weights unchanged" in said(folder / "said")
    assert f"{rows}; weights unchanged" in (folder / "stopped" / "logs" / "rank-1.txt").read_text()


def test_a_signal_that_comes_when_all_have_agreed_to_go_on_ends_the_next_step(folder: Path) -> None:
    """A rank that left at once would be waited for by the others."""
    asked = job(folder, "run", epochs=1)

    def of_rank(rank: int) -> None:
        plain, reads = step._read, iter(range(1, 9))

        def read(*given: Any) -> step.StepNumbers:
            if next(reads) == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*given)

        step._read = read
        asked(rank)

    assert run(folder / "said", 2, of_rank) == [75, 75]
    assert "saved step 3, run the same command again" in said(folder / "said")
