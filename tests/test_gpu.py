"""What only a CUDA device can show of the training step; the same runs on a CPU elsewhere as far as it can."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from states import state_around
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from deft.core.hardware import Machine
from deft.core.types import Encoded, Origin
from deft.model import selftest
from deft.model.causal_lm import CausalLM
from deft.plan import loader
from deft.plan.order import Batching
from deft.run import forecast
from deft.training import chunked, compiling, step
from deft.training.loop import train
from deft.training.state import TrainState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)


def new_state() -> TrainState:
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    causal_lm = selftest.choose(model)
    assert not causal_lm.note
    return state_around(causal_lm, torch.bfloat16)


def planned(steps: int = 12) -> loader.Loader:
    draw = np.random.default_rng(0)
    examples = [
        (Encoded(Origin("a", n), draw.integers(0, 4096, length).astype(np.int32), np.ones(length, np.float32)),)
        for n, length in enumerate(draw.integers(20, 700, 16 * steps).tolist())
    ]
    return loader.make(examples, Batching(examples=16), epochs=1, seed=0, microbatch_tokens=2048)


@pytest.fixture
def compiled() -> Iterator[tuple[TrainState, loader.Loader]]:
    torch._dynamo.reset()
    counters.clear()
    state, plan, said = new_state(), planned(), list[str]()
    assert compiling.is_sound(state.causal_lm)
    compiling.compile_for(state, compiling.buckets(plan), chunked.NLL, said.append)
    assert state.causal_lm.compiled is not None, said
    yield state, plan
    torch._dynamo.reset()


def steps(state: TrainState, plan: loader.Loader) -> list[Any]:
    return [*train(state, plan, chunked.NLL, clip=1.0, lr=lambda step: 1e-4)]


def gradients(causal_lm: CausalLM, batch: Any) -> dict[str, torch.Tensor]:
    causal_lm.model.zero_grad()
    causal_lm(batch, chunked.NLL).nll_sum.backward()
    found = {name: each.grad.double() for name, each in causal_lm.model.named_parameters() if each.grad is not None}
    causal_lm.model.zero_grad()
    return found


def error(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The relative error of all gradients together."""
    wrong = torch.stack([(ours[name] - exact[name]).norm() for name in exact]).norm()
    return float(wrong / torch.stack([each.norm() for each in exact.values()]).norm())


def test_compiled_layers_are_as_near_to_fp32_as_layers_alone(compiled: tuple[TrainState, loader.Loader]) -> None:
    state, plan = compiled
    wide = CausalLM(copy.deepcopy(state.causal_lm.model).float(), "packed")
    plain = CausalLM(state.causal_lm.model, "packed")
    for batch in plan.step(0).micro_batches[:3]:
        exact = gradients(wide, batch)
        assert error(gradients(state.causal_lm, batch), exact) <= 1.2 * error(gradients(plain, batch), exact) + 1e-4


def test_nothing_is_compiled_once_training_has_begun(compiled: tuple[TrainState, loader.Loader]) -> None:
    state, plan = compiled
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("default"):
        records = steps(state, plan)
    assert len(records) == 12
    assert all(record.is_finite for record in records)
    assert any(record.padded_tokens for record in records)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_step_waits_for_the_device_once(is_compiled: bool, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state, plan = request.getfixturevalue("compiled") if is_compiled else (new_state(), planned())
    own, reads = step._read, list[int]()

    def read(numbers: torch.Tensor) -> step.StepNumbers:
        reads.append(len(numbers))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return own(numbers)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(step, "_read", read)
    step.optimizer_step(state, plan.step(0), chunked.NLL, clip=1.0, lr=1e-5)  # kernels are loaded, memory is pinned
    try:
        torch.cuda.set_sync_debug_mode("error")
        step.optimizer_step(state, plan.step(1), chunked.NLL, clip=1.0, lr=1e-5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [3, 3]


def test_compiled_and_plain_runs_learn_alike(compiled: tuple[TrainState, loader.Loader]) -> None:
    state, plan = compiled
    ours = [record.loss for record in steps(state, plan)]
    theirs = [record.loss for record in steps(new_state(), plan)]
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_memory_stays_below_what_is_foretold() -> None:
    plan = planned()
    batch, is_alone = forecast.largest(plan)
    traced = forecast.trace(CONFIG, batch, chunked.NLL, Machine(DEVICE, torch.bfloat16, 2048), is_alone)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps(new_state(), plan)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * traced.peak_bytes
