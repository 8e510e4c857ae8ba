"""Law 9: 10 steps = 4 steps, kill, 6 steps, bit for bit."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import differences, folder, lines, settings
from rich.console import Console

from deft.core.errors import InputError
from deft.run import config
from deft.run import train as run
from deft.run.reading import Session
from deft.tracking import jsonl
from deft.training import checkpoint, pieces, randomness, resuming
from deft.training.checkpoint import Checkpoint

__all__ = ["folder"]
STEPS = 10


class Killed(BaseException):
    """The process is gone: nothing that was meant to happen after this happens."""


def train(folder: Path, output: str, stop: int | None = None, **more: Any) -> str:
    """Runs until it is done or killed after step `stop`; what was said."""
    said = io.StringIO()
    steps = run.train_steps

    def stopping(*given: Any, **named: Any) -> Iterator[Any]:
        for record in steps(*given, **named):
            yield record
            if record.step == stop:
                patch.setattr(resuming, "save_rest", lambda *given: None)
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train_steps", stopping)
        try:
            run.train(config.make(settings(folder, output, **more)), Session(console=Console(file=said, width=300)))
        except Killed:
            assert stop is not None
    return said.getvalue()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_is_the_same_run(precision: str, folder: Path) -> None:
    train(folder, "whole", precision=precision)
    assert len(lines(folder / "whole" / "metrics.jsonl")) == STEPS
    train(folder, "cut", stop=5, precision=precision)
    assert len(lines(folder / "cut" / "metrics.jsonl")) == 5
    said = train(folder, "cut", stop=7, precision=precision)
    assert "resumed step 4 of 10 (verified 8 files)" in said
    assert "resumed step 6 of 10" in train(folder, "cut", precision=precision)
    assert differences(folder, "whole", "cut") == []


@pytest.mark.parametrize(
    "more",
    [
        {"data__add_tokens": ["<|one|>", "<|two|>"], "adapter": {"r": 2}, "neftune": 5.0},
        {"loss": {"name": "kl", "options": {"beta": 0.5}}},
        {"optimizer__name": "schedulefree:AdamWScheduleFree", "schedule__name": "constant", "checkpoint__keep_best": 1},
    ],
    ids=["new tokens and noise", "kl", "schedule-free"],
)
def test_so_is_one_that_draws_or_keeps_more(more: dict[str, Any], folder: Path) -> None:
    if "optimizer__name" in more:
        pytest.importorskip("schedulefree")
    more |= {"epochs": 1, "precision": "bf16"}
    train(folder, "whole", **more)
    train(folder, "cut", stop=3, **more)
    assert "resumed step 2 of 5" in train(folder, "cut", **more)
    assert differences(folder, "whole", "cut") == []


@pytest.mark.parametrize("lost", ["random", "optimizer", "weights"])
def test_the_comparison_sees_what_is_not_restored(lost: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(folder, "whole")
    train(folder, "cut", stop=4)
    if lost == "random":
        monkeypatch.setattr(randomness, "restore", lambda state: None)
    else:
        prefix = "exp_avg" if lost == "optimizer" else "weight"
        read = pieces.StoredTensors.__getitem__
        monkeypatch.setattr(
            pieces.StoredTensors,
            "__getitem__",
            lambda stored, key: read(stored, key).mul(0.9) if key.startswith(prefix) else read(stored, key),
        )
    assert "resumed step 4" in train(folder, "cut")
    assert "metrics" in differences(folder, "whole", "cut")


def test_a_finished_run_says_so(folder: Path) -> None:
    train(folder, "whole", epochs=1)
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*")}
    assert "finished at step 5" in train(folder, "whole", epochs=1)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*")}
    made = config.make(settings(folder, "whole", epochs=1))
    again = run.train(made, Session(console=Console(file=io.StringIO())))
    assert len(again.metrics) == 5
    assert again.model.num_parameters() > 0
    assert again.tokenizer("a")["input_ids"]


def test_a_run_that_was_killed_before_its_first_save_begins_anew(folder: Path) -> None:
    train(folder, "whole")
    train(folder, "cut", stop=1)
    train(folder, "cut")
    assert differences(folder, "whole", "cut") == []


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_an_export_that_was_stopped_is_made_again(moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(folder, "whole")

    def killed(*given: Any, **named: Any) -> None:
        raise Killed

    where = {"before": "export", "while": "_tokenizer_to_save", "after": "verify"}[moment]
    made = config.make(settings(folder, "cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"deft.export.folder.{where}", killed)
        with pytest.raises(Killed):
            run.train(made, Session(console=Console(file=io.StringIO())))
    assert (folder / "cut" / "final").exists() == (moment == "after")
    assert "resumed step 10 of 10" in train(folder, "cut")
    assert differences(folder, "whole", "cut") == []


def test_the_second_epoch_is_not_the_first_again(folder: Path) -> None:
    """Where the data were read again from their beginning after a resume, its steps would repeat those of the first."""
    train(folder, "cut", stop=6)
    train(folder, "cut")
    metrics = lines(folder / "cut" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert len({line["tokens"] for line in metrics}) > STEPS // 2


def test_a_checkpoint_survives_writing_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SHARD", 32)
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
        "b": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.zeros(0, 3, dtype=torch.int16),
        "e": torch.tensor([True, False]),
    }
    parts = {"model": tensors, "optimizer": {"steps": torch.tensor(3)}, "rows": {"digest": torch.tensor([1])}}
    values = {name: {"é": 1.25} for name in ("schedule", "cursor", "inputs", "random-00000")}
    checkpoint.write(tmp_path, Checkpoint(3, parts, values, loss=0.5))
    found = checkpoint.read(tmp_path, 3)
    stored = found.checkpoint
    assert (stored.step, stored.values, stored.loss) == (3, values, 0.5)
    assert {part: set(each) for part, each in stored.tensors.items()} == {
        part: set(each) for part, each in parts.items()
    }
    for key, tensor in tensors.items():
        back = stored.tensors["model"][key]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert back.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert len(list((tmp_path / "step-000003").glob("model-*.safetensors"))) > 1
    assert found.files == len(list((tmp_path / "step-000003").iterdir()))


def test_a_step_that_is_named_is_gone_on_from_and_newer_ones_are_set_aside(folder: Path) -> None:
    train(folder, "whole")
    train(folder, "cut", stop=7, checkpoint__keep=3)
    said = train(folder, "cut", resume="step-000002", checkpoint__keep=3)
    assert "resumed step 2 of 10" in said
    assert "step-000006 is set aside as step-000006.aside" in said
    assert differences(folder, "whole", "cut") == []
    names = {path.name for path in (folder / "cut" / "checkpoints").iterdir()}
    assert {"step-000004.aside", "step-000006.aside", "step-000010"} <= names


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("never", "the output folder is not empty"),
        ("step-000003", "there is no step-000003 in .*; there is step-000002"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(resume: str, message: str, folder: Path) -> None:
    train(folder, "cut", stop=3)
    with pytest.raises(InputError, match=message):
        train(folder, "cut", resume=resume)


def test_rows_that_are_not_trained_may_change_and_it_is_said(folder: Path) -> None:
    data = folder / "train.jsonl"
    good, bad = data.read_text(), json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n"
    data.write_text(good + bad)
    train(folder, "cut", stop=3, data__allow_refused=1)
    assert "since step" not in train(folder, "cut", stop=5, data__allow_refused=1)
    data.write_text(good)
    said = train(folder, "cut", data__allow_refused=1)
    (line,) = [line for line in said.splitlines() if line.startswith("since step")]
    assert re.match(r"since step 4: ledger \w{12} -> \w{12} applies: the same rows are trained", line)


def test_fewer_epochs_than_are_done_are_refused(folder: Path) -> None:
    train(folder, "cut", stop=7)
    with pytest.raises(InputError, match="epochs: they would end before step 6"):
        train(folder, "cut", epochs=1)
    assert "resumed step 6 of 6" in train(folder, "cut", steps=6)


def test_the_best_and_regular_checkpoints_stay(folder: Path) -> None:
    train(folder, "cut", checkpoint__keep=1, checkpoint__keep_best=1, checkpoint__keep_every=4, optimizer__lr=0.3)
    losses = {line["step"]: line["loss"] for line in lines(folder / "cut" / "eval.jsonl")}
    best = min((step for step in losses if step % 2 == 0 and step), key=lambda step: losses[step])
    stay = {*checkpoint.steps(folder / "cut" / "checkpoints")}
    assert stay == {best, 4, 8, 10}


def test_the_best_is_not_kept_where_nothing_tells_it(folder: Path) -> None:
    with pytest.raises(InputError, match="keep_best: the best is found by held-out loss"):
        train(folder, "cut", checkpoint__keep_best=1, data__eval=0.0)


def test_a_log_that_lost_its_end_is_cut_to_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert jsonl.cut(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
