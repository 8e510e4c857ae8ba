"""`deft check --time`: all steps of a plan priced by a few of its micro-batches."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoders import chat
from rich.console import Console
from states import state_around
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from transformers import AutoModelForCausalLM

from deft.commands import check
from deft.commands.check import Checkup
from deft.core.errors import MemoryShort
from deft.core.types import Encoded, MicroBatch, Origin
from deft.model import attention
from deft.model.causal_lm import CausalLM
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.run import config, plan_time
from deft.run.scaling import Flop
from deft.training.chunked import NLL
from deft.training.state import TrainState


def planned(lengths: list[int], budget: int, per_step: int) -> Loader:
    """Documents of these lengths, of which all but the first token are learnt."""
    examples = [
        (Encoded(Origin("rows", i), np.full(n, i % 50, np.int32), (np.arange(n) > 0).astype(np.float32)),)
        for i, n in enumerate(lengths)
    ]
    return loader.make(examples, Batching(per_step), epochs=3, seed=0, microbatch_tokens=budget)


@pytest.fixture
def state(tmp_path: Path) -> TrainState:
    path = write_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME)
    model.train()
    return state_around(CausalLM(model, "packed"), weight_decay=0.1)


class Clock:
    """Time that only micro-batches and updates take: 2 s and 0.01 s per token of the first, 0.5 s the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sizes, self.updates = 0.0, [], 0
        self.backward, self.update = plan_time._backward, plan_time._update
        monkeypatch.setattr(plan_time, "_backward", self.on_backward)
        monkeypatch.setattr(plan_time, "_update", self.on_update)
        monkeypatch.setattr(plan_time, "time", SimpleNamespace(perf_counter=lambda: self.now))
        flop = SimpleNamespace(of=lambda model: lambda tokens, targets, squares: float(tokens))
        monkeypatch.setattr(plan_time, "Flop", flop)

    def on_backward(self, state: TrainState, batch: MicroBatch, objective: Any) -> None:
        self.backward(state, batch, NLL)
        self.sizes.append(len(batch.tokens))
        self.now += 2.0 + 0.01 * len(batch.tokens)

    def on_update(self, state: TrainState, clip: float | None) -> None:
        self.update(state, clip)
        self.updates += 1
        self.now += 0.5


@pytest.mark.parametrize(("budget", "per_step"), [(40, 1), (40, 4), (200, 4)])
def test_all_steps_are_priced_by_those_that_were_run(
    state: TrainState, budget: int, per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_time, "SECONDS", 25.0)
    plan, clock = planned([5, 12, 40, 33, 21, 8, 16, 27] * 3, budget, per_step), Clock(monkeypatch)
    found = plan_time.measure(state, plan, NLL, clip=1.0)
    works = [plan.step(step) for step in range(plan.steps)]
    batches = [batch for work in works for batch in work.micro_batches]
    seconds = 2.0 * len(batches) + 0.01 * sum(len(batch.tokens) for batch in batches) + 0.5 * len(works)
    assert found.seconds == pytest.approx(seconds)
    assert found.tokens_per_second == pytest.approx(sum(work.tokens for work in works) / seconds)
    largest = max(len(batch.tokens) for batch in batches)
    assert clock.sizes[:2] == [largest, largest], "the largest one first, which shows whether the plan fits"
    assert found.measured == len(clock.sizes) - 2 >= plan_time.LEAST
    assert found.measured < len(batches)


def test_gradients_are_summed_as_in_the_steps_of_the_plan(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    for per_step, updates in ((1, 2 + 4), (4, 1 + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(plan_time, "SECONDS", 0.0)
            clock = Clock(patch)
            plan_time.measure(state, planned([20] * 8, budget=20, per_step=per_step), NLL, clip=1.0)
            assert (len(clock.sizes), clock.updates) == (2 + 4, updates)


def test_no_weight_changes(state: TrainState) -> None:
    before = {name: weight.clone() for name, weight in state.causal_lm.model.state_dict().items()}
    found = plan_time.measure(state, planned([20, 30, 11] * 4, budget=64, per_step=6), NLL, clip=None)
    assert 0.0 < found.seconds < math.inf
    assert int(state.optimizer.state()["steps"]) > 1
    assert all(torch.equal(weight, before[name]) for name, weight in state.causal_lm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.causal_lm.model.parameters())


def test_the_device_is_waited_for_before_the_clock_is_read(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("waited"))
    clock = SimpleNamespace(perf_counter=lambda: happened.append("read") or 0.0)
    monkeypatch.setattr(plan_time, "time", clock)
    on_gpu: Any = SimpleNamespace(causal_lm=SimpleNamespace(device=torch.device("cuda")))
    plan_time._timed(on_gpu, lambda: happened.append("ran"))
    assert happened == ["waited", "read", "ran", "waited", "read"]


def test_work_counts_the_layers_per_token_and_the_head_per_target(state: TrainState) -> None:
    flop, model = Flop.of(state.causal_lm.model), state.causal_lm.model
    embedding = model.get_input_embeddings().weight.numel()
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (flop.layers, flop.head) == (total - (1 if is_tied else 2) * embedding, embedding)
    priced = [next(plan_time._described(planned([20, last], 64, 2), range(1), flop)).flop for last in (30, 31)]
    assert priced == [flop(48, 48, 19**2 + 29**2), flop(49, 49, 19**2 + 30**2)]
    assert priced[1] - priced[0] == 6 * (flop.layers + flop.head) + 7 * flop.queries * (30**2 - 29**2)


# The command


def checked(tmp_path: Path, **settings: Any) -> tuple[Checkup, str]:
    model = write_llama(tmp_path / "model", chat_template=CHATML)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps(chat(f"What is {n}?", "It is " + "very " * n + "big.")) + "\n" for n in range(20))
    )
    console = Console(file=io.StringIO(), width=200)
    given = {"model": str(model), "data__train": str(rows), "batch__examples": 4, "output": str(tmp_path / "run")}
    made = config.make(config.nested({**given, "device": "cpu", **settings}))
    found = check.run(made, str(tmp_path / "found.json"), console, is_timed=True)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_check_times_the_plan_and_writes_no_run(tmp_path: Path) -> None:
    found, said = checked(tmp_path)
    assert found.time is not None
    assert f"time      {found.time}\n" in said
    assert json.loads((tmp_path / "found.json").read_text())["time"]["seconds"] == found.time.seconds
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "found.json"}


def test_micro_batches_that_do_not_fit_are_an_error_that_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plan_time, "measure", full)
    with pytest.raises(MemoryShort, match="micro-batches of 512 tokens; a smaller microbatch_tokens") as error:
        checked(tmp_path, microbatch_tokens=512)
    assert error.value.exit_code == 7
