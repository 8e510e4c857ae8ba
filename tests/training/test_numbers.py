"""A step whose numbers are not finite changes nothing, names its rows, and can be seen again."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_llama
from torch import Tensor

import deft
from deft.commands import replay
from deft.core import hardware
from deft.core.errors import DamagedError, InputError, NumbersError
from deft.distributed.world import World
from deft.model import load
from deft.run import config
from deft.run.build import build, pretrained
from deft.run.train import Run
from deft.training import badstep, chunked
from deft.training.optim.adamw import AdamW

ROWS = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(24)]
BAD = 13
"""The row whose answer has a `~`, which no other has."""


class _Spoilt(torch.autograd.Function):
    """The same number, with a gradient that is not one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0] * float("nan")


def spoil(monkeypatch: pytest.MonkeyPatch, tilde: int, what: str) -> None:
    """Loss or gradient of what holds the `~` is not a number."""
    plain = chunked.loss

    def loss(hidden: Tensor, head: Any, targets: Tensor, weights: Tensor) -> Tensor:
        total = plain(hidden, head, targets, weights)
        if not bool((targets == tilde).any()):
            return total
        return total * float("nan") if what == "loss" else _Spoilt.apply(total)

    monkeypatch.setattr(chunked, "loss", loss)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [row if n != BAD else {**row, "completion": " It is ~."} for n, row in enumerate(ROWS)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tilde(model: Path) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("~")


class Spied:
    """The optimizer of a run, and its whole state after each update."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.after: list[dict[str, Tensor]] = []

    def is_as_after_the_last_step(self) -> bool:
        now, then = _state(self.optimizer), self.after[-1]
        return now.keys() == then.keys() and all(map(_is_same, now.values(), then.values()))


def _state(optimizer: AdamW) -> dict[str, Tensor]:
    """Everything that a step changes."""
    return optimizer._masters.state() | optimizer.state()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bytes(one.reshape(-1).view(torch.uint8).numpy()) == bytes(other.reshape(-1).view(torch.uint8).numpy())


def spy(monkeypatch: pytest.MonkeyPatch) -> Spied:
    spied, plain = Spied(), AdamW.step

    def step(optimizer: AdamW, lr: float, scale: Tensor | None = None) -> None:
        plain(optimizer, lr, scale)
        spied.optimizer = optimizer
        spied.after.append({name: tensor.clone() for name, tensor in _state(optimizer).items()})

    monkeypatch.setattr(AdamW, "step", step)
    return spied


def train(tmp_path: Path, model: Path, data: Path, **settings: Any) -> Run:
    given = {"epochs": 1, "batch": 6, "lr": 5e-3, "microbatch_tokens": 64, "output": str(tmp_path / "run"), **settings}
    return deft.train(model, str(data), **given)


def replayed(folder: Path) -> str:
    said = StringIO()
    with redirect_stdout(said), pytest.raises(NumbersError, match="is not finite again"):
        replay.run(str(folder))
    return said.getvalue()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_stops_with_every_bit_as_it_was_and_names_the_row(
    tmp_path: Path, model: Path, data: Path, tilde: int, monkeypatch: pytest.MonkeyPatch, what: str, precision: str
) -> None:
    spoil(monkeypatch, tilde, what)
    spied = spy(monkeypatch)
    with pytest.raises(NumbersError) as error:
        train(tmp_path, model, data, precision=precision)
    (folder,) = (tmp_path / "run").glob("bad-step-*")
    step = int(folder.name.removeprefix("bad-step-"))
    assert str(error.value).startswith(
        f"{what} is not finite at step {step}, row {data}:{BAD + 1}; weights unchanged; replay: deft replay {folder}"
    )
    assert spied.is_as_after_the_last_step()
    assert len(spied.after) == step - 1
    found = replayed(folder)
    assert f"{data}:{BAD + 1}: " in found
    assert found.count("nan") >= 2


def test_a_look_at_a_bad_step_that_is_broken_off_draws_no_random_number(
    tmp_path: Path, model: Path, data: Path, tilde: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, tilde, "loss")
    with pytest.raises(NumbersError):
        train(tmp_path, model, data)
    (folder,) = (tmp_path / "run").glob("bad-step-*")
    made = config.load(str(tmp_path / "run" / "config.yaml"))
    machine = hardware.resolve(made.device, made.precision, made.microbatch_tokens)
    base = load.inspect(str(model))
    state = build(made, lambda: pretrained(base, machine), machine, World())

    def broken(*_: Any) -> Tensor:
        torch.rand(1)
        raise KeyboardInterrupt

    assert all(len(batch.seeds) == len(batch.documents) for batch in badstep.read(folder)[0].micro_batches)
    broken.uses_start = False  # type: ignore[attr-defined]
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        badstep.examine(state.causal_lm, badstep.read(folder)[0], broken)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_it_can_be_skipped_so_many_times(
    tmp_path: Path, model: Path, data: Path, tilde: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, tilde, "loss")
    run = train(tmp_path, model, data, epochs=2, skip_bad_steps=2)
    assert [line["step"] for line in run.metrics] == list(range(1, 9))
    assert sum(line["loss"] != line["loss"] for line in run.metrics) == 2
    with pytest.raises(NumbersError, match=r"skip_bad_steps=2 goes past it"):
        train(tmp_path, model, data, epochs=2, skip_bad_steps=1, output=str(tmp_path / "other"))


def test_a_weight_that_is_not_a_number_is_named_with_its_layer(
    tmp_path: Path, model: Path, data: Path, tilde: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deft.model import selftest

    choose = selftest.choose

    def broken(loaded: Any) -> Any:
        chosen = choose(loaded)
        loaded.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
        return chosen

    monkeypatch.setattr(selftest, "choose", broken)
    with pytest.raises(NumbersError, match=r"at step 1, rows "):
        train(tmp_path, model, data)
    monkeypatch.setattr(selftest, "choose", choose)
    found = replayed(tmp_path / "run" / "bad-step-1")
    assert "first layer that is not finite: model.layers.1.mlp.up_proj" in found
    assert "weights that are not finite: 1, model.layers.1.mlp.up_proj.weight first" in found


def test_a_folder_that_is_none_or_is_damaged_is_refused(
    tmp_path: Path, model: Path, data: Path, tilde: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="not a bad step; name a folder"):
        replay.run(str(tmp_path))
    spoil(monkeypatch, tilde, "loss")
    with pytest.raises(NumbersError):
        train(tmp_path, model, data)
    (folder,) = (tmp_path / "run").glob("bad-step-*")
    path = folder / "batches.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DamagedError, match="checksum differs"):
        replay.run(str(folder))
